"""What a run needs, from shapes alone: parameters of each part, memory of a rank, traffic of a step.

Weights, gradients and optimiser are counted; activations are an estimate of what a step keeps at its peak.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from llava_kd.build.models import wholly_trained
from llava_kd.config import LoraConfig, TrainConfig
from llava_kd.models.lora import chosen_layers, linear_layers
from llava_kd.models.mllm import MLLM, PARTS
from llava_kd.models.reading import existing, read_config
from llava_kd.models.reused_projector import llava_class
from llava_kd.models.vision_tower import text_config, tokens_per_image, vision_config

WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}
BYTES = {"4bit": 0.516, "8bit": 1.0}  # of a quantized weight and its share of the scales
GB = 1e9
_HEAD_ROWS = 1024  # rows whose logits exist at one time in the loss head


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Parameters of each part and those that are trained, and the shapes that decide activations."""

    parameters: Mapping[str, int]
    trained: int
    linear: int
    largest_unit: int
    layers: int
    hidden: int
    inner: int
    vocabulary: int
    tower_hidden: int
    tower_layers: int
    tokens_per_image: int

    @staticmethod
    def of(stock: LlavaForConditionalGeneration, config: TrainConfig | None = None) -> Sizes:
        """`config` is of the stage that trains it; None for a model that is only used."""
        text, vision = text_config(stock.config), vision_config(stock.config)
        seen: set[int] = set()
        counts = {}
        mllm = MLLM(stock)
        adapters = 0
        if config is not None:
            last = config.vision_tower_last_layers
            mllm = MLLM(stock, trainable=wholly_trained(config), tower_last_layers=last)
            adapters = _adapters(stock, config.student.lora)
        for part, modules in mllm.parts(PARTS).items():
            owned = {id(p): p.numel() for module in modules for p in module.parameters()}
            counts[part] = sum(number for key, number in owned.items() if key not in seen)
            seen |= owned.keys()
        counts["language_model"] += adapters
        layers = stock.model.language_model.layers
        return Sizes(
            parameters=counts,
            trained=adapters + sum(p.numel() for p in mllm.parameters() if p.requires_grad),
            linear=sum(layer.weight.numel() for layer in linear_layers(stock).values()),
            largest_unit=max(sum(p.numel() for p in layer.parameters()) for layer in layers),
            layers=len(layers),
            hidden=text.hidden_size,
            inner=text.to_dict().get("intermediate_size") or 4 * text.hidden_size,
            vocabulary=stock.lm_head.weight.shape[0],
            tower_hidden=vision.hidden_size,
            tower_layers=vision.to_dict().get("num_hidden_layers") or 1,
            tokens_per_image=tokens_per_image(stock.config),
        )

    @staticmethod
    def of_directory(name: str, stage: TrainConfig | None = None) -> Sizes:
        """From the configuration alone."""
        config = read_config(existing(name, "the LLaVA checkpoint"))
        if not isinstance(config, LlavaConfig):
            raise ValueError(f"{name} is a {config.model_type!r} model; a LLaVA checkpoint must be 'llava'")
        with torch.device("meta"):
            return Sizes.of(llava_class(config)(config), stage)


def _adapters(stock: LlavaForConditionalGeneration, lora: LoraConfig | None) -> int:
    """Parameters of the adapters that the student will have."""
    if lora is None:
        return 0
    layers = linear_layers(stock)
    chosen = (layers[path] for path in chosen_layers(stock, lora.targets))
    return sum(lora.rank * (layer.in_features + layer.out_features) for layer in chosen)


def engine_kind(config: TrainConfig, ranks: int) -> str:
    """`single`, `ddp`, `fsdp2`, `zero1`, `zero2` or `zero3`."""
    kind = config.engine.kind
    if kind == "auto":
        return "single" if ranks == 1 else "ddp"
    return f"zero{config.engine.zero_stage or 3}" if kind == "deepspeed" else kind


