"""Published figures of small models on the ten benchmarks, to stand beside a user's own.

MME is the perception sum divided by 20. Rows without a note are from the main table of LLaVA-KD (ICCV 2025),
whose TinyLLaVA rows its authors retrained; Switch-KD's is from the README of haoyi199815/Switch-KD.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

AVG7 = ("gqa", "vizwiz", "scienceqa", "textvqa", "mme", "mmbench", "mmbench_cn")
AVG10 = ("vqav2", "gqa", "vizwiz", "scienceqa", "textvqa", "mme", "mmbench", "mmbench_cn", "pope", "mmmu")


@dataclass(frozen=True)
class PublishedRow:
    """One line of the table; averages are computed, not copied."""

    model: str
    data: str
    values: Mapping[str, float]


def average(values: Mapping[str, float], names: tuple[str, ...]) -> float | None:
    """Mean over the named benchmarks, or None where one of them is missing."""
    if any(name not in values for name in names):
        return None
    return sum(values[name] for name in names) / len(names)


def _row(model: str, data: str, figures: str) -> PublishedRow:
    """A row from its figures in the order of AVG10, "-" where none was published."""
    values = dict(zip(AVG10, figures.split(), strict=True))
    return PublishedRow(model, data, {name: float(text) for name, text in values.items() if text != "-"})


PUBLISHED = (
    _row("TinyLLaVA Qwen1.5-4B (teacher)", "1.2M", "79.9 63.4 46.3 72.9 59.0 69.3 67.9 67.1 85.2 38.9"),
    _row("TinyLLaVA Qwen2.5-3B (teacher)", "1.2M", "80.4 63.2 38.7 76.0 61.5 73.9 71.8 69.5 86.4 40.3"),
    _row("TinyLLaVA Qwen2.5-1.5B", "1.2M", "78.8 62.0 43.2 72.0 57.4 72.5 68.6 63.0 85.5 37.0"),
    _row("TinyLLaVA Qwen1.5-1.8B", "1.2M", "73.1 55.5 34.9 65.3 47.7 61.2 57.1 55.5 83.4 34.1"),
    _row("LLaVA-MoD Qwen1.5-1.8B", "5M", "- 58.7 39.2 68.0 58.5 66.7 66.3 61.9 87.0 -"),
    _row("LLaVA-KD Qwen1.5-1.8B", "1.2M", "79.0 62.3 44.7 64.7 53.4 69.1 64.0 63.7 86.3 33.6"),
    _row("LLaVA-KD Qwen2.5-1.5B", "1.2M", "80.3 62.5 46.0 71.6 59.7 70.0 71.0 66.6 86.7 35.8"),
    _row("TinyLLaVA Qwen1.5-0.5B", "1.2M", "73.9 57.4 24.9 60.9 47.4 59.8 55.0 52.4 83.7 31.6"),
    _row("TinyLLaVA Qwen2.5-0.5B", "1.2M", "74.8 58.3 28.9 59.1 49.2 61.5 58.9 54.2 86.1 33.6"),
    _row("LLaVA-MoD Qwen1.5-0.5B", "5M", "- 56.2 31.6 62.8 53.9 65.3 58.8 50.4 - -"),
    _row("LLaVA-KD Qwen1.5-0.5B", "1.2M", "77.0 59.6 35.9 60.6 49.9 64.5 60.1 55.5 85.9 30.2"),
    _row("LLaVA-KD Qwen2.5-0.5B", "1.2M", "77.7 59.8 41.5 60.6 52.0 64.7 61.3 57.0 86.4 28.3"),
    _row("Switch-KD Qwen2.5-0.5B", "1.2M", "79.6 61.6 44.9 57.9 52.3 66.8 63.5 57.8 87.3 29.8"),
)
