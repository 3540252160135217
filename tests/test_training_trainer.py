"""The loop on a tiny distilled stage: splits, stops, resumes and bad numbers.

Shape legend: C channels and other sizes as in `llava_kd.batch`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_batches import inputs, record
from tiny_objectives import objective_of
from torch import Tensor

from llava_kd.batch import Batch
from llava_kd.cli import main
from llava_kd.distill.objective import Objective
from llava_kd.distill.student import Student
from llava_kd.distill.teaching.door import Teaching
from llava_kd.distill.teaching.from_teacher import FromTeacher
from llava_kd.distill.teaching.live import Teacher
from llava_kd.distill.terms.cross_entropy import CrossEntropy
from llava_kd.distill.terms.relation import Relation
from llava_kd.distill.terms.response_kl import ResponseKL
from llava_kd.distill.terms.visual_kl import VisualKL
from llava_kd.models.files.checkpoint import load_stock
from llava_kd.models.mllm import MLLM
from llava_kd.parallel.engine import AdamWSettings, ParameterGroup
from llava_kd.parallel.torch_engine import TorchEngine
from llava_kd.parallel.world import World
from llava_kd.training.checkpoint import Checkpoints
from llava_kd.training.metrics import Metrics
from llava_kd.training.schedule import Cadence, Schedule, cosine_with_warmup
from llava_kd.training.stopping import StopRequest
from llava_kd.training.trainer import Output, Trainer

STEPS = 5
OBJECTIVE = objective_of(
    cross_entropy=CrossEntropy(),
    response_kl=ResponseKL(),
    visual_kl=VisualKL(),
    relation=Relation(),
    num_common=260,
)


@dataclass
class TinyLoader:
    """Four records a step, cut as `sizes` says; `before` is called with each step's number."""

    sizes: tuple[int, ...] = (2, 2)
    before: Callable[[int], None] = lambda _: None
    spoil: Callable[[int, Batch], Batch] = lambda _, batch: batch

    def batches(self, first_step: int, last_step: int) -> Iterator[list[Batch]]:
        for step in range(first_step, last_step):
            self.before(step)
            names = [f"s{step}r{i}" for i in range(4)]
            records = [record(10 * step + i, images=(1, 0, 2, 1)[i], answer=3 + i) for i in range(4)]
            group, start = [], 0
            for size in self.sizes:
                stop = start + size
                batch = Batch(student=inputs(*records[start:stop]), record_ids=tuple(names[start:stop]))
                group.append(self.spoil(step, batch))
                start = stop
            yield group

    def telemetry(self) -> dict[str, float]:
        return {}


@dataclass
class Run:
    """A stage of STEPS updates in `directory`; every call of `fit` is a new process as far as it can tell."""

    directory: Path
    student_dir: Path
    teacher_dir: Path
    trainable: tuple[str, ...] = ("multi_modal_projector", "language_model")
    save_every: int = 2
    objective: Objective = OBJECTIVE
    teaching: Callable[[Teacher], Teaching] = FromTeacher
    steps: int = STEPS
    diagnose_every: int = 0
    said: list[str] = field(default_factory=list)

    def trainer(self, loader: TinyLoader, *, log_every: int = 10) -> Trainer:
        mllm = MLLM(load_stock(str(self.student_dir)).stock, trainable=self.trainable)
        self.mllm = mllm
        self.teacher = Teacher(MLLM(load_stock(str(self.teacher_dir)).stock), shares_tower=True)
        self.student = Student(mllm, self.objective, self.teaching(self.teacher)).train()
        names = tuple(name for name, p in self.student.named_parameters() if p.requires_grad)
        self.engine = TorchEngine(
            self.student,
            [ParameterGroup(names=names, lr=1e-3)],
            world=World(rank=0, size=1, device=torch.device("cpu")),
            kind="single",
            adamw=AdamWSettings(),
            bf16=False,
        )
        self.directory.mkdir(exist_ok=True)
        return Trainer(
            engine=self.engine,
            student=self.student,
            loader=loader,
            schedule=Schedule(
                num_steps=self.steps,
                base_lr=1e-3,
                lr_multiplier=lambda step: cosine_with_warmup(step, num_steps=self.steps, warmup_ratio=0.2),
            ),
            cadence=Cadence(
                save_every=self.save_every, log_every=log_every, diagnose_every=self.diagnose_every
            ),
            output=Output(
                checkpoints=Checkpoints(self.directory / "checkpoints", keep=2),
                metrics=Metrics(self.directory, num_steps=self.steps, every=1),
                say=self.said.append,
            ),
        )

    def fit(self, loader: TinyLoader | None = None) -> str | None:
        return self.trainer(loader or TinyLoader()).fit()

    def weights(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.engine.parameters().items()}

    def lines(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.directory / "metrics.jsonl").read_text().splitlines()]

    def steps_on_disk(self) -> list[int]:
        return Checkpoints(self.directory / "checkpoints", keep=2).steps()


