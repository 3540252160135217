"""Feedback: a student's own answers, scored by a judge, as pairs of a better and a worse one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llava_kd.curation.elicit.entries import Asked, Dropped, entry_of
from llava_kd.curation.elicit.making import Asking, Made, refused
from llava_kd.data.sources.conversation import Record, Turn
from llava_kd.evaluation.scorers.exact import normalise


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Different answers of a student to one question, by their ids. `record` is the talk up to it."""

    record: Record
    answers: Mapping[str, str]

    def entries(self) -> list[dict[str, object]]:
        """A LLaVA record for each answer, under its own id."""
        turns = self.record.turns
        return [
            entry_of(replace(self.record, id=name, turns=(*turns, Turn("assistant", text))), {})
            for name, text in self.answers.items()
        ]


def sampled(
    asking: Asking, asked: Sequence[Asked], out: Path, *, samples: int
) -> tuple[list[Candidates], list[Dropped]]:
    """What the student answers to the first question of each record, in so many draws; equal ones count once.

    A record with fewer than two different answers is dropped.
    """
    drawn: dict[str, dict[str, dict[str, str]]] = {}
    for k in range(samples):
        writing = replace(asking.writing, seed=asking.writing.seed * samples + k)
        first = [one.questions[0] for one in asked]
        drawn[f"~{k}"] = replace(asking, writing=writing).answers(first, out / f"answers{k}")
    found, dropped = [], []
    for one in asked:
        question = one.questions[0]
        texts: dict[str, tuple[str, str]] = {}
        for suffix, answers in drawn.items():
            answer = answers[question.id]
            if not refused(answer):
                texts.setdefault(normalise(answer["answer"]), (question.id + suffix, answer["answer"]))
        if len(texts) < 2:
            reason = f"{len(texts)} different answers in {samples} draws; a pair needs two"
            dropped.append(Dropped(id=one.record.id, reason=reason))
            continue
        stop = next(i for i, turn in enumerate(one.record.turns) if turn.role == "assistant")
        before = replace(one.record, turns=one.record.turns[:stop])
        found.append(Candidates(record=before, answers=dict(texts.values())))
    return found, dropped


def paired(
    candidates: Sequence[Candidates],
    scores: Mapping[str, float],
    *,
    margin: float,
    origin: Mapping[str, object],
) -> Made:
    """The answer that the judge scores highest against the one that it scores lowest.

    `scores` are mean log p a token, by the id of the candidate's record. A record is dropped whose two are
    less than `margin` apart, or of which the judge could not read one.
    """
    entries, dropped = [], []
    for one in candidates:
        if missing := [name for name in one.answers if name not in scores]:
            reason = f"the judge could not read {missing[0]!r}: bad_records.jsonl says why"
            dropped.append(Dropped(id=one.record.id, reason=reason))
            continue
        ranked = sorted(one.answers, key=lambda name: scores[name])
        worst, best = ranked[0], ranked[-1]
        if scores[best] - scores[worst] < margin:
            reason = f"the judge scores its answers within {scores[best] - scores[worst]:.3f} of each other"
            dropped.append(Dropped(id=one.record.id, reason=reason))
            continue
        pair = {
            "chosen": {"from": "gpt", "value": one.answers[best]},
            "rejected": {"from": "gpt", "value": one.answers[worst]},
            "scores": {"chosen": scores[best], "rejected": scores[worst]},
        }
        entries.append({**entry_of(one.record, origin), **pair})
    return Made(entries=entries, dropped=dropped)
