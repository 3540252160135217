"""What answers of the student's own cost a step of the quickstart's stage 3.

Its own models, one trainer: the questions of the 32 records of a step, talks of several turns, are answered
at once; one by one, each prompt read from its beginning, as a loop over `generate` does; and a record at a
time by the very code that answers at once (`alone`). The step is then taken on these answers. `trained` has
the shipped teacher in the student's place. Every answer has at most 16 tokens. Seconds are those of the
process on one thread, so that other work on the machine does not count; a ratio is the median of those of
the rounds.

python benchmarks/on_policy.py --json benchmarks/results/on_policy_cpu.json
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from _common import Row, meta, parser, print_table, write_json
from teacher_cache import ALONE, BACKBONES, settings

from llava_kd.assembly.parts.data import make_loader
from llava_kd.assembly.parts.models import student_parts
from llava_kd.assembly.parts.on_policy.assembling import with_own_answers
from llava_kd.assembly.parts.on_policy.writer import Asked, OwnAnswersLoader, Writer
from llava_kd.assembly.parts.teacher import teacher_parts
from llava_kd.assembly.stage import assemble
from llava_kd.batch import Batch
from llava_kd.config import TrainConfig
from llava_kd.data.shapes.writing import write_shapes
from llava_kd.evaluation.generation.turns import Turns

COLUMNS = (
    "case",
    "answers",
    "tokens",
    "at_once_cpu_s",
    "one_by_one_cpu_s",
    "speedup",
    "alone_cpu_s",
    "step_cpu_s",
    "of_the_step",
)
CASES = {
    "quickstart": (),
    "trained": (f"--student={{checkpoint: {BACKBONES / 'teacher'}}}",),
}


class OneByOne(Writer):
    """Every question by itself, behind nothing that was kept."""

    def _answer(self, asked: Sequence[Asked], step: int) -> None:
        for one in asked:
            while one.talk.room:
                prompt, name = one.talk.prompt, f"{step} {one.talk.turn} {one.talk.name}"
                turns = Turns(self.generator, [one.pixels_ICHW])
                self._take(one.talk, turns.written([0], [(prompt.ids, prompt.visual)], [name])[0])


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(case: str, config: TrainConfig, repeats: int) -> Row:
    student = student_parts(config.student, template=config.data.template, seed=config.seed)
    teacher = teacher_parts(config)
    loader, _ = make_loader(config, ALONE, student, teacher)
    batches = next(loader.batches(0, 1))
    trainer, engine = assemble(config, ALONE, student, teacher, say=lambda _: None)
    own = with_own_answers(config, loader, student, teacher, engine)
    assert isinstance(own, OwnAnswersLoader)
    writer = own._writer
    same = (writer.generator, writer.inference, writer.max_length, 1)
    alone, loop = Writer(*same), OneByOne(*same)
    made: list[Batch] = []

    def write() -> None:
        made[:] = writer.rewritten(batches, 1)

    calls: dict[str, Callable[[], object]] = {
        "at_once": write,
        "one_by_one": lambda: loop.rewritten(batches, 1),
        "alone": lambda: alone.rewritten(batches, 1),
        "step": lambda: trainer.step(made, 1),
    }
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(repeats + 1):
        for name, call in calls.items():
            spent = seconds(call)
            if number > 0:  # the first is a warm-up
                taken[name].append(spent)
    counted = writer.counted

    def ratio(above: str, below: str) -> float:
        pairs = zip(taken[above], taken[below], strict=True)
        return statistics.median(a / b for a, b in pairs)

    return {
        "case": case,
        "answers": round(counted["own_answers_written"] / (repeats + 1)),
        "tokens": counted["own_answer_tokens"] / counted["own_answers_written"],
        **{f"{name}_cpu_s": statistics.median(values) for name, values in taken.items()},
        "speedup": ratio("one_by_one", "at_once"),
        "of_the_step": ratio("at_once", "step"),
    }


def main(arguments: Sequence[str]) -> None:
    flags = parser(__doc__ or "")
    flags.add_argument("--repeats", type=int, default=7, help="of which the median is taken")
    given = flags.parse_args(arguments)
    torch.set_num_threads(given.threads or 1)
    asked = "--on_policy={share: 0.5, max_new_tokens: 16}"
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_shapes(directory / "data", num_train=64, num_validation=2, num_test=2, seed=0, progress=False)
        rows = [
            measure(case, settings(directory, asked, *words), given.repeats) for case, words in CASES.items()
        ]
    print_table(rows, COLUMNS)
    if given.json is not None:
        write_json(given.json, meta=meta(device="cpu", repeats=given.repeats), rows=rows)


if __name__ == "__main__":
    main(sys.argv[1:])
