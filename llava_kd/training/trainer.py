"""The loop: one optimiser step, and a run of them that can stop and go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from typing import Protocol

import torch
from torch import Tensor

from llava_kd.batch import Batch, Counts
from llava_kd.distill.advice import Advice
from llava_kd.distill.diagnosis import Diagnosis
from llava_kd.distill.student import Student
from llava_kd.parallel.engine import STATE_KINDS, Engine
from llava_kd.parallel.replicas import check_replicas
from llava_kd.training.checkpoint import Best, Checkpoints, Saved
from llava_kd.training.metrics import Metrics, peak_memory
from llava_kd.training.schedule import Cadence, Schedule
from llava_kd.training.stopping import StopRequest
from llava_kd.training.sums import Sums


class Loader(Protocol):
    """Micro-batches of each optimiser step, a pure function of the step."""

    def batches(self, first_step: int, last_step: int) -> Iterator[list[Batch]]: ...

    def telemetry(self) -> dict[str, float]: ...


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Figures of one update, still on the device; `means` are global, `stop` says that a rank must stop.

    `diagnosis` is empty but where the step is diagnosed.
    """

    means: dict[str, Tensor]
    diagnosis: dict[str, Tensor]
    grad_norm: Tensor
    counts: Counts
    num_samples: Tensor
    stop: bool


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a run leaves behind, and whom it tells. `metrics` is None on every rank but the first."""

    checkpoints: Checkpoints
    metrics: Metrics | None = None
    say: Callable[[str], None] = print


class Trainer:
    """Runs the updates of one student."""

    def __init__(
        self,
        *,
        engine: Engine,
        student: Student,
        loader: Loader,
        schedule: Schedule,
        cadence: Cadence,
        output: Output,
        evaluate: Callable[[], Mapping[str, float]] | None = None,
        seed: int = 0,
    ) -> None:
        """`student` is what `engine` wraps. Dropout is drawn from `seed` and the step, so that a run that
        goes on draws what it would have.

        `evaluate` scores the student as it is, on all ranks together; it must give every rank the same
        figures and leave the student as it was.
        """
        self._engine = engine
        self._student = student
        self._loader = loader
        self._schedule = schedule
        self._cadence = cadence
        self._checkpoints = output.checkpoints
        self._metrics = output.metrics
        self._say = output.say
        self._evaluate = evaluate
        self._seed = seed
        self._sums = Sums(engine.world)
        self._advice = Advice(student.objective.terms)
        self._stop = StopRequest()
        self._best: Best | None = None

    @property
    def num_steps(self) -> int:
        return self._schedule.num_steps

    @property
    def identity(self) -> dict[str, str]:
        """Fingerprints of what the checkpoints rely on."""
        return self._checkpoints.identity

    def best_weights(self) -> tuple[Best, dict[str, Tensor]]:
        """Which checkpoint is the best readable one, and its trained weights by name.

        Raises ValueError if none holds the figure.
        """
        saved, problems = self._checkpoints.load_best()
        for problem in problems:
            self._say(problem)
        figure = self._checkpoints.figure
        if saved is None or figure is None:
            raise ValueError(
                f"no checkpoint holds {figure}, so none is the best; set checkpoint.export to last in a new "
                "output_dir, or evaluate more often"
            )
        prefix = f"{STATE_KINDS[0]}/"
        weights = {n.removeprefix(prefix): t for n, t in saved.state.items() if n.startswith(prefix)}
        self._say(f"the best checkpoint is that of step {saved.step}: {figure} {saved.figures[figure]:.4f}")
        return Best(step=saved.step, figure=figure, value=saved.figures[figure]), weights

    def fit(self) -> str | None:
        """Go on from the newest checkpoint to the end. The signal that stopped it, after a checkpoint."""
        try:
            return self._fit()
        finally:
            if self._metrics is not None:
                self._metrics.close()

    def _fit(self) -> str | None:
        first = self._resume()
        with self._stop:
            for step, batches in enumerate(self._loader.batches(first, self.num_steps), start=first):
                result = self.step(batches, step)
                self._check_finite(result, batches, step)
                done = step + 1
                figures = self._evaluated(done)
                self._advise(result, done)
                self._log(result, done, figures)
                is_best = self._is_best(done, figures)
                if self._cadence.saves(done, self.num_steps) or result.stop or is_best:
                    self._save(done, figures)
                if result.stop and done < self.num_steps:
                    name = self._stop.signal_name or "SIGTERM"  # on another rank
                    self._say(f"stopped by {name} after step {done}; run the same command again to continue")
                    return name
        return None

    def step(self, batches: Sequence[Batch], step: int) -> StepResult:
        """One update from the micro-batches of this rank."""
        rank = self._engine.world.rank
        torch.manual_seed(((self._seed * 2**24 + step) * 2**16 + rank) % 2**63)
        counts, num_samples, stop = self._global_counts(batches)
        is_logged = self._cadence.logs(step + 1, self.num_steps)
        is_diagnosed = self._cadence.diagnoses(step + 1, self.num_steps)
        diagnosis = Diagnosis(self._student.objective) if is_diagnosed else None
        means: dict[str, Tensor] = {}
        for index, batch in enumerate(batches):
            is_last = index == len(batches) - 1
            call = partial(self._engine.forward, is_last=is_last)
            loss, of_batch = self._student.losses(
                call, batch, counts, is_logged=is_logged, diagnosis=diagnosis
            )
            self._engine.backward(loss, is_last=is_last)
            for name, value in {"loss": loss.detach(), **of_batch}.items():
                means[name] = means.get(name, 0.0) + value
        norm = self._engine.step(
            lr_multiplier=self._schedule.lr_multiplier(step), max_grad_norm=self._schedule.max_grad_norm
        )
        what = "figures of logged steps" if is_logged else "figures of steps"
        summed = self._sums({name: value.float() for name, value in means.items()}, what)
        self._student.after_step(summed)
        return StepResult(
            means=summed,
            diagnosis={} if diagnosis is None else diagnosis.figures(self._engine.world.sum),
            grad_norm=norm,
            counts=counts,
            num_samples=num_samples,
            stop=stop,
        )

    def _global_counts(self, batches: Sequence[Batch]) -> tuple[Counts, Tensor, bool]:
        """Counts of all micro-batches on all ranks, before any forward; stop requests travel with them."""
        local = reduce(add, map(self._student.counts, batches))
        samples = sum(len(batch.record_ids) for batch in batches)
        wants_stop = self._stop.signal_name is not None
        one = next(iter(local.values()))
        # Filled on the device: a tensor made of host values would wait for the step before.
        others = {"samples": one.new_full((), float(samples)), "stop": one.new_full((), float(wants_stop))}
        named = {**{f"count/{name}": value for name, value in local.items()}, **others}
        summed = self._sums(named, "counts")
        stop = wants_stop if self._engine.world.size == 1 else bool(summed["stop"] > 0)
        counts = Counts({name: summed[f"count/{name}"] for name in local})
        return counts, summed["samples"], stop

    def _check_finite(self, result: StepResult, batches: Sequence[Batch], step: int) -> None:
        if bool(torch.isfinite(result.means["loss"])) and bool(torch.isfinite(result.grad_norm)):
            return
        ids = [name for batch in batches for name in batch.record_ids]
        figures = {name: float(value) for name, value in result.means.items()}
        raise ValueError(
            f"step {step + 1}: the loss or its gradient is not finite ({figures}, gradient norm "
            f"{float(result.grad_norm)}); nothing of this step was saved. Lower optim.lr or look at this "
            f"rank's records: {', '.join(ids)}"
        )

    def _advise(self, result: StepResult, done: int) -> None:
        """Tell the user what the figures say against the settings."""
        if (advice := self._student.advice(result.means)) is not None:
            self._say(advice)
        if self._cadence.logs(done, self.num_steps):
            for line in self._advice(done, {**result.means, **result.diagnosis}):
                self._say(line)

    def _evaluated(self, done: int) -> Mapping[str, float]:
        if self._evaluate is None or not self._cadence.evaluates(done, self.num_steps):
            return {}
        start = time.monotonic()
        figures = self._evaluate()
        if self._metrics is not None:
            self._metrics.pause(time.monotonic() - start)
        return figures

    def _is_best(self, done: int, figures: Mapping[str, float]) -> bool:
        name = self._checkpoints.figure
        if name is None or name not in figures:
            return False
        now = Best(step=done, figure=name, value=figures[name])
        if self._best is not None and self._best.order <= now.order:
            return False
        self._best = now
        self._say(f"step {done} is the best so far: {name} {now.value:.4f}")
        return True

    def _log(self, result: StepResult, done: int, evaluated: Mapping[str, float]) -> None:
        if self._metrics is None:
            return
        amounts = {"samples": result.num_samples, "response_tokens": result.counts["response_tokens"]}
        amounts["visual_tokens"] = result.counts["visual_tokens"]
        figures = {**result.means, "grad_norm": result.grad_norm}
        self._metrics.add(
            done,
            figures,
            amounts,
            lambda: {
                **self._schedule.rates(done - 1),
                "ranks": self._engine.world.size,
                "peak_memory_gb": peak_memory(self._engine.world.device) / 1e9,
                **self._loader.telemetry(),
            },
            {**{name: float(value) for name, value in result.diagnosis.items()}, **evaluated},
        )

    def _resume(self) -> int:
        world = self._engine.world
        with world.together():
            saved, problems = self._checkpoints.load_newest()
            self._best = self._checkpoints.best(up_to=0 if saved is None else saved.step)
        for problem in problems:
            self._say(problem)
        world.agreed(0 if saved is None else saved.step, "checkpoint")
        if saved is None:
            if self._metrics is not None:
                self._metrics.resume(0)
            return 0
        state = self._student.load_state(saved.state)
        self._engine.load_state(state, num_steps=saved.step)
        if self._metrics is not None:
            self._metrics.resume(saved.step)
        with world.together():
            if world.is_main:
                try:
                    self._checkpoints.drop_older(saved.step)  # after the last step no save follows
                except OSError as error:
                    self._say(f"an old checkpoint stays, because it cannot be removed: {error}")
        self._say(f"resuming from step {saved.step}")
        return saved.step

    def _save(self, done: int, figures: Mapping[str, float]) -> None:
        check_replicas(self._engine.world, self._engine.replicas())
        state = self._engine.state() | self._student.state()
        with self._engine.world.together():
            if self._engine.world.is_main:
                if self._metrics is not None:
                    self._metrics.sync()
                self._checkpoints.save(Saved(step=done, state=state, figures=figures))
