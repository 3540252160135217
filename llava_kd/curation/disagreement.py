"""Records by how far the student is from its teacher at the words of their answers.

DeltaPrompts (arXiv 2605.15532, its abstract was read): distillation can teach only where teacher and student
would answer otherwise, and most records of common data sets are "zero-delta". The paper compares the answers
that both write; here both read the answer of the data, and what each would say next is compared at each of
its n tokens, over the columns that both heads have:

    d = 1/n sum_t JSD(p_teacher(. | image, question, y_<t), p_student(same)),    0 <= d <= log 2

A record is equal where the likeliest token of both is the same all the way.

Shape legend: R records.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llava_kd.curation.score_files import Scored

EQUAL = 1e-6  # nats a token: what rounding leaves between two copies of a model


@dataclass(frozen=True, kw_only=True)
class Disagreement(Scored):
    """One record: the sum of the divergences over its answers' `tokens`, in nats.

    `other`: at how many of them the two would choose another token.
    """

    divergence: float
    other: int
    tokens: int

    def __post_init__(self) -> None:
        if not math.isfinite(self.divergence) or not 0 <= self.other <= self.tokens or self.tokens < 1:
            raise ValueError(
                f"record {self.id!r}: its divergence must be finite, over one token or more; got "
                f"{self.divergence} over {self.tokens}: a model computes invalid numbers here; try --dtype "
                "float32"
            )


@dataclass(frozen=True, kw_only=True)
class DisagreementRow:
    """A group in figures: means over its records. `equal`: the share of them in which both say the same."""

    name: str
    records: int
    bad: int
    kept: int
    divergence: float
    equal: float
    kept_divergence: float | None
    kept_equal: float | None


class Disagreements:
    """What is found of the records [R] of a choice by disagreement. One without is bad."""

    method = "disagreement of teacher and student, after arXiv 2605.15532"
    unit = "tokens"
    legend = (
        "Most valued: teacher and student predict different tokens. Least valued: they predict the same, and",
        "the student can learn nothing from the teacher.",
    )

    def __init__(self, found: Mapping[int, Disagreement], num_records: int) -> None:
        self._found = found
        self.score_R, self._is_equal_R = np.full((2, num_records), np.nan)
        for number, one in found.items():
            self.score_R[number] = one.divergence / one.tokens
            self._is_equal_R[number] = one.other == 0

    def line(self, number: int) -> dict[str, object]:
        """Of `scores.jsonl`."""
        one = self._found[number]
        return {"tokens": one.tokens, "other": one.other}

    def rows(self, is_kept_R: np.ndarray, groups: Sequence[str]) -> list[DisagreementRow]:
        """A row for each group, and one for all where there are several."""
        of_R, names = np.asarray(groups), list(dict.fromkeys(groups))
        rows = []
        for name in [*names, *(["all"] if len(names) > 1 else [])]:
            own = np.ones(len(of_R), bool) if name == "all" and name not in names else of_R == name
            scored = own & np.isfinite(self.score_R)
            stays = scored & is_kept_R
            rows.append(
                DisagreementRow(
                    name=name,
                    records=int(own.sum()),
                    bad=int(own.sum() - scored.sum()),
                    kept=int(stays.sum()),
                    divergence=float(self.score_R[scored].mean()),
                    equal=float(self._is_equal_R[scored].mean()),
                    kept_divergence=float(self.score_R[stays].mean()) if stays.any() else None,
                    kept_equal=float(self._is_equal_R[stays].mean()) if stays.any() else None,
                )
            )
        return rows

    def table(self, rows: Sequence[DisagreementRow]) -> str:
        """Markdown. Divergences are means a token."""
        lines = [
            "| group | records | bad | kept | divergence, nats a token | both say the same | divergence of "
            "the kept | of them the same |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for row in rows:
            stays = "" if row.kept_divergence is None else f"{row.kept_divergence:.3f}"
            same = "" if row.kept_equal is None else f"{row.kept_equal:.0%}"
            lines.append(
                f"| {row.name} | {row.records} | {row.bad} | {row.kept} | {row.divergence:.3f} | "
                f"{row.equal:.0%} | {stays} | {same} |"
            )
        return "\n".join(lines)

    def doubts(self, rows: Sequence[DisagreementRow]) -> list[str]:
        """Groups, named, of which more stays than the two disagree about.

        ValueError where they disagree about nothing.
        """
        groups = [row for row in rows if row.name != "all"] or list(rows)
        if all(row.divergence < EQUAL for row in groups):
            raise ValueError(
                "teacher and student predict the same for every record, so there is nothing to select by; is "
                "the student a copy of the teacher? Name another one with --with_teacher or --with_student"
            )
        return [
            f"{row.name}: {row.kept_equal:.0%} of the kept records have the same predictions on both sides; "
            "a smaller share (--keep) would leave them out"
            for row in groups
            if row.kept_equal
        ]

    def notes(self) -> list[str]:
        """Nothing: both read the same tokens."""
        return []
