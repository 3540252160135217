"""Adapters and weights in few bits, as the settings ask for them; and a student written without them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from llava_kd.assembly.parts.data import served
from llava_kd.assembly.parts.models import compute_dtype
from llava_kd.config import StudentConfig, TeacherConfig, TrainConfig
from llava_kd.models.files.checkpoint import Parts, save_stock
from llava_kd.models.lora import adapted_share, add_adapters, merge_adapters, try_merge
from llava_kd.models.quantize import check_quantization, quantize_linears


def check_bits(config: TrainConfig, device: torch.device) -> None:
    """ValueError where the device, or a missing package, does not let the settings be."""
    for one in (config.student, config.peer):
        if one is not None and one.quantize is not None:
            check_quantization(f"{one.where}.quantize", one.quantize, device)
    if config.teacher is not None and config.teacher.quantize is not None:
        check_quantization("teacher.quantize", config.teacher.quantize, device)


def adapt_student(
    student: Parts,
    config: StudentConfig,
    *,
    compute_dtype: torch.dtype,
    seed: int,
    say: Callable[[str], None],
) -> None:
    """Quantize the decoder and put adapters into it, where that is asked for and they can be merged again."""
    if (lora := config.lora) is not None:
        say(adapted_share(student.stock, lora.targets))
        try_merge(student.stock, rank=lora.rank, targets=lora.targets)
    if config.quantize is not None:
        layers = student.stock.model.language_model.layers
        quantize_linears(layers, config.quantize, compute_dtype=compute_dtype)
    if lora is not None:
        add_adapters(
            student.stock,
            rank=lora.rank,
            alpha=lora.alpha,
            dropout=lora.dropout,
            targets=lora.targets,
            seed=seed,
        )


def quantize_teacher(teacher: Parts, config: TeacherConfig, *, compute_dtype: torch.dtype) -> None:
    if config.quantize is not None:
        layers = teacher.stock.model.language_model.layers
        quantize_linears(layers, config.quantize, compute_dtype=compute_dtype)


def write_student(
    config: TrainConfig,
    student: Parts,
    weights: Mapping[str, Tensor],
    prefix: str,
    out: Path,
    *,
    complete: Callable[[Path], None] | None = None,
) -> Parts:
    """A stock directory of the student with these weights, whose names have this prefix; what was written.

    `complete` changes the directory while it still has another name.
    Adapters are merged; what terms bring stays behind. Raises OSError where it cannot be written.
    """
    trained = {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
    if config.student.lora is not None:
        trained = merge_adapters(student.stock, trained)
    finished = served(student, config.data)
    save_stock(finished, out, trained=trained, dtype=compute_dtype(config), complete=complete)
    return finished
