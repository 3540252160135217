"""The loop: one optimiser step, and a run of them that can stop and go on.

Shape legend: I images, N tokens of an image, E tower width.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from types import FrameType
from typing import Protocol

import torch
from torch import Tensor

from llava_kd.batch import Batch, Counts
from llava_kd.distill.student import Student
from llava_kd.distill.teaching.cached import CachedTeacher
from llava_kd.distill.teaching.live import Teacher
from llava_kd.parallel.engine import STATE_KINDS, Engine
from llava_kd.training.checkpoint import Best, Checkpoints, Saved
from llava_kd.training.metrics import Metrics


class Loader(Protocol):
    """Micro-batches of each optimiser step, a pure function of the step."""

    def batches(self, first_step: int, last_step: int) -> Iterator[list[Batch]]: ...

    def telemetry(self) -> dict[str, float]: ...


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Figures of one update, still on the device; `means` are global, `stop` says that a rank must stop."""

    means: dict[str, Tensor]
    grad_norm: Tensor
    counts: Counts
    num_samples: Tensor
    stop: bool


class StopRequest:
    """Set by SIGTERM, SIGINT or SIGUSR1; read once a step so that every rank stops at the same one."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        # A process inherits what its parent blocks, such as a fork server that blocks them for its workers.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal() itself returned

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name


class Trainer:
    """Runs `num_steps` updates of one student."""

    def __init__(
        self,
        *,
        engine: Engine,
        student: Student,
        teacher: Teacher | CachedTeacher | None,
        loader: Loader,
        checkpoints: Checkpoints,
        metrics: Metrics | None,
        lr_multiplier: Callable[[int], float],
        base_lr: float,
        num_steps: int,
        max_grad_norm: float = 1.0,
        save_every: int = 500,
        log_every: int = 10,
        seed: int = 0,
        evaluate: Callable[[], Mapping[str, float]] | None = None,
        evaluate_every: int = 0,
        say: Callable[[str], None] = print,
    ) -> None:
        """`metrics` is None on every rank but the first. `student` is what `engine` wraps.

        Every `log_every` steps the teacher's own cross-entropy is taken as well. Dropout is drawn from `seed`
        and the step, so that a run that goes on draws what it would have.

        `evaluate` scores the student as it is, on all ranks together, every `evaluate_every` steps and at the
        end; it must give every rank the same figures and leave the student as it was.
        """
        self._engine = engine
        self._student = student
        self._teacher = teacher
        self._loader = loader
        self._checkpoints = checkpoints
        self._metrics = metrics
        self._lr_multiplier = lr_multiplier
        self._base_lr = base_lr
        self._num_steps = num_steps
        self._max_grad_norm = max_grad_norm
        self._save_every = save_every
        self._log_every = log_every
        self._teacher_is_worse = 0
        self._seed = seed
        self._evaluate_every = evaluate_every
        self._evaluate = evaluate
        self._say = say
        self._stop = StopRequest()
        self._best: Best | None = None

    @property
    def num_steps(self) -> int:
        return self._num_steps

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
            for step, batches in enumerate(self._loader.batches(first, self._num_steps), start=first):
                result = self.step(batches, step)
                self._check_finite(result, batches, step)
                done = step + 1
                figures = self._evaluated(done)
                self._warn(result)
                self._log(result, done, figures)
                is_best = self._is_best(done, figures)
                if done % self._save_every == 0 or done == self._num_steps or result.stop or is_best:
                    self._save(done, figures)
                if result.stop and done < self._num_steps:
                    name = self._stop.signal_name or "SIGTERM"  # on another rank
                    self._say(f"stopped by {name} after step {done}; the same command goes on from there")
                    return name
        return None

    def step(self, batches: Sequence[Batch], step: int) -> StepResult:
        """One update from the micro-batches of this rank."""
        rank = self._engine.world.rank
        torch.manual_seed(((self._seed * 2**24 + step) * 2**16 + rank) % 2**63)
        counts, num_samples, stop = self._global_counts(batches)
        means: dict[str, Tensor] = {}
        for index, batch in enumerate(batches):
            is_last = index == len(batches) - 1
            loss, partial = self._losses(batch, counts, is_last, is_logged=self._is_logged(step + 1))
            self._engine.backward(loss, is_last=is_last)
            for name, value in {"loss": loss.detach(), **partial}.items():
                means[name] = means.get(name, 0.0) + value
        norm = self._engine.step(lr_multiplier=self._lr_multiplier(step), max_grad_norm=self._max_grad_norm)
        names = sorted(means)
        summed = self._engine.world.sum(torch.stack([means[name].float() for name in names]))
        return StepResult(
            means=dict(zip(names, summed.unbind(), strict=True)),
            grad_norm=norm,
            counts=counts,
            num_samples=num_samples,
            stop=stop,
        )

    def _is_logged(self, done: int) -> bool:
        return done % self._log_every == 0 or done == self._num_steps

    def _losses(
        self, batch: Batch, counts: Counts, is_last: bool, *, is_logged: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        mllm = self._student.mllm
        features_INE = None if mllm.train_tower else mllm.image_features(batch.student)
        prediction = None if self._teacher is None else self._teacher(batch, features_INE)
        loss, means = self._engine.forward(batch, counts, features_INE, prediction, is_last=is_last)
        if is_logged and prediction is not None:
            own = self._student.objective.teacher_cross_entropy(prediction, batch, counts)
            means = means if own is None else {**means, "teacher_cross_entropy": own}
        return loss, means

    def _global_counts(self, batches: Sequence[Batch]) -> tuple[Counts, Tensor, bool]:
        """Counts of all micro-batches on all ranks, before any forward; stop requests travel with them."""
        local = reduce(add, (batch.counts() for batch in batches)).stack()
        samples = sum(len(batch.record_ids) for batch in batches)
        wants_stop = self._stop.signal_name is not None
        # Filled on the device: a tensor made of host values would wait for the step before.
        others = [local.new_full((1,), float(value)) for value in (samples, wants_stop)]
        summed = self._engine.world.sum(torch.cat([local, *others]))
        stop = wants_stop if self._engine.world.size == 1 else bool(summed[4] > 0)
        return Counts.unstack(summed[:3]), summed[3], stop

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

    def _evaluated(self, done: int) -> Mapping[str, float]:
        if self._evaluate is None or (done % self._evaluate_every and done != self._num_steps):
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

    def _warn(self, result: StepResult) -> None:
        """Say once that the teacher does worse than the student, at three logged steps in a row."""
        own, student = (result.means.get(name) for name in ("teacher_cross_entropy", "cross_entropy"))
        if own is None or student is None or self._teacher_is_worse >= 3:
            return
        self._teacher_is_worse = self._teacher_is_worse + 1 if bool(own > 1.01 * student) else 0
        if self._teacher_is_worse == 3:
            self._say(
                f"the teacher's own cross-entropy on the responses, {float(own):.3f}, is above the student's "
                f"{float(student):.3f}: it holds the student back. Look at its checkpoint, data.template and "
                "image preprocessing, or lower the weight of response_kl"
            )

    def _log(self, result: StepResult, done: int, evaluated: Mapping[str, float]) -> None:
        if self._metrics is None:
            return
        multiplier = self._lr_multiplier(done - 1)
        amounts = {"samples": result.num_samples, "response_tokens": result.counts.response_tokens}
        amounts["visual_tokens"] = result.counts.visual_tokens
        figures = {**result.means, "grad_norm": result.grad_norm}
        self._metrics.add(
            done,
            figures,
            amounts,
            lambda: {
                "lr": self._base_lr * multiplier,
                "ranks": self._engine.world.size,
                **self._loader.telemetry(),
            },
            evaluated,
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
        self._engine.load_state(saved.state, num_steps=saved.step)
        if self._metrics is not None:
            self._metrics.resume(saved.step)
        self._say(f"going on from step {saved.step}")
        return saved.step

    def _save(self, done: int, figures: Mapping[str, float]) -> None:
        state = self._engine.state()
        with self._engine.world.together():
            if self._engine.world.is_main:
                self._checkpoints.save(Saved(step=done, state=state, figures=figures))