@pytest.fixture
def run(tmp_path: Path, student_dir: Path, teacher_dir: Path) -> Run:
    return Run(tmp_path / "run", student_dir, teacher_dir)


@pytest.fixture
def undisturbed(tmp_path: Path, student_dir: Path, teacher_dir: Path) -> Run:
    whole = Run(tmp_path / "whole", student_dir, teacher_dir)
    assert whole.fit() is None
    return whole


def assert_ends_like(run: Run, other: Run) -> None:
    """Bit for bit, and no step missing from the log or in it twice."""
    expected, got = other.weights(), run.weights()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert [line["step"] for line in run.lines()] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in run.lines()] == [line["loss"] for line in other.lines()]


@pytest.mark.parametrize("sizes", [(4,), (1, 3), (1, 1, 1, 1)], ids=str)
def test_weights_after_a_run_do_not_depend_on_the_split(
    run: Run, undisturbed: Run, sizes: tuple[int, ...]
) -> None:
    run.fit(TinyLoader(sizes=sizes))
    for a, b in zip(run.lines(), undisturbed.lines(), strict=True):
        for name in ("loss", "cross_entropy", "response_kl", "visual_kl", "relation", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), name
    expected = undisturbed.weights()
    for name, value in run.weights().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=2e-5)


def test_only_the_trained_parts_move_and_only_they_are_saved(run: Run) -> None:
    run.trainable = ("multi_modal_projector",)
    run.trainer(TinyLoader())
    before, theirs = run.weights(), {k: v.clone() for k, v in run.teacher.mllm.stock.state_dict().items()}
    trainer = run.trainer(TinyLoader())
    assert trainer.fit() is None
    moved = {name for name, value in run.weights().items() if not torch.equal(value, before[name])}
    trained = {f"mllm.multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    assert moved == trained
    state = load_file(run.directory / "checkpoints" / f"step-{STEPS:08d}" / "state.safetensors")
    assert {key.split("/", 1)[1] for key in state} == trained
    for name, value in run.teacher.mllm.stock.state_dict().items():
        assert torch.equal(value, theirs[name]), name
    run.student.train()
    assert not any(module.training for module in run.teacher.mllm.stock.modules())
    assert all(name.startswith("mllm.") for name in run.engine.parameters())
    theirs_by_id = {id(module) for module in run.teacher.mllm.stock.modules()}
    assert not theirs_by_id & {id(module) for module in run.student.modules()}


def test_the_log_names_every_term_and_what_it_cost(undisturbed: Run) -> None:
    terms = {"loss", "cross_entropy", "response_kl", "visual_kl", "relation"}
    for line in undisturbed.lines():
        assert terms | {"lr", "grad_norm", "samples_per_s", "response_tokens_per_s"} <= line.keys()
        total = line["cross_entropy"] + line["response_kl"] + line["visual_kl"] + 0.5 * line["relation"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)
    assert undisturbed.steps_on_disk() == [4, 5]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_signal_stops_after_a_checkpoint_and_the_next_run_goes_on(
    run: Run, undisturbed: Run, number: signal.Signals
) -> None:
    run.save_every = 100

    def strike(step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    assert run.fit(TinyLoader(before=strike)) == number.name
    assert signal.getsignal(number) == handler
    assert run.steps_on_disk() == [3]
    assert run.said[-1] == f"stopped by {number.name} after step 3; run the same command again to continue"
    assert run.fit() is None
    assert "resuming from step 3" in run.said
    assert_ends_like(run, undisturbed)


def test_a_crash_between_checkpoints_loses_only_the_steps_since(run: Run, undisturbed: Run) -> None:
    def crash(step: int) -> None:
        if step == 3:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run.fit(TinyLoader(before=crash))
    assert [line["step"] for line in run.lines()] == [1, 2, 3]
    assert run.steps_on_disk() == [2]
    assert run.fit() is None
    assert_ends_like(run, undisturbed)


def test_a_corrupt_newest_checkpoint_is_passed_over_with_a_message(run: Run, undisturbed: Run) -> None:
    def crash(step: int) -> None:
        if step == 4:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run.fit(TinyLoader(before=crash))
    assert run.steps_on_disk() == [2, 4]
    weights = run.directory / "checkpoints" / "step-00000004" / "state.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert run.fit() is None
    assert "step-00000004 cannot be read and is skipped" in run.said[0]
    assert run.said[1] == "resuming from step 2"
    assert_ends_like(run, undisturbed)


def test_a_run_that_is_already_at_its_end_does_no_step(run: Run) -> None:
    run.fit()
    before = run.weights()

    def refuse(_: int) -> None:
        raise AssertionError("a step was read")

    assert run.fit(TinyLoader(before=refuse)) is None
    assert all(torch.equal(value, before[name]) for name, value in run.weights().items())


def not_a_number(batch: Batch) -> Batch:
    pixels_ICHW = torch.full_like(batch.student.pixels_ICHW, torch.nan)
    return replace(batch, student=replace(batch.student, pixels_ICHW=pixels_ICHW))


def test_a_loss_that_is_no_number_stops_with_the_record_ids_and_saves_nothing(run: Run) -> None:
    loader = TinyLoader(spoil=lambda step, batch: not_a_number(batch) if step == 3 else batch)
    with pytest.raises(ValueError, match=r"step 4: the loss or its gradient is not finite") as caught:
        run.fit(loader)
    text = str(caught.value)
    assert "s3r0, s3r1, s3r2, s3r3" in text
    assert "cross_entropy" in text
    assert run.steps_on_disk() == [2]
    assert [line["step"] for line in run.lines()] == [1, 2, 3]


# A real process ----


def test_sigterm_to_a_real_run_writes_a_checkpoint_and_the_same_command_finishes_it(stage) -> None:
    changes = {"max_steps": 30, "checkpoint": {"every": 1000, "keep": 1}}
    whole, config = stage("whole", **changes), stage("stopped", **changes)
    output = config.with_suffix("")
    command = [sys.executable, "-m", "llava_kd.cli", "train", str(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        # Python starts, imports and builds models in a minute where ten processes share a core.
        metrics, deadline = output / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.is_file() and metrics.read_text().count("\n") >= 3):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=30)[0]
    assert process.returncode == 0, said
    assert "stopped by SIGTERM after step" in said
    stopped_at = Checkpoints(output / "checkpoints", keep=1).steps()
    assert len(stopped_at) == 1
    assert 3 <= stopped_at[0] < 30
    assert not (output / "model").exists()
    assert main(["train", str(config)]) == 0
    assert main(["train", str(whole)]) == 0
    expected = load_file(whole.with_suffix("") / "model" / "model.safetensors")
    got = load_file(output / "model" / "model.safetensors")
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    logged = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert logged == list(range(1, 31))


def test_a_trainer_hears_signals_that_its_parent_had_blocked() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
            heard = stop.signal_name
            if heard is None:  # so that it does not end the tests later
                signal.sigwait([signal.SIGUSR1])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert heard == "SIGUSR1"
