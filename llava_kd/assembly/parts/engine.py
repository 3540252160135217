"""The engine, and which parameters it trains at which rate."""

from __future__ import annotations

import os
from pathlib import Path

from llava_kd.config import TrainConfig
from llava_kd.distill.student import LEARNED_WEIGHTS, Student
from llava_kd.models.mllm import MLLM
from llava_kd.parallel.engine import AdamWSettings, Engine, ParameterGroup
from llava_kd.parallel.torch_engine import TorchEngine
from llava_kd.parallel.world import World


def make_engine(config: TrainConfig, world: World, module: Student) -> Engine:
    kind = config.engine.kind
    if kind == "auto":
        kind = "single" if world.size == 1 else "ddp"
    groups = parameter_groups(config, module)
    adamw = AdamWSettings(
        betas=config.optim.betas, eps=config.optim.eps, weight_decay=config.optim.weight_decay
    )
    bf16 = config.engine.precision == "bf16"
    if kind == "deepspeed":
        from llava_kd.parallel.deepspeed_engine import DeepSpeedEngine, Zero

        return DeepSpeedEngine(
            module,
            groups,
            world=world,
            zero=Zero(
                stage=config.engine.zero_stage or 3,
                max_grad_norm=config.optim.max_grad_norm,
                micro_batch_size=config.micro_batch_size,
                accumulation=-(-config.global_batch_size // (config.micro_batch_size * world.size)),
            ),
            adamw=adamw,
            bf16=bf16,
        )
    units = [u for one in students(module) for u in (*one.language_model.layers, one.multi_modal_projector)]
    return TorchEngine(module, groups, world=world, kind=kind, adamw=adamw, bf16=bf16, shard_units=units)


def compiles_first(config: TrainConfig) -> str | None:
    """What a first start under DeepSpeed takes its time for."""
    if config.engine.kind != "deepspeed":
        return None
    from torch.utils.cpp_extension import get_default_build_root  # late: it says whether CUDA is there

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    if any(root.glob("**/deepspeed*/*.so")):
        return None
    return f"DeepSpeed compiles a part of itself into {root} at its first start; this takes about a minute"


def students(module: Student) -> list[MLLM]:
    """The models that train: the student first, and a peer."""
    return [one for one in module.modules() if isinstance(one, MLLM)]


def parameter_groups(config: TrainConfig, module: Student) -> list[ParameterGroup]:
    """One group a trained part, each with its own learning rate, and one of what is trained beside them."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = []
    parts = [item for one in students(module) for item in one.parts(config.trainable).items()]
    for part, modules in parts:
        trained = (p for child in modules for p in child.parameters() if p.requires_grad)
        owned = dict.fromkeys(names[id(p)] for p in trained)
        lr = config.optim.lr_by_part.get(part, config.optim.lr)
        groups.append(ParameterGroup(names=tuple(owned), lr=lr))
    taken = {name for group in groups for name in group.names}
    others = [name for name, p in module.named_parameters() if p.requires_grad and name not in taken]
    weights = [name for name in others if name.startswith(LEARNED_WEIGHTS)]
    if others := [name for name in others if name not in weights]:  # what terms and teachings bring
        groups.append(ParameterGroup(names=tuple(others), lr=config.optim.lr))
    if weights and (settings := config.objective.learned_weights) is not None:
        groups.append(ParameterGroup(names=tuple(weights), lr=settings.lr))
    return groups
