"""`llava-kd data centroids`: what a model says after each frequent answer token, before it is tuned.

Shape legend: N answer rows, V vocabulary, K tokens with a centroid.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llava_kd.assembly.parts.data import side_of, source_in
from llava_kd.assembly.parts.models import DTYPES
from llava_kd.assembly.parts.teacher import placed_teacher
from llava_kd.assembly.parts.tuning.centroids import (
    StoredCentroids,
    identity_of,
    mcmi_of,
    tuned_checkpoint,
)
from llava_kd.assembly.record_pass import RecordPass, answer_rows
from llava_kd.assembly.settings import tables_of
from llava_kd.batch import IGNORE_INDEX
from llava_kd.config import TeacherConfig, TrainConfig
from llava_kd.data.batches.model_side import Side
from llava_kd.data.sources.conversation import Source
from llava_kd.durable import make_folder, write_whole
from llava_kd.losses.tuning.information import NONE, add_softmaxes, row_of_tokens
from llava_kd.models.files.checkpoint import load_config, load_processor, load_stock
from llava_kd.parallel.world import World, join, peers


def frequent_tokens(source: Source, reader: Side, *, most: int, least: int) -> Tensor:
    """[K]: the `most` tokens that answers have most often, each `least` times or more; by falling count.

    ValueError where there is none. A record that cannot be read is passed over.
    """
    encode = reader.encoder()
    counts_V = torch.zeros(0, dtype=torch.long)
    for number in range(len(source)):
        try:
            labels = encode(source.record(number)).labels[1:]
        except ValueError:
            continue
        own_V = torch.bincount(labels[labels != IGNORE_INDEX], minlength=len(counts_V))
        own_V[: len(counts_V)] += counts_V
        counts_V = own_V
    by_count = counts_V.argsort(descending=True, stable=True).tolist()
    found = [token for token in by_count[:most] if counts_V[token] >= least]
    if not found:
        highest = int(counts_V.max()) if len(counts_V) else 0
        raise ValueError(
            f"at least one answer token must occur {least} times; in the {len(source)} records the most "
            f"frequent token occurs {highest} times: lower --least, or give more records"
        )
    return torch.tensor(found)


@dataclass
class _Sums:
    """Over answer rows: softmaxes after each token in fp64, their number, entropies, and cross-entropy."""

    softmax_KV: Tensor
    rows_K: Tensor
    entropy: Tensor
    cross_entropy: Tensor
    rows: Tensor

    @staticmethod
    def zeros(num_tokens: int, vocabulary: int, device: torch.device) -> _Sums:
        shapes = ((num_tokens, vocabulary), (num_tokens,), (), (), ())
        return _Sums(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def over(self, world: World) -> _Sums:
        return _Sums(*map(world.sum, vars(self).values()))


def centroids(config: TrainConfig, out: str | Path, *, most: int, least: int) -> str:
    """Write the centroids of the model that the stage tunes, over its records, to `out`; what was found.

    Every rank of a launch takes its share. Raises ValueError for a stage without `objective.mcmi`, a file
    that is there already, and records without a frequent token.
    """
    term, path = mcmi_of(config), Path(out)
    if term is None:
        raise ValueError(
            "centroids need the temperature of objective.mcmi, which this stage does not have; add it"
        )
    if path.exists():
        raise ValueError(f"the output must be new; {path} exists: give another --out, or remove it")
    name = tuned_checkpoint(config)
    with peers():
        world = join(config.engine.device, timeout_minutes=config.engine.timeout_minutes)
        with world.together():
            source = source_in(config)
            processor, model = load_processor(name), load_config(name)
            reader = side_of(
                processor, model, config.data, config.student.template, templates=tables_of(config).templates
            )
            identity = identity_of(config, reader, source, term.temperature)
            tokens_K = frequent_tokens(source, reader, most=most, least=least).to(world.device)
        sums = _pass(config, world, name, (source, reader), tokens_K, term.temperature, path)
        has_rows_K = sums.rows_K > 0  # all rows of a token can be in records whose picture is bad
        centroids_KV = (sums.softmax_KV[has_rows_K] / sums.rows_K[has_rows_K, None]).float()
        stored = StoredCentroids(
            tokens_K=tokens_K[has_rows_K],
            centroids_KV=centroids_KV,
            rows_K=sums.rows_K[has_rows_K].long(),
            cross_entropy=float(sums.cross_entropy / sums.rows),
            identity=identity,
        )
        with world.together():
            if world.is_main:
                make_folder(path.parent)
                write_whole(path, [stored.write()])
    covered = sums.rows_K.sum()
    mean_KV = torch.special.entr(sums.softmax_KV / sums.rows_K[:, None].clamp_min(1)).sum(1)
    information = ((sums.rows_K * mean_KV).sum() - sums.entropy) / covered
    return (
        f"{len(stored.tokens_K)} tokens, after {float(covered / sums.rows):.1%} of {int(sums.rows)} answer "
        f"rows; at temperature {term.temperature:g} these rows contain {float(information):.5f} nats about "
        f"their input beyond the label; cross-entropy {stored.cross_entropy:.4f}: {path}"
    )


def _pass(
    config: TrainConfig,
    world: World,
    name: str,
    data: tuple[Source, Side],
    tokens_K: Tensor,
    temperature: float,
    path: Path,
) -> _Sums:
    """What all ranks sum over all records."""
    source, reader = data
    settings = TeacherConfig(
        checkpoint=name, dtype="bfloat16" if config.engine.precision == "bf16" else "float32"
    )
    parts = load_stock(name, dtype=DTYPES[settings.dtype])
    vocabulary = parts.stock.lm_head.weight.shape[0]
    predict = placed_teacher(settings, world, parts, shares_tower=False)
    row_of_V = row_of_tokens(tokens_K, vocabulary)
    sums = _Sums.zeros(len(tokens_K), vocabulary, world.device)
    bad_records = path.with_suffix(".bad_records.jsonl")
    records = RecordPass(
        world=world, rows=config.micro_batch_size, settings=config.data, bad_records=bad_records
    )
    for batch, _, own in records.batches(range(len(source)), source, reader):
        prediction = predict(batch)
        if not own:
            continue  # the repeated batch of a rank that has one less
        places_N = batch.student.places.response_N
        row_of_N = row_of_V[batch.student.targets_BT.flatten()[places_N]]
        entropy_M = add_softmaxes(
            sums.softmax_KV,
            prediction.hidden_BTD.flatten(0, 1)[places_N],
            prediction.head_VD,
            row_of_N,
            temperature=temperature,
            bias_V=prediction.bias_V,
            cap=prediction.cap,
        )
        sums.rows_K += torch.bincount(row_of_N[row_of_N != NONE], minlength=len(tokens_K))
        sums.entropy += entropy_M.double().sum()
        sums.cross_entropy += answer_rows(prediction, batch).double().sum()
        sums.rows += len(places_N)
    return sums.over(world)
