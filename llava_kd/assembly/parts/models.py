"""Students and teachers, as the settings name them, on their device."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llava_kd.assembly.plugins import OURS, Tables
from llava_kd.assembly.settings import tables_of
from llava_kd.config import StudentConfig, TrainConfig
from llava_kd.data.text.template import Template
from llava_kd.data.text.template_choice import choose
from llava_kd.models.attention.probe import choose_kernel
from llava_kd.models.files.checkpoint import Parts, compose, load_stock
from llava_kd.models.language_model import checkpoint_activations
from llava_kd.models.lora import is_adapter
from llava_kd.models.mllm import MLLM, PARTS
from llava_kd.models.projectors.on_a_grid import with_conv_attention
from llava_kd.models.towers.vision_tower import text_config
from llava_kd.parallel.world import World

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def student_in(config: TrainConfig, say: Callable[[str], None] = lambda line: None) -> Parts:
    """The student of a stage; its plug-ins' towers and templates may be named."""
    return student_parts(
        config.student,
        template=config.data.template,
        seed=config.seed,
        say=say,
        tables=tables_of(config),
    )


def student_parts(
    config: StudentConfig,
    *,
    template: str,
    seed: int,
    say: Callable[[str], None] = lambda line: None,
    tables: Tables = OURS,
) -> Parts:
    """The student to train, in fp32, with the chat template that its data use; `say` hears which and why."""
    if config.checkpoint is not None:
        parts = load_stock(config.checkpoint)
    else:
        assert config.vision_tower is not None
        assert config.language_model is not None
        parts = compose(
            vision_tower=config.vision_tower,
            language_model=config.language_model,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            seed=seed,
            families=tables.towers,
            drops_logit_cap=config.drops_logit_cap,
        )
        if config.projector == "conv_attention":
            parts = with_conv_attention(parts, seed=seed)
    chosen = choose(
        config.template or template,
        tokenizer=parts.processor.tokenizer,
        model_type=text_config(parts.stock.config).model_type,
        chat_template=parts.processor.chat_template,
        where="data.template" if config.template is None else f"{config.where}.template",
        is_trained=config.checkpoint is not None,
        templates=tables.templates,
    )
    say(str(chosen))
    speak(parts, chosen.template)
    return parts


def speak(parts: Parts, template: Template) -> None:
    """Make the student's own directory render and end answers as its training data do."""
    tokenizer = parts.processor.tokenizer
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    parts.processor.chat_template = tokenizer.chat_template = template.chat_template_for(tokenizer)
    generation = parts.stock.generation_config
    if generation is not None:
        generation.eos_token_id = template.end_token_id(tokenizer)
        generation.pad_token_id = tokenizer.pad_token_id


def place(mllm: MLLM, device: torch.device, dtypes: Mapping[str, torch.dtype]) -> None:
    """Each part onto the device, its weights in its type; adapters are always fp32.

    Computed constants keep theirs: the frequencies of rotary positions, rounded to bf16, are wrong by whole
    turns at position 2000.
    """
    for name, modules in mllm.parts().items():
        for module in modules:
            constants = _constants(module)
            module.to(device, dtypes[name])
            for path, parameter in module.named_parameters():
                if is_adapter(path):
                    parameter.data = parameter.data.float()
            for path, value in constants.items():
                owner, _, buffer = path.rpartition(".")
                module.get_submodule(owner).register_buffer(buffer, value.to(device), persistent=False)


def placed_student(
    config: TrainConfig, world: World, student: Parts, *, whose: str = "student"
) -> tuple[MLLM, str]:
    """It on its device, in its types, what trains marked; and the kernel of its attention."""
    mllm = MLLM(student.stock, trainable=config.trainable, tower_last_layers=config.vision_tower_last_layers)
    place(mllm, world.device, student_dtypes(config))
    kernel = choose_attention(
        mllm.language_model, world.device, compute_dtype(config),
        whose=whose, is_packed=config.data.packing is not None,
    )  # fmt: skip
    if config.engine.activation_checkpointing:
        checkpoint_activations(student.stock)
    return mllm, kernel


def choose_attention(
    language_model: PreTrainedModel,
    device: torch.device,
    dtype: torch.dtype,
    *,
    whose: str,
    is_packed: bool = False,
) -> str:
    """Let the language model, which computes in `dtype`, take the best kernel for its rows; its name.

    `whose` it is, for a message. Raises ValueError for one that reads records of a batch, or of a row where
    these hold several, otherwise than alone. To be called before an engine shards the student.
    """
    return choose_kernel(
        language_model, device=device, dtype=dtype, is_packed=is_packed, whose=f"the {whose}"
    )


def _constants(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that no checkpoint holds, by name."""
    saved = module.state_dict().keys()
    return {name: value for name, value in module.named_buffers() if name not in saved}


def student_dtypes(config: TrainConfig) -> dict[str, torch.dtype]:
    """Trained parts in fp32, the masters of the optimiser; frozen ones in the computing type."""
    return {
        name: torch.float32 if name in wholly_trained(config) else compute_dtype(config) for name in PARTS
    }


def compute_dtype(config: TrainConfig) -> torch.dtype:
    return torch.bfloat16 if config.engine.precision == "bf16" else torch.float32


def wholly_trained(config: TrainConfig) -> list[str]:
    """Trained parts whose own weights move: under adapters those of the language model do not."""
    return [p for p in config.trainable if p != "language_model" or config.student.lora is None]