def memory(config: TrainConfig, ranks: int, student: Sizes, teacher: Sizes | None) -> dict[str, float]:
    """Bytes on one rank, by what takes them."""
    bf16 = config.engine.precision == "bf16"
    width = 2 if bf16 else 4
    trained = student.trained
    frozen = sum(student.parameters.values()) - trained
    tower = 0 if "vision_tower" in config.trainable else student.parameters["vision_tower"]
    found = _states(engine_kind(config, ranks), ranks, trained, frozen - tower, tower, width, student)
    if config.student.quantize is not None:
        found["weights"] -= student.linear * (width - BYTES[config.student.quantize])
    if teacher is not None and config.teacher is not None and config.teacher.cache is not None:
        found["teacher"] = teacher.vocabulary * teacher.hidden * WIDTHS[config.teacher.dtype]
        teacher = None  # its head is all that is there
    if teacher is not None:
        assert config.teacher is not None
        spread = teacher.layers * teacher.largest_unit * WIDTHS[config.teacher.dtype]
        found["teacher"] = sum(teacher.parameters.values()) * WIDTHS[config.teacher.dtype]
        if config.teacher.quantize is not None:
            found["teacher"] -= teacher.linear * (
                WIDTHS[config.teacher.dtype] - BYTES[config.teacher.quantize]
            )
        if config.teacher.placement == "cpu_offload":
            found["teacher"] -= spread
            found["gathered units"] += spread / teacher.layers
        if config.teacher.placement == "fsdp":
            found["teacher"] -= spread * (ranks - 1) / ranks
            found["gathered units"] += 2 * spread / teacher.layers * (ranks > 1)
    found["activations"] = _activations(config, student, teacher, width)
    return found


def _states(
    kind: str, ranks: int, trained: int, frozen: int, tower: int, width: int, student: Sizes
) -> dict[str, float]:
    copy = trained * width if width == 2 else 0  # what the forward reads beside the fp32 masters
    moments, gathered = 8.0 * trained, 0.0
    weights, gradients = 4.0 * trained + copy + width * frozen, 4.0 * trained
    if kind in ("zero1", "zero2", "zero3"):
        masters = 4.0 * trained if width == 2 else 0.0
        share = 1 if kind == "zero3" else ranks
        weights = width * trained * share / ranks + width * frozen * share / ranks + masters / ranks
        gradients = width * trained / (1 if kind == "zero1" else ranks)
        moments /= ranks
    if kind == "fsdp2":
        weights, gradients, moments = (
            (4.0 * trained + width * frozen) / ranks,
            gradients / ranks,
            moments / ranks,
        )
    if kind in ("fsdp2", "zero3"):
        table = student.vocabulary * student.hidden
        gathered = 2.0 * width * student.largest_unit + width * table
    return {
        "weights": weights + width * tower,
        "gradients": gradients,
        "optimiser": moments,
        "gathered units": gathered,
    }


def _activations(config: TrainConfig, student: Sizes, teacher: Sizes | None, width: int) -> float:
    tokens = config.micro_batch_size * config.data.max_length
    layer = tokens * width * (10 * student.hidden + 4 * student.inner)
    kept = tokens * width * student.hidden * student.layers
    total = kept + layer if config.engine.activation_checkpointing else layer * student.layers
    for side in (student, teacher):
        if side is not None:
            head = _HEAD_ROWS * side.vocabulary * (4 + width)
            images = config.micro_batch_size * side.tokens_per_image * side.tower_hidden * width * 16
            total += head + tokens * side.hidden * width * 4 + images
    if teacher is not None:
        total += tokens * width * (10 * teacher.hidden + 4 * teacher.inner)
    return total


def traffic(config: TrainConfig, ranks: int, student: Sizes) -> float:
    """Bytes that one rank sends in an optimiser step, for gradients and gathered weights."""
    if ranks == 1:
        return 0.0
    kind = engine_kind(config, ranks)
    width = 2 if config.engine.precision == "bf16" else 4
    trained = student.trained
    share = (ranks - 1) / ranks
    if kind == "ddp":
        return 2 * share * 4 * trained
    if kind in ("zero1", "zero2"):
        return 2 * share * width * trained
    inside = trained + sum(student.parameters[p] for p in ("multi_modal_projector", "language_model"))
    inside -= sum(student.parameters[p] for p in config.trainable if p != "vision_tower")
    micros = accumulation(config, ranks)
    gradients = share * (4 if kind == "fsdp2" else width) * trained
    return 2 * micros * share * width * inside + gradients * (1 if kind == "fsdp2" else micros)


def accumulation(config: TrainConfig, ranks: int) -> int:
    """Micro-batches of one rank in an optimiser step."""
    return -(-config.global_batch_size // (ranks * config.micro_batch_size))


def refuse_too_large(found: Mapping[str, float], available: float) -> None:
    """ValueError if weights and optimiser alone are more than the device has: by how much, and what to do."""
    fixed = sum(size for what, size in found.items() if what not in ("activations", "gathered units"))
    if fixed <= available:
        return
    listed = ", ".join(f"{what} {size / GB:.2f} GB" for what, size in found.items() if size)
    raise ValueError(
        f"a rank needs {fixed / GB:.2f} GB before any activation and the device has {available / GB:.2f} GB: "
        f"{(fixed - available) / GB:.2f} GB too much ({listed}). Set engine.kind to fsdp2 or deepspeed, "
        "teacher.placement to fsdp or cpu_offload, teacher.dtype to bfloat16, or take a smaller teacher"
    )
