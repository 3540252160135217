"""The student's loss on records that it is not trained on, while it trains."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch

from llava_kd.assembly.parts.data import served, side_in
from llava_kd.assembly.parts.slices import read_slices, slice_scorer
from llava_kd.assembly.settings import tables_of
from llava_kd.batch import Batch, Counts
from llava_kd.config import EvaluateConfig, TrainConfig
from llava_kd.data.batches.loader import Loader
from llava_kd.data.batches.order import Order, Reading
from llava_kd.data.sources.kinds import FileSource, Place, open_source
from llava_kd.distill.objective import Objective
from llava_kd.distill.picture_gain import beside_pictures, with_exchanged_pictures
from llava_kd.distill.student import Student
from llava_kd.distill.terms.cross_entropy import CrossEntropy
from llava_kd.evaluation.generation.generate import evaluation_mode
from llava_kd.models.files.checkpoint import Parts
from llava_kd.parallel.engine import Engine

Figures = Mapping[str, float]


def read_held_out(config: TrainConfig) -> dict[str, FileSource]:
    """Raises ValueError for a file that cannot be read, or that holds no record that could be."""
    parts = {} if config.evaluate is None else config.evaluate.losses
    follow, kinds = config.data.follow_symlinks, tables_of(config).sources
    sources = {
        name: open_source(Place(path=part.path, images=part.images, follow_symlinks=follow), kinds)
        for name, part in parts.items()
    }
    for name, source in sources.items():
        chosen = range(len(source))[: parts[name].max_records]
        if set(chosen) <= set(source.faults):
            raise ValueError(
                f"`evaluate.losses.{name}`: none of the first {len(chosen)} records of "
                f"{parts[name].path} can be read; fix them, or raise max_records"
            )
    return sources


def evaluator(
    config: TrainConfig, evaluate: EvaluateConfig, student: Parts, module: Student, engine: Engine
) -> Callable[[], Figures]:
    """A call gives every figure of the student as it is now; every rank must make it."""
    scorers: list[Callable[[], Figures]] = []
    if evaluate.slices:
        model = served(student, config.data)
        scorers.append(slice_scorer(evaluate, read_slices(config), model, engine))
    if evaluate.losses:
        scorers.append(_loss_scorer(config, evaluate, student, module, engine))
    return lambda: {name: value for score in scorers for name, value in score().items()}


def _loss_scorer(
    config: TrainConfig, evaluate: EvaluateConfig, student: Parts, module: Student, engine: Engine
) -> Callable[[], Figures]:
    # Its own processor: the training loader's thread reads ahead with the student's.
    own = Parts(stock=student.stock, processor=copy.deepcopy(student.processor))
    reader = side_in(config, own, config.student)

    def loader(source: FileSource, num_records: int | None, size: int) -> Loader:
        records = range(len(source))[:num_records]
        return Loader(
            source=source,
            student=reader,
            teacher=None,
            order=Order(  # what a rank reads is chosen below, by batch
                seed=config.seed, global_batch_size=size, micro_batch_size=size, records=records
            ),
            reading=Reading(max_bad_rate=1.0),
            device=engine.world.device,
        )

    sources, size = read_held_out(config), config.micro_batch_size
    loaders = {
        name: loader(source, evaluate.losses[name].max_records, size) for name, source in sources.items()
    }
    exchanged = {name: min(len(source), evaluate.losses[name].exchanged) for name, source in sources.items()}
    # Two records at least in a batch, or there is no other picture.
    pairs = {name: loader(sources[name], count, max(2, size)) for name, count in exchanged.items() if count}
    # The same formulas, none of the teacher's terms.
    alone = Objective(terms={"cross_entropy": CrossEntropy()}, common=module.objective.common)

    def score() -> Figures:
        start = time.perf_counter()
        figures: dict[str, float] = {}
        with engine.inference(), evaluation_mode(student.stock):
            for name, loader in loaders.items():
                total, tokens, bad = _summed(loader, module, alone, engine)
                if tokens == 0:
                    raise ValueError(
                        f"`evaluate.losses.{name}`: all {bad:.0f} records are bad; at least one must be "
                        "readable: fix the file"
                    )
                figures |= {f"loss/{name}": total / tokens, f"loss/{name}/bad_records": bad}
                gain = _picture_gain(pairs[name], module, alone, engine) if name in pairs else None
                if gain is not None:
                    figures[f"loss/{name}/picture_gain"] = gain
        return {**figures, "loss/seconds": time.perf_counter() - start}

    return score


def _turns(loader: Loader, engine: Engine) -> Iterator[tuple[Batch, bool]]:
    """This rank's batches, and whether each counts.

    Ranks take turns by batch, so that a batch is the same with any number of ranks. Where weights are
    gathered on use, a rank without a batch reads the first again, for nothing.
    """
    world, last = engine.world, loader.steps_per_epoch
    for first in range(0, last, world.size):
        step = first + world.rank
        is_counted = step < last
        if is_counted or engine.is_sharded:
            step = step if is_counted else 0
            for batch in next(loader.batches(step, step + 1)):
                yield batch, is_counted


def _summed(
    loader: Loader, module: Student, objective: Objective, engine: Engine
) -> tuple[float, float, float]:
    """Sum of the loss over all ranks' batches, answer tokens, and bad records."""
    sums = torch.zeros(3, dtype=torch.float64, device=engine.world.device)
    for batch, is_counted in _turns(loader, engine):
        loss, bad = _loss(batch, module, objective), loader.telemetry()["bad_records"]
        if is_counted:
            sums[0] += loss
            sums[1] += len(batch.student.places.response_N)
            sums[2] += bad
    total, tokens, all_bad = engine.world.sum(sums).tolist()
    return total, tokens, all_bad


def _picture_gain(loader: Loader, module: Student, objective: Objective, engine: Engine) -> float | None:
    """What the exchange of pictures costs a token beside one; None where there is none to exchange."""
    sums = torch.zeros(2, dtype=torch.float64, device=engine.world.device)
    for batch, is_counted in _turns(loader, engine):
        exchanged = replace(batch, student=with_exchanged_pictures(batch.student))
        gain = _loss(exchanged, module, objective) - _loss(batch, module, objective)
        if is_counted:
            sums[0] += gain
            sums[1] += beside_pictures(batch.student).sum()
    gain, tokens = engine.world.sum(sums).tolist()
    return gain / tokens if tokens else None


def _loss(batch: Batch, module: Student, objective: Objective) -> torch.Tensor:
    """Sum over the answers' tokens."""
    one = torch.ones((), dtype=torch.float64, device=batch.student.input_ids_BT.device)
    counts = Counts(dict.fromkeys(module.counts(batch), one))
    features_INE = None if module.mllm.train_tower else module.mllm.image_features(batch.student)
    _, means = module(batch, counts, features_INE, objective=objective)
    return means["cross_entropy"].double()
