"""What a run needs, from shapes alone: parameters of each part, memory of a rank, traffic of a step.

Weights, gradients and optimiser are counted; activations are an estimate of what a step keeps at its peak.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

from llava_kd.assembly.parts.models import wholly_trained
from llava_kd.assembly.parts.objective import terms_of
from llava_kd.config import LoraConfig, TeacherConfig, TrainConfig
from llava_kd.distill.terms.term import Term
from llava_kd.losses.kernels.gemm import HEAD_ROWS_AT_A_TIME
from llava_kd.losses.kernels.rows import CPU_CHUNK_BYTES, CUDA_MEMORY_SHARE, MAX_CHUNK_ROWS
from llava_kd.models.attention.visual import middle_layers
from llava_kd.models.foreign.reading import ForeignModel
from llava_kd.models.lora import chosen_layers, linear_layers
from llava_kd.models.projectors.kinds import llava_class
from llava_kd.models.reading import existing, read_config
from llava_kd.models.towers.vision_tower import text_config, tokens_per_image, vision_config
from llava_kd.models.trained import PREFIXES, trained_of
from llava_kd.parallel.engine import REDUCE_BUCKET

WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}
BYTES = {"4bit": 0.516, "8bit": 1.0}  # of a quantized weight and its share of the scales
GB = 1e9
MAPS_KEPT = 3  # times the size of a map of visual attention: it, its means over layers, what is left of them


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
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
    def of(stock: PreTrainedModel, config: TrainConfig | None = None) -> ModelSizes:
        """`config` is of the stage that trains it; None for a model that is only used."""
        if not isinstance(stock, LlavaForConditionalGeneration):
            return ModelSizes._of_foreign(stock)
        text, vision = text_config(stock.config), vision_config(stock.config)
        seen: set[int] = set()
        counts = {}
        trained, adapters = frozenset[str](), 0
        if config is not None:
            trained = trained_of(stock, wholly_trained(config), config.vision_tower_last_layers)
            adapters = _adapters(stock, config.student.lora)
        named = dict(stock.named_parameters(remove_duplicate=False))
        for part, prefixes in PREFIXES.items():
            owned = {id(p): p.numel() for name, p in named.items() if name.startswith(prefixes)}
            counts[part] = sum(number for key, number in owned.items() if key not in seen)
            seen |= owned.keys()
        counts["language_model"] += adapters
        layers = stock.model.language_model.layers
        return ModelSizes(
            parameters=counts,
            trained=adapters + sum({id(named[name]): named[name].numel() for name in trained}.values()),
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
    def _of_foreign(stock: PreTrainedModel) -> ModelSizes:
        """Of a teacher that is no LLaVA, of whose pictures no size is known before they are read."""
        model, text = ForeignModel(stock), stock.config.get_text_config()
        whole = sum(p.numel() for p in stock.parameters())
        language = {id(p): p.numel() for m in (model.decoder, model.head) for p in m.parameters()}
        linear = [m.weight.numel() for m in model.layers.modules() if isinstance(m, torch.nn.Linear)]
        return ModelSizes(
            parameters={
                "vision_tower": whole - sum(language.values()),
                "language_model": sum(language.values()),
            },
            trained=0,
            linear=sum(linear),
            largest_unit=max(sum(p.numel() for p in layer.parameters()) for layer in model.layers),
            layers=len(model.layers),
            hidden=model.head.weight.shape[1],
            inner=text.to_dict().get("intermediate_size") or 4 * model.head.weight.shape[1],
            vocabulary=model.head.weight.shape[0],
            tower_hidden=0,
            tower_layers=0,
            tokens_per_image=0,
        )

    @staticmethod
    def of_directory(name: str, stage: TrainConfig | None = None) -> ModelSizes:
        """From the configuration alone."""
        return ModelSizes.of(without_weights(name), stage)


def without_weights(name: str) -> LlavaForConditionalGeneration:
    """The modules that a LLaVA checkpoint is made of, on the device `meta`. ValueError for another model."""
    config = read_config(existing(name, "the LLaVA checkpoint"))
    if not isinstance(config, LlavaConfig):
        raise ValueError(f"{name} is a {config.model_type!r} model; a LLaVA checkpoint must be 'llava'")
    with torch.device("meta"):
        return llava_class(config)(config)


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


def memory(
    config: TrainConfig,
    ranks: int,
    student: ModelSizes,
    teacher: ModelSizes | None,
    others: Sequence[ModelSizes] = (),
) -> dict[str, float]:
    """Bytes on one rank, by what takes them. `others` are teachers beside the first."""
    bf16 = config.engine.precision == "bf16"
    width = 2 if bf16 else 4
    trained = student.trained
    frozen = sum(student.parameters.values()) - trained
    tower = 0 if "vision_tower" in config.trainable else student.parameters["vision_tower"]
    kind = engine_kind(config, ranks)
    found = _states(kind, ranks, trained, frozen - tower, tower, width, student)
    if kind in ("zero1", "zero2", "zero3"):
        found["gradients in transit"] = float(width * min(REDUCE_BUCKET, trained))
    if kind == "fsdp2" and accumulation(config, ranks) > 1:
        found["gradients"] = 4.0 * trained  # summed whole, exchanged once
    if config.student.quantize is not None:
        found["weights"] -= student.linear * (width - BYTES[config.student.quantize])
    if teacher is not None and config.teacher is not None and config.teacher.cache is not None:
        found["teacher"] = teacher.vocabulary * teacher.hidden * WIDTHS[config.teacher.dtype]
        teacher = None  # its head is all that is there
    if teacher is not None:
        assert config.teacher is not None
        held = [_frozen(config.teacher, ranks, one) for one in (teacher, *others)]
        found["teacher"] = sum(resident for resident, _ in held)
        found["gathered units"] += max(gathered for _, gathered in held)  # one teacher at a time
    is_autocast = bf16 and kind in ("single", "ddp")
    found["activations"] = _activations(config, student, teacher, width, is_autocast=is_autocast)
    tokens = config.micro_batch_size * config.data.max_length
    found["activations"] += sum(2 * tokens * one.hidden * width for one in others)  # their predictions
    return found


def together(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """Of two models that train side by side."""
    return {what: one.get(what, 0.0) + other.get(what, 0.0) for what in {**one, **other}}


def _frozen(settings: TeacherConfig, ranks: int, teacher: ModelSizes) -> tuple[float, float]:
    """Bytes of a live teacher that stay on a rank, and those of its layers that come and go."""
    width = WIDTHS[settings.dtype]
    spread = float(teacher.layers * teacher.largest_unit * width)
    resident, gathered = float(sum(teacher.parameters.values()) * width), 0.0
    if settings.quantize is not None:
        resident -= teacher.linear * (width - BYTES[settings.quantize])
    if settings.placement == "cpu_offload":
        return resident - spread, spread / teacher.layers
    if settings.placement == "fsdp":
        resident -= spread * (ranks - 1) / ranks
        gathered = 2 * spread / teacher.layers * (ranks > 1)
    return resident, gathered


def _states(
    kind: str, ranks: int, trained: int, frozen: int, tower: int, width: int, student: ModelSizes
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


def _activations(
    config: TrainConfig, student: ModelSizes, teacher: ModelSizes | None, width: int, *, is_autocast: bool
) -> float:
    """The most of what one moment holds: the tower, the teacher's forward, or the student's graph."""
    rows, tokens = config.micro_batch_size, config.micro_batch_size * config.data.max_length
    sides = [side for side in (student, teacher) if side is not None]
    tower = rows * max(side.tokens_per_image * side.tower_hidden for side in sides) * width
    around = tokens * student.hidden * 6 * width + 2 * tower  # embeddings, projector, last norm, loss rows
    if teacher is not None:
        around += 2 * tokens * teacher.hidden * width  # its prediction, and the rows of it
    backward = 3 * tokens * width * (student.hidden + student.inner)
    is_trained = "language_model" in config.trainable
    layer = _layer(student, tokens, width, is_trained=is_trained)
    kept = student.layers * layer
    if config.engine.activation_checkpointing:
        # A layer is computed again in the backward. Autocast leaves what runs between layers in fp32.
        kept = student.layers * tokens * student.hidden * (4 if is_autocast and is_trained else width)
        backward += layer
    kept += memory_of_terms(
        terms_of(config.objective),
        student,
        teacher,
        rows=rows,
        tokens=tokens,
        teacher_width=4 if config.teacher is None else WIDTHS[config.teacher.dtype],
    )
    # The buffers of the head are free when the backward comes to the layers.
    graph = kept + around + max(_head(config, student, teacher, tokens, width), backward)
    forward = 0.0 if teacher is None else tokens * width * (8 * teacher.hidden + 3 * teacher.inner)
    return max(graph, around + forward, 16.0 * tower)


def memory_of_terms(
    terms: Mapping[str, Term],
    student: ModelSizes,
    teacher: ModelSizes | None,
    *,
    rows: int,
    tokens: int,
    teacher_width: int = 4,
) -> float:
    """Bytes that terms keep for the backward beside rows of the head, of so many rows with one image each.

    `tokens`: places of all rows; `teacher_width`: bytes of a number of the teacher.
    """
    found, reads = 0.0, [term.reads for term in terms.values()]
    if teacher is None:
        return found
    if any(read.switched for read in reads):  # the graph of its second pass
        found += teacher.layers * _layer(teacher, tokens, teacher_width, is_trained=False)
        found += 2 * tokens * teacher.hidden * teacher_width
    if shares := next((read.attention for read in reads if read.attention), None):
        for side, copies in ((student, MAPS_KEPT), (teacher, 1)):
            map_bytes = 4 * rows * side.tokens_per_image**2
            found += copies * map_bytes * len(middle_layers(side.layers, *shares))
    return found


def _layer(student: ModelSizes, tokens: int, width: int, *, is_trained: bool) -> float:
    """Bytes that a decoder layer keeps for its backward. Norms compute in fp32 whatever the width is.

    Frozen products keep no input.
    """
    if is_trained:
        return tokens * ((40 if width == 4 else 26) * student.hidden + 4 * width * student.inner)
    return tokens * ((22 if width == 4 else 14) * student.hidden + 3 * width * student.inner)


def _head(
    config: TrainConfig, student: ModelSizes, teacher: ModelSizes | None, tokens: int, width: int
) -> float:
    """Logits of a chunk on both sides, their gradient, and that of the head's weight before it is added."""
    logits = 4 * (student.vocabulary + (0 if teacher is None else teacher.vocabulary))
    if config.engine.device == "cpu":
        most = CPU_CHUNK_BYTES
    else:
        device = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 80 * GB
        most = device * CUDA_MEMORY_SHARE
    rows = min(tokens, MAX_CHUNK_ROWS, int(most / logits))
    extra = 0  # of 16-bit operands: on a GPU the gradient apart from the logits, on a CPU a block widened
    if width == 2:
        largest = max(logits // 4 - student.vocabulary, student.vocabulary)
        extra = (
            4 * min(largest, HEAD_ROWS_AT_A_TIME) if config.engine.device == "cpu" else 2 * student.vocabulary
        )
    weight = 4.0 * student.vocabulary * student.hidden if "language_model" in config.trainable else 0.0
    return rows * (logits + extra) + weight


def traffic(config: TrainConfig, ranks: int, student: ModelSizes, teacher: ModelSizes | None = None) -> float:
    """Bytes that one rank sends in an optimiser step, for gradients and gathered weights."""
    if ranks == 1:
        return 0.0
    return _students_traffic(config, ranks, student) + _teachers_traffic(config, ranks, teacher)


def _teachers_traffic(config: TrainConfig, ranks: int, teacher: ModelSizes | None) -> float:
    """Layers that are spread over the ranks are gathered once for each micro-batch."""
    settings = config.teacher
    if teacher is None or settings is None or settings.placement != "fsdp" or settings.cache is not None:
        return 0.0
    spread = teacher.layers * teacher.largest_unit * WIDTHS[settings.dtype]
    return accumulation(config, ranks) * (ranks - 1) / ranks * spread


def _students_traffic(config: TrainConfig, ranks: int, student: ModelSizes) -> float:
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
        f"a rank needs {fixed / GB:.2f} GB before any activation, but the device has {available / GB:.2f} "
        f"GB: {(fixed - available) / GB:.2f} GB too much ({listed}). Set engine.kind to fsdp2 or "
        "deepspeed, teacher.placement to fsdp or cpu_offload, teacher.dtype to bfloat16, or use a smaller "
        "teacher"
    )
