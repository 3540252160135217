"""Eight steps end in the same losses and weights however they are cut, and under whichever engine.

The data hold, at chosen steps, micro-batches of text alone and micro-batches without a target, on one rank
only: there an engine that waits for a gradient, or a mean taken per rank, would show. Packed runs are held
to the same records on rows of their own.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file
from tiny_runs import write_stage

from llava_kd.assembly.parts.data import side
from llava_kd.config import DataConfig
from llava_kd.data.batches.lengths import record_sizes
from llava_kd.data.batches.packing import Packing
from llava_kd.data.batches.plan import Plan
from llava_kd.data.sources.llava_json import LlavaJson
from llava_kd.models.files.checkpoint import load_stock

pytestmark = pytest.mark.distributed

STEPS, BATCH, SEED, MAX_LENGTH, PACK_TOKENS = 8, 8, 0, 352, 704
TERMS = ("loss", "cross_entropy", "response_kl", "visual_kl", "relation", "grad_norm")
STAGES = {
    "distilled projector": {"trainable": ("multi_modal_projector",)},
    "undistilled": {"distilled": False},
    "distilled": {},
}
ONE_RANK = {"1x4x2": ["--micro_batch_size=4"], "1x1x8": ["--micro_batch_size=1"]}
ENGINES = {
    "ddp, teacher spread": ["--engine.kind=ddp", "--teacher.placement=fsdp"],
    **ranks.ENGINES,
}
LAYOUTS = {
    "padded": [],
    "packed": [f"--data.packing.max_tokens={PACK_TOKENS}", f"--data.packing.packs_per_step={BATCH}"],
}
RECORDS = {"padded": STEPS * BATCH, "packed": 3 * STEPS * BATCH}
SPREAD = ("ddp", "ddp, teacher spread", "fsdp2", "zero2", "zero3", "1x4x2")
CHEAP = {("padded", "distilled", cut) for cut in SPREAD} | {
    ("packed", "distilled", cut) for cut in ("1x1x8", "fsdp2")
}
SIXTEEN_TOKENS = "in place of this"  # as many byte-level tokens as an image takes


def kind_of_row(step: int, rank: int, turn: int) -> str:
    """What the row has that one of two ranks reads as number `turn` of a step."""
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


def make_kind(entry: dict, kind: str) -> None:
    """A record of the same number of tokens, so that it is packed as before."""
    if kind == "bad":
        entry["image"] = "images/missing.png"
    if kind == "text":
        entry.pop("image")
        for turn in entry["conversations"]:
            turn["value"] = turn["value"].replace("<image>", SIXTEEN_TOKENS)


@pytest.fixture(scope="module")
def records(
    tmp_path_factory: pytest.TempPathFactory, shapes_dir: Path, student_dir: Path
) -> Callable[[str], Path]:
    """Records for a layout, put so that two ranks read rows as `kind_of_row` says."""
    source = json.loads((shapes_dir / "instructions.json").read_text())
    reader = side(load_stock(str(student_dir)), DataConfig(path="", template="vicuna", max_length=MAX_LENGTH))
    root = tmp_path_factory.mktemp("records")

    def write(layout: str) -> Path:
        path = root / f"{layout}.json"
        if path.exists():
            return path
        entries = [json.loads(json.dumps(source[i % len(source)])) for i in range(RECORDS[layout])]
        path.write_text(json.dumps(entries))
        before = record_sizes(LlavaJson(path, shapes_dir), (reader,))
        packing = Packing(max_tokens=PACK_TOKENS, packs_per_step=BATCH) if layout == "packed" else None
        plan = Plan(
            num_records=len(entries),
            seed=SEED,
            global_batch_size=BATCH,
            world_size=2,
            packing=packing,
            sizes=before if packing else None,
        )
        for step, rank in itertools.product(range(STEPS), range(2)):
            for turn, row in enumerate(plan.rows(step, rank)):
                for i in row:
                    make_kind(entries[i], kind_of_row(step, rank, turn))
        for i, entry in enumerate(entries):
            entry["id"] = str(i)
        path.write_text(json.dumps(entries))
        after = record_sizes(LlavaJson(path, shapes_dir), (reader,))
        assert after.tokens.tolist() == before.tokens.tolist()
        return path

    return write


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory,
    records: Callable[[str], Path],
    shapes_dir: Path,
    student_dir: Path,
    teacher_dir: Path,
) -> Callable[..., Path]:
    """Runs a stage once; `run(layout, stage)` is one rank, the whole batch at once, a record a row."""
    root = tmp_path_factory.mktemp("trajectories")

    def run_once(layout: str, stage: str, name: str = "1x8", *overrides: str, count: int = 1) -> Path:
        output = root / f"{layout}-{stage}-{name}".replace(" ", "_").replace(",", "")
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
                f"--data.path={records(layout)}",
                "--data.max_bad_rate=1",
                f"--data.max_length={MAX_LENGTH}",
                f"--seed={SEED}",
                "--optim.eps=1e-5",
                *LAYOUTS[layout],
            ]
            environment = {"ONE_RECORD_PER_ROW": "1"} if name == "1x8" else {}
            ranks.train(config, output, *changes, *overrides, ranks=count, environment=environment)
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
    cuts = (*ONE_RANK, *ENGINES)
    every = [(layout, stage, cut) for layout in LAYOUTS for stage in STAGES for cut in cuts]
    every = [case for case in every if case[1] != "undistilled" or "teacher" not in case[2]]
    return [pytest.param(*case, marks=() if case in CHEAP else pytest.mark.slow) for case in every]


@pytest.mark.parametrize(("layout", "stage", "cut"), cases())
def test_losses_and_weights_do_not_depend_on_cut_or_engine(run, layout: str, stage: str, cut: str) -> None:
    if cut.startswith("zero"):
        pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")
    whole = run(layout, stage)
    assert_same(whole, run(layout, stage, cut, *(ONE_RANK | ENGINES)[cut], count=1 if cut in ONE_RANK else 2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_data_have_the_steps_that_break_engines(run, layout: str) -> None:
    logged = [
        json.loads(line) for line in (run(layout, "distilled") / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["images"] == 0 for line in logged] == [step == 5 for step in range(STEPS)]
    assert logged[5]["visual_kl"] == logged[5]["relation"] == 0
    assert logged[5]["cross_entropy"] > 0
    bad = [line["bad_records"] for line in logged]
    if layout == "padded":
        assert bad == [0, 0, 2, 4, 2, 0, 0, 0]
    else:  # rows of several records
        assert [number > 0 for number in bad] == [False, False, True, True, True, False, False, False]
        assert sum(line["records"] for line in logged) > 2 * STEPS * BATCH
