"""Difference sampling: records by how much better a teacher predicts their answers than a small reference.

MiniPLM (arXiv 2410.17215): r = log p_teacher - log p_reference, each a mean over tokens; the top share is
kept, in the original order. As in the authors' code r is a difference, not the ratio that its README prints.
Here the means are over the answers alone, and the share may be taken inside each group of records.

Shape legend: R records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from llava_kd.curation.likelihoods import Likelihood

AS_GOOD = 0.5  # the reference predicts at least this share of the answers as well as the teacher does
DOUBTFUL = 0.6


@dataclass(frozen=True, kw_only=True)
class Share:
    """How many records of each group stay. `quotas` are other shares, by the name of a group.

    `pooled`: the best of all records together, whatever group they are of. Raises ValueError for a share
    that is not above 0 and at most 1.
    """

    keep: float
    quotas: Mapping[str, float] = field(default_factory=dict)
    pooled: bool = False

    def __post_init__(self) -> None:
        for name, share in {
            "--keep": self.keep,
            **{f"--quota {k}": v for k, v in self.quotas.items()},
        }.items():
            if not 0 < share <= 1:
                raise ValueError(f"{name} must be a share of the records, above 0 and at most 1; got {share}")
        if self.pooled and self.quotas:
            raise ValueError(
                "--pool takes the best of all groups together, --quota the best of each group; give only one "
                "of them"
            )


def check_quotas(groups: Sequence[str], share: Share) -> None:
    """ValueError for a quota of no group."""
    names = list(dict.fromkeys(groups))
    if unknown := sorted(set(share.quotas) - set(names)):
        raise ValueError(
            f"--quota must name groups that exist; got {unknown}; groups are {names}; --group decides what "
            "they are"
        )


def kept(score_R: np.ndarray, groups: Sequence[str], share: Share) -> np.ndarray:
    """Which records stay: of each group the share with the highest scores, one at least.

    A record without a score (NaN) is bad and never stays; equal scores stay in the order of the data. Raises
    ValueError for a quota of no group, and for a group without a score.
    """
    check_quotas(groups, share)
    names = list(dict.fromkeys(groups))
    of_R = np.asarray(groups)
    is_scored_R = np.isfinite(score_R)
    is_kept_R = np.zeros(len(score_R), dtype=bool)
    members = (
        {"all records": np.arange(len(score_R))}
        if share.pooled
        else {n: np.nonzero(of_R == n)[0] for n in names}
    )
    for name, numbers in members.items():
        scored = numbers[is_scored_R[numbers]]
        if not len(scored):
            raise ValueError(
                f"{name} has no record with a score: all {len(numbers)} are bad, and bad_records.jsonl says "
                "why; fix them, or leave that source out"
            )
        # A share of 0.29 of 100 records is 29, though 0.29 * 100 is a little less.
        count = max(1, int(share.quotas.get(name, share.keep) * len(scored) + 1e-9))
        best = np.argsort(-score_R[scored], kind="stable")[:count]
        is_kept_R[scored[best]] = True
    return is_kept_R


@dataclass(frozen=True, kw_only=True)
class GroupRow:
    """A group in figures: means over its records. `gap` is the mean score; `better`: of which share the
    teacher predicts the answers better than the reference does; `kept_score`: the mean score of what stays.
    """

    name: str
    records: int
    bad: int
    kept: int
    teacher: float
    reference: float
    gap: float
    better: float
    kept_score: float | None


class Differences:
    """What is found of the records [R] of a choice by difference: by tokens where `same_tokens` were read.

    Else by characters, and a record that the two read to different places has no score. Mean -log p of each
    model is NaN for a bad record.
    """

    method = "difference sampling, arXiv 2410.17215"
    legend = (
        "Most valued: the teacher knows the answer, the reference does not. Least valued: the reference",
        "finds the answer more likely than the teacher does, as with wrong answers.",
    )

    def __init__(
        self,
        teacher: Mapping[int, Likelihood],
        reference: Mapping[int, Likelihood],
        num_records: int,
        *,
        same_tokens: bool,
    ) -> None:
        self.unit = "tokens" if same_tokens else "characters"
        self._teacher, self.num_cut = teacher, 0
        self.teacher_R, self.reference_R = np.full((2, num_records), np.nan)
        for number in teacher.keys() & reference.keys():
            told, guessed = teacher[number], reference[number]
            if told.characters != guessed.characters:
                self.num_cut += 1  # cut off at different places by max_length: not about the same text
                continue
            self.teacher_R[number], self.reference_R[number] = told.mean(self.unit), guessed.mean(self.unit)
        self.score_R = self.reference_R - self.teacher_R

    def line(self, number: int) -> dict[str, object]:
        """Of `scores.jsonl`."""
        told = self._teacher[number]
        return {
            "tokens": told.tokens,
            "characters": told.characters,
            "teacher": float(self.teacher_R[number]),
            "reference": float(self.reference_R[number]),
        }

    def rows(self, is_kept_R: np.ndarray, groups: Sequence[str]) -> list[GroupRow]:
        return group_rows(self.teacher_R, self.reference_R, is_kept_R, groups)

    def table(self, rows: Sequence[GroupRow]) -> str:
        return table(rows, self.unit)

    def doubts(self, rows: Sequence[GroupRow]) -> list[str]:
        return doubts(rows)

    def notes(self) -> list[str]:
        """What a user should know of how the records were compared."""
        said = []
        if self.num_cut:
            said.append(
                f"{self.num_cut} records are cut off by data.max_length at different places for the two "
                "models and are counted as bad; raise data.max_length"
            )
        if self.unit == "characters":
            said.append("the models read different tokens: means are over the characters of the answers")
        return said


def group_rows(
    teacher_R: np.ndarray, reference_R: np.ndarray, is_kept_R: np.ndarray, groups: Sequence[str]
) -> list[GroupRow]:
    """A row for each group, and one for all where there are several. Inputs are mean -log p, NaN if bad."""
    of_R, names = np.asarray(groups), list(dict.fromkeys(groups))
    score_R = reference_R - teacher_R
    rows = []
    for name in [*names, *(["all"] if len(names) > 1 else [])]:
        own = np.ones(len(of_R), bool) if name == "all" and name not in names else of_R == name
        scored = own & np.isfinite(score_R)
        stays = scored & is_kept_R
        rows.append(
            GroupRow(
                name=name,
                records=int(own.sum()),
                bad=int(own.sum() - scored.sum()),
                kept=int(stays.sum()),
                teacher=float(teacher_R[scored].mean()),
                reference=float(reference_R[scored].mean()),
                gap=float(score_R[scored].mean()),
                better=float((score_R[scored] > 0).mean()),
                kept_score=float(score_R[stays].mean()) if stays.any() else None,
            )
        )
    return rows


def doubts(rows: Sequence[GroupRow]) -> list[str]:
    """Groups, named, in which the reference predicts about as many answers as well as the teacher does.

    Their scores are then mostly chance: choosing by them can do harm. Raises ValueError where that is so in
    every group.
    """
    groups = [row for row in rows if row.name != "all"] or list(rows)
    told = (
        "{0.name}: the teacher predicts {0.better:.0%} of the answers better than the reference does (gap "
        "{0.gap:+.3f})"
    )
    if all(row.better <= AS_GOOD for row in groups):
        listed = "; ".join(told.format(row) for row in groups)
        raise ValueError(
            f"the reference must be clearly worse than the teacher; it is as good in every group ({listed}). "
            "Take a smaller reference, or one trained on less, or a better teacher; where more than half of "
            "the answers are known to be wrong, add --any_reference"
        )
    return [
        f"{told.format(row)}: a selection there is mostly chance; use a smaller reference, or one trained on "
        "less"
        for row in groups
        if row.better <= DOUBTFUL
    ]


def table(rows: Sequence[GroupRow], unit: str) -> str:
    """Markdown. The figures are mean -log p a token, or a character."""
    lines = [
        f"| group | records | bad | kept | teacher, nats a {unit[:-1]} | reference | gap | teacher better | "
        "gap of the kept |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        stays = "" if row.kept_score is None else f"{row.kept_score:+.3f}"
        lines.append(
            f"| {row.name} | {row.records} | {row.bad} | {row.kept} | {row.teacher:.3f} | "
            f"{row.reference:.3f} | {row.gap:+.3f} | {row.better:.0%} | {stays} |"
        )
    return "\n".join(lines)
