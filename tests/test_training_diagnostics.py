"""Diagnostics in a run: they change nothing, stand in the log where they are due, and warn by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from test_training_slices import lines
from test_training_trainer import OBJECTIVE, STEPS, Run, TinyLoader
from tiny_objectives import changed
from torch import Tensor

from llava_kd.cli import main
from llava_kd.distill.advice import STEPS as OFTEN
from llava_kd.distill.advice import Advice
from llava_kd.distill.terms.cross_entropy import CrossEntropy
from llava_kd.distill.terms.relation import Relation
from llava_kd.distill.terms.response_kl import ResponseKL
from llava_kd.distill.terms.seen import Seen
from llava_kd.distill.terms.term import Reads, Term

SMALL, SATURATED = "under 1% of the gradient", "saturated from the start"
TERMS = ("cross_entropy", "response_kl", "visual_kl", "relation")
TOKENS = (
    "student_nll",
    "student_entropy",
    "teacher_nll",
    "teacher_entropy",
    "top1_agreement",
    "teacher_better",
)
FIGURES = (
    {f"gradient/{t}" for t in TERMS}
    | {f"gradient_share/{t}" for t in TERMS}
    | {f"tokens/{t}" for t in TOKENS}
)


@dataclass(frozen=True, kw_only=True)
class Drawn(Term):
    """Draws random numbers, as a term with noise does."""

    @property
    def reads(self) -> Reads:
        return Reads(places=("response",))

    def total(self, seen: Seen) -> Tensor:
        student_ND = seen._student.hidden_BTD.flatten(0, 1)[seen.rows("response").student_N]
        return (student_ND * torch.rand_like(student_ND)).square().sum()


@pytest.fixture
def run(tmp_path: Path, student_dir: Path, teacher_dir: Path) -> Callable[..., Run]:
    def make(name: str, **fields: object) -> Run:
        return replace(Run(tmp_path / name, student_dir, teacher_dir), **fields)  # type: ignore[arg-type]

    return make


def diagnosed(run: Run) -> dict[int, dict[str, float]]:
    found = {int(line["step"]): {n: v for n, v in line.items() if "/" in n} for line in run.lines()}
    return {step: figures for step, figures in found.items() if figures}


def test_a_run_is_bit_for_bit_the_one_without(run: Callable[..., Run]) -> None:
    objective = changed(OBJECTIVE, drawn=Drawn(weight=0.1))
    ended = {}
    for every in (0, 1):
        one = ended[every] = run(f"every{every}", objective=objective, diagnose_every=every)
        one.fit()
    assert not diagnosed(ended[0])
    assert len(diagnosed(ended[1])) == STEPS
    weights = [one.weights() for one in ended.values()]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    for name in (*TERMS, "drawn", "loss", "grad_norm"):
        assert [line[name] for line in ended[0].lines()] == [line[name] for line in ended[1].lines()], name


def test_they_stand_in_the_log_at_the_first_step_at_each_of_theirs_and_at_the_last(
    run: Callable[..., Run],
) -> None:
    one = run("run", diagnose_every=2)
    one.trainer(TinyLoader(), log_every=100).fit()
    found = diagnosed(one)
    assert list(found) == [1, 2, 4, 5]
    for step, figures in found.items():
        assert figures.keys() == FIGURES
        assert sum(figures[f"gradient_share/{t}"] for t in TERMS) == pytest.approx(1)
        line = one.lines()[step - 1]
        assert figures["tokens/student_nll"] == pytest.approx(line["cross_entropy"], rel=1e-5)
        assert figures["tokens/teacher_nll"] == pytest.approx(line["teacher_cross_entropy"], rel=1e-5)


@pytest.mark.parametrize("sizes", [(4,), (1, 3)], ids=str)
def test_the_split_into_micro_batches_does_not_matter(
    run: Callable[..., Run], sizes: tuple[int, ...]
) -> None:
    whole, cut = (run(name, diagnose_every=1, steps=1) for name in ("whole", "cut"))
    whole.fit(TinyLoader(sizes=(2, 2)))
    cut.fit(TinyLoader(sizes=sizes))
    assert diagnosed(cut)[1] == pytest.approx(diagnosed(whole)[1], rel=1e-4, abs=1e-6)


def test_a_run_that_goes_on_has_the_figures_of_one_that_never_stopped(run: Callable[..., Run]) -> None:
    def stop(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    whole, stopped = (run(name, diagnose_every=2) for name in ("whole", "stopped"))
    whole.fit()
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(TinyLoader(before=stop))
    stopped.fit()
    assert diagnosed(stopped) == diagnosed(whole)


def test_terms_that_hardly_pull_and_terms_without_a_word_are_named_once(run: Callable[..., Run]) -> None:
    """The same model on both sides: relations are alike from the start. A KL of hardly any weight."""
    one = run("run", steps=OFTEN + 5, diagnose_every=20, save_every=1000)
    one.teacher_dir = one.student_dir
    one.objective = changed(OBJECTIVE, response_kl=ResponseKL(weight=1e-6), visual_kl=None)
    one.trainer(TinyLoader(sizes=(4,))).fit()
    assert len([line for line in one.said if line.startswith(f"response_kl is {SMALL} for 100 steps")]) == 1
    assert len([line for line in one.said if line.startswith(f"relation is {SATURATED}")]) == 1
    assert not any(line.startswith("cross_entropy is") for line in one.said)


def test_terms_that_pull_and_differ_are_not_accused(run: Callable[..., Run]) -> None:
    one = run("run", steps=OFTEN + 5, diagnose_every=20, save_every=1000)
    one.objective = changed(OBJECTIVE, relation=Relation(weight=5.0, centre=True))
    one.trainer(TinyLoader(sizes=(4,))).fit()
    assert len(diagnosed(one)) == 7
    assert not any(SMALL in line or SATURATED in line for line in one.said)


def figures(share: float, relation: float = 1.0) -> dict[str, Tensor]:
    return {"gradient_share/response_kl": torch.tensor(share), "relation": torch.tensor(relation)}


@pytest.fixture
def advice() -> Advice:
    return Advice({"cross_entropy": CrossEntropy(), "response_kl": ResponseKL(), "relation": Relation()})


def test_a_hundred_steps_in_a_row_are_needed(advice: Advice) -> None:
    steps = {1: 0.005, 50: 0.005, 99: 0.02, 100: 0.005, 150: 0.005, 198: 0.005}
    assert not [line for step, share in steps.items() for line in advice(step, figures(share))]
    (line,) = advice(199, figures(0.0025))
    assert line.startswith("response_kl is under 1% of the gradient for 100 steps, now 0.25% at step 199")
    assert not list(advice(400, figures(0.0025)))


def test_two_looks_are_needed_however_far_apart(advice: Advice) -> None:
    assert not list(advice(500, figures(0.001)))
    assert len(list(advice(1000, figures(0.001)))) == 1


@pytest.mark.parametrize(
    ("values", "is_said"),
    [
        ({10: 0.011, 50: 0.010, 100: 0.009}, True),  # what the authors' own runs show
        ({10: 0.011, 50: 0.007, 100: 0.005}, False),  # it moves
        ({10: 0.3, 50: 0.05, 100: 0.011}, False),  # it was learned
        ({10: 0.021, 50: 0.021, 100: 0.021}, False),
        ({60: 0.011, 80: 0.010, 100: 0.009}, False),  # the start was not seen: the run went on
    ],
    ids=str,
)
def test_what_saturated_means(advice: Advice, values: dict[int, float], is_said: bool) -> None:
    said = [line for step, value in values.items() for line in advice(step, figures(0.5, value))]
    assert len(said) == is_said
    if said:
        assert said[0].startswith(
            "relation is saturated from the start: 0.0110 at step 10 and 0.0090 at step"
        )
        assert "set `centre` to true" in said[0]


def test_a_process_that_goes_on_counts_anew() -> None:
    terms = {"cross_entropy": CrossEntropy(), "response_kl": ResponseKL()}
    before, after = Advice(terms), Advice(terms)
    assert not [line for step in (1, 50) for line in before(step, figures(0.001))]
    assert not [line for step in (100, 150) for line in after(step, figures(0.001))]
    assert len(list(after(200, figures(0.001)))) == 1


def test_a_single_term_is_the_whole_gradient_and_not_accused() -> None:
    alone = Advice({"cross_entropy": CrossEntropy()})
    nothing = {"gradient_share/cross_entropy": torch.tensor(0.0)}
    assert not [line for step in (1, 500) for line in alone(step, nothing)]


def test_the_setting_switches_them_off(stage) -> None:
    for every, expected in ((0, False), (50, True)):
        config = stage(f"every{every}", max_steps=2)
        assert main(["train", str(config), f"--log.diagnostics_every={every}"]) == 0
        logged = lines(config.with_suffix(""))
        assert [("gradient/relation" in line) for line in logged] == [expected, expected]
