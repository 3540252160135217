"""Checkpoints of other layouts in, stock checkpoints out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava_kd.build.models import DTYPES
from llava_kd.data.template_table import TEMPLATES
from llava_kd.models.checkpoint import save_stock
from llava_kd.models.convert import convert
from llava_kd.models.export import export


def convert_to(source: str, out: str, *, vision_tower: str | None = None) -> None:
    """Write the stock form of `source` into a new `out`, with a chat template if it has none."""
    if Path(out).exists():
        raise ValueError(f"{out} exists; give a new directory")
    parts = convert(source, vision_tower=vision_tower)
    if parts.processor.chat_template is None:
        parts.processor.chat_template = TEMPLATES["vicuna"].chat_template
        parts.processor.tokenizer.chat_template = TEMPLATES["vicuna"].chat_template
    save_stock(parts, out)


def export_to(source: str, out: str, *, dtype: str | None, scores: Sequence[str]) -> list[str]:
    """Notes on other tools; see `export`."""
    return export(source, out, dtype=None if dtype is None else DTYPES[dtype], scores=scores)
