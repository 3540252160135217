"""The scores of a choice as lines that any tool opens, and the records at both ends for a look.

Shape legend: R records.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from llava_kd.curation.joined import Joined

_TEXT_SHOWN = 300


def score_lines(
    source: Joined,
    groups: Sequence[str],
    score_R: np.ndarray,
    is_kept_R: np.ndarray,
    told: Callable[[int], dict[str, object]],
) -> Iterator[bytes]:
    """A JSON object a record, in the order of the data; `told`: what else there is of one with a score."""
    for number, group in enumerate(groups):
        line: dict[str, object] = {
            "number": number,
            "id": source.record(number).id,
            "source": source.name_of(number),
            "group": group,
        }
        if np.isfinite(score_R[number]):
            line |= told(number)
            line |= {"score": float(score_R[number]), "kept": bool(is_kept_R[number])}
        else:
            line |= {"bad": True, "kept": False}
        yield json.dumps(line).encode() + b"\n"


def examples(
    source: Joined, score_R: np.ndarray, groups: Sequence[str], legend: Sequence[str], *, count: int
) -> str:
    """Markdown with the records of the highest and of the lowest scores; images by name."""
    order = np.argsort(-score_R, kind="stable")
    order = order[np.isfinite(score_R[order])]
    parts = ["# The most and the least valued records", "", *legend]
    for title, numbers in (("Most valued", order[:count]), ("Least valued", order[::-1][:count])):
        parts += ["", f"## {title}"]
        for number in numbers.tolist():
            record = source.record(number)
            parts += [
                "",
                f"**{score_R[number]:+.3f}** `{record.id}` ({groups[number]}) {' '.join(record.images)}",
                "",
            ]
            parts += [f"- {turn.role}: {_shown(turn.text)}" for turn in record.turns]
    return "\n".join(parts) + "\n"


def _shown(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _TEXT_SHOWN else f"{line[:_TEXT_SHOWN]}..."
