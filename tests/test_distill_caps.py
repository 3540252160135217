"""Every term with capped logits on either side: who reads logits reads capped ones, the others see no cap.

Shape legend: B rows, T tokens, V rows of a head.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_distill_matrix import CASES, Sides
from tiny_llava import make_tiny_llava
from torch import Tensor

import llava_kd
from llava_kd.distill.teaching.live import Teacher
from llava_kd.distill.terms import TERMS
from llava_kd.distill.terms.inner.exit_logits import ExitLogits
from llava_kd.models.files.checkpoint import load_stock
from llava_kd.models.mllm import MLLM, PARTS, Prediction

CAPS = {"student": 0.05, "teacher": 0.07}  # the logits of these tiny models are about as large
# Of every term: which sides' logits it reads.
LOGITS: dict[str, tuple[str, ...]] = {
    "cross_entropy": ("student",),
    "response_kl": ("student", "teacher"),
    "response_cross": ("student", "teacher"),
    "visual_kl": ("student", "teacher"),
    "relation": ("student", "teacher"),
    "text_relation": (),
    "response_dbild": ("student", "teacher"),
    "visual_switch": ("teacher",),
    "attention": (),
    "hint": (),
    "visual_hint": (),
    "visual_regions": ("student", "teacher"),
    "mi_alpha": (),
    "visual_mi_alpha": (),
    "exit_logits": ("teacher",),  # and the student's head, at its exits
    "visual_exit_logits": ("teacher",),
    "label_smoothing": ("student",),
    "mcmi": ("student",),
}
SILENT = ("relation tap=hidden", "relation tap=projector")  # a term that reads logits, where it is set not to
CHOOSES = ("visual_regions", "trust=")  # logits choose rows there: another cap need not choose others
MORE = {"exit_logits gamma=2": {"exit_logits": ExitLogits(gamma=2.0, form="code")}}
Seen = Callable[[Prediction], Prediction]


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Sides:
    root = tmp_path_factory.mktemp("caps")
    ours = make_tiny_llava(root / "s", hidden=32, layers=3, seed=4)
    theirs = make_tiny_llava(root / "t", hidden=48, layers=4, vocab_size=280, seed=3)
    student = MLLM(load_stock(str(ours)).stock, trainable=PARTS[1:])
    teacher = MLLM(load_stock(str(theirs)).stock)
    student.watch_attention(range(1, 2))
    teacher.watch_attention(range(1, 3))
    teacher.watch_answers(range(1, 3))
    return Sides(student=student, teacher=Teacher(teacher, shares_tower=False), is_resampled=False)


def capped(cap: float) -> Seen:
    return lambda said: replace(said, cap=cap)


def outside(cap: float) -> Seen:
    """The logits capped here, under a head that changes nothing."""

    def seen(said: Prediction) -> Prediction:
        logits_BTV = cap * torch.tanh(said.hidden_BTD @ said.head_VD.T / cap)
        return replace(said, hidden_BTD=logits_BTV, head_VD=torch.eye(logits_BTV.shape[2]))

    return seen


def run(sides: Sides, case: str, losses: str = "fast", **seen: Seen) -> dict[str, Tensor]:
    models = {"student": sides.student, "teacher": sides.teacher.mllm}
    with pytest.MonkeyPatch.context() as patch:
        for side, change in seen.items():
            read = models[side]._read
            patch.setattr(models[side], "_read", lambda *a, read=read, change=change: change(read(*a)))
        return sides.run({**CASES, **MORE}[case], losses, sides.batch({"images": 2}, {}))


def same(a: dict[str, Tensor], b: dict[str, Tensor], what: str) -> None:
    for name, want in b.items():
        error = (a[name] - want).norm() / want.norm().clamp_min(1e-4)
        assert float(error) < 1e-3, f"{what}: {name} {float(error)}"


def listed() -> Iterator[str]:
    for case, terms in CASES.items():
        if len(terms) == 1 and "map=never" not in case and "source=tower" not in case:
            yield case
    yield from MORE


@pytest.mark.parametrize("case", listed())
def test_a_term_reads_capped_logits_or_none(sides: Sides, case: str) -> None:
    assert LOGITS.keys() == TERMS.keys(), (
        "say of a new term whose logits it reads, and carry their caps to it"
    )
    term = case.split()[0]
    reads = () if case.startswith(SILENT) else LOGITS[term]
    plain = run(sides, case)
    for side, cap in CAPS.items():
        found = run(sides, case, **{side: capped(cap)})
        if side in reads:
            same(found, run(sides, case, **{side: outside(cap)}), f"{side}, fast")
            if not any(word in case for word in CHOOSES):
                assert abs(float(found["loss"] / plain["loss"]) - 1) > 1e-3, (
                    f"{side} is capped, and nothing moved"
                )
        elif "exit_logits" not in term:
            same(found, plain, f"{side}, which is not read")
    if reads:
        both = {side: capped(CAPS[side]) for side in CAPS}
        same(run(sides, case, **both), run(sides, case, "reference", **both), "fast and reference")


# They take a bias and no cap for a reason: both came before, both are kept, or no logit is made.
WITHOUT = {"diagnosis.py: _outer", "head_loss.py: by_chunk", "objective.py: touch", "top_k.py: __init__"}


def test_who_reads_a_bias_reads_the_cap_too() -> None:
    """A head is its weight, bias and cap: a place that takes the first two and not the third drops it."""
    found = set()
    for path in Path(llava_kd.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                read = {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
                if {"bias_V", "bias_U"} & read and "cap" not in read:
                    found.add(f"{path.name}: {node.name}")
    assert found == WITHOUT
