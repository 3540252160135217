"""Samples per second on several machines, from the rate of a run on one.

A step is what a rank computes and what the ranks exchange. What it computes comes from the measured run and
grows with a rank's samples. What they exchange takes `traffic` / busbw seconds: nccl-tests define their
busbw by t = 2 (n - 1) / n * S / busbw for an all-reduce of S bytes on n ranks, and half of that for an
all-gather or a reduce-scatter (github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md); `traffic` has them.
With t the measured step, s the samples of a rank over those it had then, x and X the exchanges then and now:

    wholly hidden    max(s t, X)
    not hidden       s (t - x) + X

Not in it: the latency of each collective, waiting for the slowest rank or for data, and what smaller
micro-batches cost.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_kd.assembly.planning.estimate import GB, ModelSizes, accumulation, traffic
from llava_kd.assembly.runs.run_dir import differences
from llava_kd.assembly.settings import load
from llava_kd.config import TrainConfig

# GB/s of busbw that are assumed: GPUs on NVLink, two 100 Gbit/s cards a machine.
INSIDE, BETWEEN = 150.0, 25.0
# Settings that a measured rate carries over with.
_DECIDE = (
    "student.",
    "peer.",
    "teacher.",
    "objective.",
    "trainable",
    "vision_tower_last_layers",
    "micro_batch_size",
)
_DECIDE += ("data.max_length", "data.packing", "data.num_workers", "engine.precision")
_DECIDE += ("engine.activation_checkpointing",)


@dataclass(frozen=True, kw_only=True)
class Rate:
    """What a run on one machine did; medians over the lines of its log."""

    directory: Path
    config: TrainConfig
    ranks: int
    lines: int
    seconds: float
    samples: float

    @staticmethod
    def of(directory: str | Path) -> Rate:
        """From `metrics.jsonl` and `config.yaml`, without the first line: it holds the start.

        Only the lines of the last number of ranks count. Raises ValueError if there is none.
        """
        run = Path(directory)
        if not (run / "metrics.jsonl").is_file() or not (run / "config.yaml").is_file():
            raise ValueError(
                f"{run} must be the output_dir of a run, with metrics.jsonl and config.yaml; name that of "
                "a short run on one machine"
            )
        logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()[1:]]
        ranks = int(logged[-1].get("ranks", 0)) if logged else 0
        used = [line for line in logged if line.get("ranks") == ranks]
        if not ranks:
            raise ValueError(
                f"{run} must have lines with `ranks` in metrics.jsonl after the first line; it has "
                f"{len(logged)} lines there: run more steps with log.every=1, or in a new directory"
            )
        return Rate(
            directory=run,
            config=load(run / "config.yaml"),
            ranks=ranks,
            lines=len(used),
            seconds=statistics.median(line["seconds_per_step"] for line in used),
            samples=statistics.median(line["samples_per_s"] * line["seconds_per_step"] for line in used),
        )


@dataclass(frozen=True, kw_only=True)
class Network:
    """busbw in GB/s: of the ranks of one machine, and of ranks on several."""

    inside: float = INSIDE
    between: float = BETWEEN

    def __post_init__(self) -> None:
        for name, given in (("--inside", self.inside), ("--between", self.between)):
            if given <= 0:
                raise ValueError(f"{name} must be more than 0 GB/s; got {given:g}")

    def seconds(self, sent: float, machines: int) -> float:
        return sent / GB / (self.inside if machines == 1 else min(self.inside, self.between))


def step_seconds(
    config: TrainConfig,
    rate: Rate,
    network: Network,
    machines: int,
    student: ModelSizes,
    teacher: ModelSizes | None,
) -> tuple[float, float]:
    """Seconds of a step of `config` on so many machines: its exchange wholly hidden, and not at all."""
    then = network.seconds(traffic(rate.config, rate.ranks, student, teacher), 1)
    if then >= rate.seconds:
        raise ValueError(
            f"at {network.inside:g} GB/s inside a machine, communication takes {then:.3g} s per step, but "
            f"the whole step measured in {rate.directory} took {rate.seconds:.3g} s; give the real "
            "bandwidth (--inside)"
        )
    ranks = rate.ranks * machines
    share = config.global_batch_size / machines / rate.samples
    now = network.seconds(traffic(config, ranks, student, teacher), machines)
    return max(share * rate.seconds, now), share * (rate.seconds - then) + now


def throughput(
    config: TrainConfig,
    ranks: int,
    rate: Rate,
    network: Network,
    student: ModelSizes,
    teacher: ModelSizes | None,
) -> list[str]:
    """Lines for 1, 2, 4, ... machines, up to as many as have `ranks` together."""
    if ranks % rate.ranks:
        raise ValueError(
            f"the run in {rate.directory} had {rate.ranks} ranks on its machine, so the ranks must be a "
            f"multiple of {rate.ranks}; got {ranks}"
        )
    alone = rate.samples / rate.seconds
    lines = [
        f"rate             {alone:.4g} samples/s on {rate.ranks} ranks of one machine: {rate.directory}, "
        f"{rate.lines} lines",
        *_differences(config, rate),
        f"  {'machines':>8} {'ranks':>6} {'seconds a step':>18} {'samples/s':>18} {'of the ideal':>14}",
    ]
    for machines in _powers(ranks // rate.ranks):
        count = machines * rate.ranks
        if config.global_batch_size % count:
            lines.append(f"  {machines:8} {count:6}   do not divide global_batch_size")
            continue
        least, most = step_seconds(config, rate, network, machines, student, teacher)
        fast, slow = (config.global_batch_size / seconds for seconds in (least, most))
        ideal = 100 / (machines * alone)
        small = config.global_batch_size < count * rate.config.micro_batch_size * accumulation(config, count)
        lines.append(
            f"  {machines:8} {count:6} {_span(least, most):>18} {_span(slow, fast):>18} "
            f"{_span(slow * ideal, fast * ideal):>12} %{'  (smaller micro-batches)' * small}"
        )
    lines.append(
        f"  the range is from fully overlapped to not overlapped communication; busbw {network.inside:g} "
        f"GB/s inside a machine (--inside), {network.between:g} GB/s between machines (--between)"
    )
    return lines


def _differences(config: TrainConfig, rate: Rate) -> list[str]:
    found = [line for line in differences(rate.config, config, may_change=()) if line.startswith(_DECIDE)]
    return (
        [f"  measured with other settings, which this estimate ignores: {'; '.join(found)}"] if found else []
    )


def _powers(most: int) -> Sequence[int]:
    powers = [2**k for k in range(most.bit_length()) if 2**k <= most]
    return powers if powers[-1] == most else [*powers, most]


def _span(low: float, high: float) -> str:
    low_text, high_text = f"{low:.3g}", f"{high:.3g}"
    return low_text if low_text == high_text else f"{low_text} - {high_text}"
