"""Verify before anybody learns it: rounds of writing, checking, correcting and writing on.

After KD-CoT (Wang et al., arXiv 2308.13259), where a verifier holds each answer of a chain of thought against
what was retrieved, and the rest of the chain is written anew behind the corrected one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from llava_kd.curation.elicit.entries import Asked, Dropped
from llava_kd.curation.elicit.making import Made, refused
from llava_kd.curation.rationale.evidence import Checked, Checks
from llava_kd.curation.rationale.steps import ANSWER, Step, begun_with, malformed, steps_of, text_of
from llava_kd.evaluation.generation.questions import Question
from llava_kd.evaluation.scorers.exact import is_correct

Answers = Mapping[str, Mapping[str, str]]  # by question id
PROMPT = (
    "Answer step by step: one short fact a line, then a last line that begins with 'Answer:' and says no "
    "more than the answer."
)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """`rounds`: how often what follows a wrong step is written anew at most; at 0 that drops the record.

    `unread`: what becomes of a step that no evidence can read; `drops` the record or is kept, and counted.
    With `true_answers` the answer must be the record's own, where it has one. `answer` begins the last line.
    """

    rounds: int = 3
    unread: Literal["keep", "drop"] = "keep"
    true_answers: bool = False
    answer: str = ANSWER
    prompt: str = PROMPT

    def __post_init__(self) -> None:
        if not 0 <= self.rounds <= 20:
            raise ValueError(f"rounds must lie from 0 (wrong steps drop the record) to 20; got {self.rounds}")
        if not self.answer.strip():
            raise ValueError("the word that the answer's line begins with must not be empty")


@dataclass(kw_only=True)
class Draft:
    """A record under way. Its `steps` are checked, and corrected where they were wrong; `num_unread` of them,
    the answer aside, no evidence can read.
    """

    asked: Asked
    question: Question
    steps: list[Step] = field(default_factory=list)
    corrections: list[dict[str, object]] = field(default_factory=list)
    num_read: int = 0
    num_unread: int = 0
    rounds: int = 0
    goes_on: bool = False  # whether what is written next stands on the last step's line

    def begun(self) -> Question:
        """The question of this round; the answer goes on behind the checked steps."""
        if not self.rounds:
            return self.question
        begun = begun_with(self.steps, last_goes_on=self.goes_on)
        return replace(self.question, id=f"{self.question.id}~{self.rounds}", begun=begun)


def rationales(
    answers: Callable[[Sequence[Question], int], Answers],
    asked: Sequence[Asked],
    checks: Checks,
    rules: Rules,
    *,
    is_greedy: bool,
    origin: Mapping[str, object],
) -> Made:
    """The records whose stepwise answer is verified, the last question of each.

    `answers` writes to the questions of a round, each once.
    """
    done: dict[str, Draft] = {}
    dropped: list[Dropped] = []
    under_way = []
    for one in asked:
        if checks.about(one.record) is None:
            dropped.append(Dropped(id=one.record.id, reason="no evidence is about it"))
            continue
        under_way.append(_first(one, rules))
    for number in range(rules.rounds + 1):
        if not under_way:
            break
        written = answers([draft.begun() for draft in under_way], number)
        going_on = []
        for draft in under_way:
            state = _read(draft, written[draft.begun().id], checks, rules, is_greedy=is_greedy)
            if state == "again":
                draft.rounds += 1
                going_on.append(draft)
            elif state:
                dropped.append(Dropped(id=draft.asked.record.id, reason=state))
            else:
                done[draft.asked.record.id] = draft
        under_way = going_on
    finished = [done[one.record.id] for one in asked if one.record.id in done]
    return Made(entries=[_entry(draft, rules, origin) for draft in finished], dropped=dropped)


def _first(one: Asked, rules: Rules) -> Draft:
    question = one.questions[-1]
    text = f"{question.text}\n{rules.prompt}" if rules.prompt else question.text
    return Draft(asked=one, question=replace(question, text=text))


def _read(draft: Draft, answer: Mapping[str, str], checks: Checks, rules: Rules, *, is_greedy: bool) -> str:
    """Take what was written into the draft: nothing where it is finished, "again", or why it is dropped."""
    if reason := refused(answer):
        return reason
    new = steps_of(answer["answer"], answer=rules.answer)
    if new and draft.steps and draft.goes_on and not (new[0].is_answer or new[0].mark):
        new[0] = replace(new[0], before=" ")
    if reason := malformed([*draft.steps, *new], answer=rules.answer):
        return reason
    check = checks.about(draft.asked.record)
    assert check is not None
    for k, step in enumerate(new):
        found = check(step.claim)
        if found is None:
            if rules.unread == "drop" and not step.is_answer:
                return f"no evidence can check its step {len(draft.steps) + 1}: {step.claim[:80]!r}"
            draft.num_unread += not step.is_answer
        elif found.verdict.holds:
            draft.num_read += 1
        else:
            correction = _holding(found.verdict.correction, check)
            next_steps = new[k + 1 :] if correction else new[k:]
            draft.goes_on = bool(next_steps) and next_steps[0].before == " "
            return _corrected(draft, step, found, rules, correction=correction, is_greedy=is_greedy)
        draft.steps.append(step)
    return _finished(draft, rules)


def _holding(correction: str, check: Callable[[str], Checked | None]) -> str:
    """A correction, where the evidence as a whole holds it to be true."""
    again = check(correction) if correction else None
    return correction if again is not None and again.verdict.holds else ""


def _corrected(
    draft: Draft, step: Step, found: Checked, rules: Rules, *, correction: str, is_greedy: bool
) -> str:
    """Mend a wrong step, or leave it out, and forget all that was written after it."""
    wrong = f"step {len(draft.steps) + 1} is wrong: {step.claim[:80]!r}, and {found.verdict.fact[:80]}"
    if draft.rounds == rules.rounds:
        return f"after {draft.rounds} rounds {wrong}" if draft.rounds else wrong
    if not correction and is_greedy:
        return f"{wrong}; no evidence corrects it, and greedy writing repeats it"
    told = {"step": len(draft.steps) + 1, "round": draft.rounds + 1, "was": step.claim, "by": found.by}
    draft.corrections.append({**told, "fact": found.verdict.fact[:200], "became": correction or None})
    if not correction:
        return "again"
    draft.steps.append(step.saying(correction))
    draft.num_read += 1
    if not step.is_answer:
        return "again"
    draft.rounds += 1
    return _finished(draft, rules)


def _finished(draft: Draft, rules: Rules) -> str:
    if not draft.num_read:
        return f"no evidence can check any of its {len(draft.steps) - 1} steps"
    answer, truth = draft.steps[-1].claim, draft.question.truth
    if rules.true_answers and not draft.asked.is_open and not is_correct(answer, truth):
        return f"its answer is {answer[:80]!r}, and that of the data is {truth[:80]!r}"
    return ""


def _entry(draft: Draft, rules: Rules, origin: Mapping[str, object]) -> dict[str, object]:
    told = {
        "rounds": draft.rounds,
        "steps": len(draft.steps) - 1,
        "verified": draft.num_read,
        "unverified": draft.num_unread,
        "corrections": draft.corrections,
    }
    asked = draft.asked.asking(draft.question.text)
    return asked.entry([text_of(draft.steps)], {**origin, "prompt": draft.question.text, **told})
