"""What a diagnosis adds to a training step.

Stage 3 of the quickstart on its own models, the same batch again and again, one trainer: a step with a
diagnosis and one without, in turn. Seconds are those of the process on one thread, so that other work on the
machine does not count. `share` is what a diagnosis every 50 steps, the default, adds to the mean step.

python benchmarks/diagnostics.py --json benchmarks/results/diagnostics_cpu.json
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from _common import Row, meta, parser, print_table, write_json
from teacher_cache import ALONE, settings
from torch import Tensor

from llava_kd.assembly.parts.data import make_loader
from llava_kd.assembly.parts.models import student_parts
from llava_kd.assembly.parts.teacher import teacher_parts
from llava_kd.assembly.stage import assemble
from llava_kd.config import LogConfig, TrainConfig
from llava_kd.data.shapes.writing import write_shapes

COLUMNS = ("case", "step_cpu_s", "diagnosed_cpu_s", "adds", "share")
CASES = {
    "four terms, one micro-batch": (),
    "four terms, four micro-batches": ("--micro_batch_size=8",),
    "response only": ("--objective.visual_kl=null", "--objective.relation=null"),
}
FAR = 10**6  # steps, so that step 1 alone is due


def measure(case: str, config: TrainConfig, repeats: int) -> Row:
    student = student_parts(config.student, template=config.data.template, seed=config.seed)
    teacher = teacher_parts(config)
    loader, _ = make_loader(config, ALONE, student, teacher)
    batches = next(loader.batches(0, 1))
    trainer, _ = assemble(config, ALONE, student, teacher, say=lambda _: None)

    def seconds(step: int) -> tuple[float, dict[str, Tensor]]:
        start = time.process_time()
        found = trainer.step(batches, step).diagnosis
        return time.process_time() - start, found

    taken: dict[str, list[float]] = {"plain": [], "diagnosed": []}
    for number in range(repeats + 1):
        for name, step in (("plain", 1), ("diagnosed", 0)):
            spent, found = seconds(step)
            assert bool(found) == (name == "diagnosed")
            if number > 0:  # the first is a warm-up
                taken[name].append(spent)
    plain, diagnosed = (statistics.median(values) for values in taken.values())
    adds = statistics.median([b - a for a, b in zip(*taken.values(), strict=True)]) / plain
    return {
        "case": case,
        "step_cpu_s": plain,
        "diagnosed_cpu_s": diagnosed,
        "adds": adds,
        "share": adds / LogConfig().diagnostics_every,
    }


def main(arguments: Sequence[str]) -> None:
    flags = parser(__doc__ or "")
    flags.add_argument("--repeats", type=int, default=21, help="pairs of steps of which the median is taken")
    given = flags.parse_args(arguments)
    torch.set_num_threads(given.threads or 1)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_shapes(directory / "data", num_train=100, num_validation=2, num_test=2, seed=0, progress=False)
        rows = []
        for case, words in CASES.items():
            config = settings(directory, *words)
            config = replace(config, log=replace(config.log, every=FAR, diagnostics_every=FAR))
            rows.append(measure(case, config, given.repeats))
    print_table(rows, COLUMNS)
    if given.json is not None:
        write_json(given.json, meta=meta(device="cpu", repeats=given.repeats), rows=rows)


if __name__ == "__main__":
    main(sys.argv[1:])
