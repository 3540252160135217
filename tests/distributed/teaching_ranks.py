"""Two updates of a student that one of `outside_teachings` teaches: what test_teaching.py launches.

Usage: teaching_ranks.py TEACHING ENGINE STUDENT TEACHER OUT. Rank 0 writes the weights after them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from outside_teachings import Framed, MeanOfLogits, Peer, Uneven
from safetensors.torch import save_file
from tiny_batches import inputs, record
from tiny_objectives import objective_of

from llava_kd.batch import Batch
from llava_kd.distill.student import Student
from llava_kd.distill.teaching.door import Teaching
from llava_kd.distill.teaching.from_teacher import FromTeacher
from llava_kd.distill.teaching.live import Teacher
from llava_kd.distill.terms.cross_entropy import CrossEntropy
from llava_kd.distill.terms.response_kl import ResponseKL
from llava_kd.models.files.checkpoint import load_stock
from llava_kd.models.mllm import MLLM
from llava_kd.parallel.engine import AdamWSettings, ParameterGroup
from llava_kd.parallel.torch_engine import TorchEngine
from llava_kd.parallel.world import World, join
from llava_kd.training.checkpoint import Checkpoints
from llava_kd.training.schedule import Cadence, Schedule
from llava_kd.training.trainer import Output, Trainer

TRAINED = ("multi_modal_projector", "language_model")
RECORDS = [record(1), record(2, images=2), record(3, prompt=9), record(4, images=0)]


class Cut:
    """Four records a step; one of two ranks reads a batch without a picture."""

    def __init__(self, world: World) -> None:
        self._own = RECORDS[world.rank :: world.size]

    def batches(self, first_step: int, last_step: int) -> Iterator[list[Batch]]:
        for _ in range(first_step, last_step):
            yield [Batch(student=inputs(item), record_ids=("r",)) for item in self._own]

    def telemetry(self) -> dict[str, float]:
        return {}


def teaching_of(name: str, world: World, student: str, teacher: Teacher) -> Teaching:
    if name == "mixture":
        return FromTeacher(MeanOfLogits([teacher, teacher]))
    if name == "peer":
        return Peer(MLLM(load_stock(student).stock, trainable=TRAINED))
    return Framed(teacher) if name == "frame" else Uneven(teacher, world.rank)


def main(name: str, kind: str, student: str, teacher: str, out: str) -> None:
    world = join("cpu", timeout_minutes=2)
    frozen = Teacher(MLLM(load_stock(teacher).stock), shares_tower=True)
    mllm = MLLM(load_stock(student).stock, trainable=TRAINED)
    objective = objective_of(cross_entropy=CrossEntropy(), response_kl=ResponseKL(), num_common=260)
    module = Student(mllm, objective, teaching_of(name, world, student, frozen)).train()
    group = ParameterGroup(names=tuple(n for n, p in module.named_parameters() if p.requires_grad), lr=1e-2)
    engine = TorchEngine(
        module, [group], world=world, kind=kind, adamw=AdamWSettings(), bf16=False,
        shard_units=[*mllm.language_model.layers, mllm.multi_modal_projector],
    )  # fmt: skip
    trainer = Trainer(
        engine=engine,
        student=module,
        loader=Cut(world),
        schedule=Schedule(num_steps=2, base_lr=1e-2, lr_multiplier=lambda _: 1.0),
        cadence=Cadence(),
        output=Output(checkpoints=Checkpoints(Path(out).with_suffix(""), keep=1), say=print),
    )
    trainer.fit()
    weights = engine.parameters()
    if world.is_main:
        save_file({n: t.float().contiguous() for n, t in weights.items()}, Path(out))


if __name__ == "__main__":
    torch.manual_seed(0)
    main(*sys.argv[1:])
