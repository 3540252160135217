"""Eight steps end in the same losses and weights however they are cut, and under whichever engine.

The data hold, at chosen steps, micro-batches of text alone and micro-batches without a target, on one rank
only: there an engine that waits for a gradient, or a mean taken per rank, would show.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file
from tiny_runs import write_stage

from llava_kd.data.plan import permutation

pytestmark = pytest.mark.distributed

STEPS, BATCH, SEED = 8, 8, 0
TERMS = ("loss", "cross_entropy", "response_kl", "visual_kl", "relation", "grad_norm")
STAGES = {
    "distilled projector": {"trainable": ("multi_modal_projector",)},
    "undistilled": {"distilled": False},
    "distilled": {},
}
ONE_RANK = {"1x4x2": ["--micro_batch_size=4"], "1x1x8": ["--micro_batch_size=1"]}
ENGINES = {
    "ddp, teacher spread": ["--engine.kind=ddp", "--teacher.placement=fsdp"],
    "ddp": ["--engine.kind=ddp"],
    "fsdp2": ["--engine.kind=fsdp2"],
    "zero1": ["--engine.kind=deepspeed", "--engine.zero_stage=1"],
    "zero2": ["--engine.kind=deepspeed", "--engine.zero_stage=2"],
    "zero3": ["--engine.kind=deepspeed", "--engine.zero_stage=3"],
}
CHEAP = {("distilled", engine) for engine in ("ddp", "ddp, teacher spread", "fsdp2", "zero2", "zero3")} | {
    ("distilled", "1x4x2")
}


def kind_of_place(place: int) -> str:
    """What stands at a place of the epoch; place p is read at step p // 8, on two ranks by rank p % 2."""
    step, rank, turn = place // BATCH, place % 2, place % BATCH // 2
    if step == 1 and rank == 1:
        return "text"  # no image on rank 1 in the whole step
    if step == 2 and rank == 0 and turn < 2:
        return "bad"  # no target in the first micro-batch of rank 0
    if step == 3 and rank == 1:
        return "bad"  # no target on rank 1 in the whole step
    if step == 4 and rank == 1:
        return "text" if turn < 2 else "bad"
    if step == 5:
        return "text"  # no image anywhere
    return "image"


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory, shapes_dir: Path) -> Path:
    """64 records, put so that the first epoch reads them as `kind_of_place` says."""
    source = json.loads((shapes_dir / "instructions.json").read_text())
    order = permutation(STEPS * BATCH, seed=SEED, epoch=0)
    entries: list[dict] = [{} for _ in order]
    for place, number in enumerate(order.tolist()):
        entry = {**source[place % len(source)], "id": f"{kind_of_place(place)}-{place}"}
        if kind_of_place(place) == "bad":
            entry["image"] = "images/missing.png"
        if kind_of_place(place) == "text":
            entry.pop("image")
            entry["conversations"] = [
                {**turn, "value": turn["value"].replace("<image>", "").strip()}
                for turn in entry["conversations"]
            ]
        entries[number] = entry
    path = tmp_path_factory.mktemp("records") / "records.json"
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory,
    records: Path,
    shapes_dir: Path,
    student_dir: Path,
    teacher_dir: Path,
) -> Callable[..., Path]:
    """Runs a stage once; `run(stage)` is one rank that takes the whole batch at once."""
    root = tmp_path_factory.mktemp("trajectories")

    def run_once(stage: str, name: str = "1x8", *overrides: str, count: int = 1) -> Path:
        output = root / f"{stage}-{name}".replace(" ", "_").replace(",", "")
        if not output.exists():
            config = write_stage(
                output,
                data=shapes_dir,
                student=student_dir,
                teacher=teacher_dir,
                engine="auto",
                global_batch_size=BATCH,
                micro_batch_size=BATCH if count == 1 else 2,
                max_steps=STEPS,
                **STAGES[stage],
            )
            changes = [
                f"--data.path={records}",
                "--data.max_bad_rate=1",
                f"--seed={SEED}",
                "--optim.eps=1e-5",
            ]
            ranks.train(config, output, *changes, *overrides, ranks=count)
        return output

    return run_once


def trajectory(output: Path) -> list[dict[str, float]]:
    logged = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in TERMS if name in line} for line in logged]


def assert_same(expected: Path, got: Path) -> None:
    assert len(trajectory(got)) == len(trajectory(expected)) == STEPS
    for step, (a, b) in enumerate(zip(trajectory(expected), trajectory(got), strict=True), start=1):
        assert b == pytest.approx(a, rel=1e-5, abs=1e-5), f"step {step}"
    weights = load_file(expected / "model" / "model.safetensors")
    for name, tensor in load_file(got / "model" / "model.safetensors").items():
        torch.testing.assert_close(
            tensor, weights[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def cases() -> list:
    every = [(stage, cut) for stage in STAGES for cut in (*ONE_RANK, *ENGINES)]
    every = [(stage, cut) for stage, cut in every if (stage, "teacher" in cut) != ("undistilled", True)]
    return [pytest.param(*case, marks=() if case in CHEAP else pytest.mark.slow) for case in every]


@pytest.mark.parametrize(("stage", "cut"), cases())
def test_losses_and_weights_do_not_depend_on_cut_or_engine(run, stage: str, cut: str) -> None:
    if cut.startswith("zero"):
        pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")
    whole = run(stage)
    assert_same(whole, run(stage, cut, *(ONE_RANK | ENGINES)[cut], count=1 if cut in ONE_RANK else 2))


def test_the_data_have_the_steps_that_break_engines(run) -> None:
    logged = [json.loads(line) for line in (run("distilled") / "metrics.jsonl").read_text().splitlines()]
    assert logged[5]["images"] == 0
    assert [line["bad_records"] for line in logged] == [0, 0, 2, 4, 2, 0, 0, 0]
    assert logged[5]["visual_kl"] == logged[5]["relation"] == 0
    assert logged[5]["cross_entropy"] > 0
