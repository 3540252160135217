"""`llava-kd canary`: codes planted in a data file, and what a model remembers of them.

Shape legend: B rows, N response rows, D width, V rows of a head.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from llava_kd.assembly.curating.scoring import answer_rows
from llava_kd.assembly.parts.data import side_of
from llava_kd.assembly.parts.models import DTYPES
from llava_kd.assembly.parts.teacher import placed_teacher
from llava_kd.assembly.record_pass import RecordPass
from llava_kd.batch import Batch
from llava_kd.config import DataConfig, Dtype, TeacherConfig
from llava_kd.curation.canary import (
    Canary,
    Planted,
    by_beginning,
    candidates,
    drawn,
    exposure,
    make,
    spelled,
    table,
)
from llava_kd.data.batches.model_side import Side
from llava_kd.data.sources.conversation import Record
from llava_kd.data.sources.entries import read_entries
from llava_kd.data.sources.llava_json import read_confined
from llava_kd.distill.teaching.live import Teacher
from llava_kd.durable import make_folder, write_whole
from llava_kd.losses.reference import head_logits
from llava_kd.models.files.checkpoint import load_config, load_processor, load_stock
from llava_kd.models.mllm import Prediction
from llava_kd.parallel.world import World, join, peers

FOLDER = "canaries"
_ROWS = 128


@dataclass(frozen=True, kw_only=True)
class Planting:
    """What `insert` is asked: `count` codes, each in `repeats` records. `images` None: the folder of `data`.

    `renders` puts each code into a picture below the image root too.
    """

    data: str
    out: str
    count: int = 10
    digits: int = 4
    repeats: int = 1
    seed: int = 0
    renders: bool = False
    images: str | None = None


def canaries_of(out: str | Path) -> Path:
    """Where the canaries of a data file stand: beside it."""
    return Path(out).with_suffix(".canaries.json")


def insert(asked: Planting) -> str:
    """Copy a LLaVA file with canaries behind its records, and write which they are beside it; what to say.

    ValueError where the copy is there already, is the file itself, or its data have canaries.
    """
    data, out = Path(asked.data), Path(asked.out)
    if out.suffix not in (".json", ".jsonl"):
        raise ValueError(f"--out must be a .json or .jsonl file; got {out}")
    for path in (out, canaries_of(out)):
        if path.exists():
            raise ValueError(f"the output must be new; {path} exists: name another --out")
    entries = list(read_entries(data))
    names = {str(entry.get("id")) for entry in entries if isinstance(entry, dict)}
    planted = make(asked.count, digits=asked.digits, seed=asked.seed)
    if taken := [one.id for one in planted.canaries if any(name.startswith(one.id) for name in names)]:
        raise ValueError(
            f"the data must not contain canaries yet; {data} has a record {taken[0]!r}: use the original data"
        )
    if asked.renders:
        folder = Path(asked.images or data.parent) / FOLDER
        make_folder(folder)
        planted = Planted(
            digits=planted.digits, canaries=tuple(drawn(one, folder, FOLDER) for one in planted.canaries)
        )
    copies = [one.entry(k) for k in range(asked.repeats) for one in planted.canaries]
    write_whole(canaries_of(out), [planted.write()])
    write_whole(out, _written([*entries, *copies], is_lines=out.suffix == ".jsonl"))
    return (
        f"{len(entries)} records and {len(copies)} with a canary in {out}; the codes are in "
        f"{canaries_of(out)}"
    )


def _written(entries: Sequence[object], *, is_lines: bool) -> Iterator[bytes]:
    if is_lines:
        yield from (json.dumps(entry).encode() + b"\n" for entry in entries)
    else:
        yield json.dumps(entries, indent=0).encode() + b"\n"


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What `exposure` is asked. `images` None is the folder of `canaries`; `out` is for JSON, or None."""

    model: str
    canaries: str
    images: str | None = None
    out: str | None = None
    most: int = 10_000
    seed: int = 0
    dtype: Dtype = "float32"
    device: str = "auto"
    data: DataConfig | None = None


def audit(asked: Audit) -> str:
    """How exposed each canary is in a model, as a table; with `out` also as JSON."""
    if asked.most < 2:
        raise ValueError(f"--candidates must be at least 2; got {asked.most}")
    planted = Planted.read(Path(asked.canaries))
    with peers():
        world = join(asked.device, timeout_minutes=60)
        if world.size > 1:
            raise ValueError(
                f"`canary exposure` runs in one process, but {world.size} were launched; start it without "
                "a launcher"
            )
        found = list(_exposures(asked, planted, world))
    size = 10**planted.digits
    names = [one.id for one in planted.canaries]
    num_candidates = min(size, asked.most)
    if asked.out is not None:
        bits = [exposed for _, exposed in found]
        tree = {
            "model": asked.model,
            "candidates": num_candidates,
            "mean_exposure": sum(bits) / len(bits),
            "canaries": {n: {"rank": r, "exposure": e} for n, (r, e) in zip(names, found, strict=True)},
        }
        write_whole(Path(asked.out), [json.dumps(tree, indent=1).encode() + b"\n"])
    return table(names, found, num_candidates=num_candidates, size=size)


def _exposures(asked: Audit, planted: Planted, world: World) -> Iterator[tuple[float, float]]:
    settings = asked.data or DataConfig(path=asked.canaries, num_workers=0, max_bad_rate=0.0)
    processor, config = load_processor(asked.model), load_config(asked.model)
    reader = side_of(processor, config, settings)
    model = TeacherConfig(checkpoint=asked.model, dtype=asked.dtype)
    parts = load_stock(asked.model, dtype=DTYPES[asked.dtype])
    predict = placed_teacher(model, world, parts, shares_tower=False)
    root = Path(asked.images) if asked.images is not None else Path(asked.canaries).parent
    with TemporaryDirectory() as scratch:
        records = RecordPass(
            world=world, rows=_ROWS, settings=settings, bad_records=Path(scratch) / "bad_records.jsonl"
        )
        for canary in planted.canaries:
            codes = candidates(canary, planted.digits, asked.most, asked.seed)
            source = _Candidates([canary.asked(code) for code in codes], root.absolute())
            yield exposure(_likelihoods(canary, source, reader, predict, records))


def _likelihoods(
    canary: Canary, source: _Candidates, reader: Side, predict: Teacher, records: RecordPass
) -> list[float]:
    """Log p of each candidate's answer up to the end of its code."""
    encoder = reader.encoder()
    stop = len(canary.before) + len(canary.code)
    spellings = [spelled(encoder(source.record(i)), stop) for i in range(len(source))]
    groups = by_beginning(spellings)
    firsts = source.only([members[0] for members in groups.values()])
    found = [0.0] * len(spellings)
    last_of = list(groups.items())
    for batch, numbers, _ in records.batches(range(len(firsts)), firsts, reader):
        for number, (before, log_p_V) in zip(
            numbers, _endings(predict(batch), batch, last_of, numbers), strict=True
        ):
            for member in last_of[number][1]:
                found[member] = before + float(log_p_V[spellings[member][-1]])
    return found


def _endings(
    prediction: Prediction,
    batch: Batch,
    groups: list[tuple[tuple[int, ...], list[int]]],
    numbers: Sequence[int],
) -> Iterator[tuple[float, torch.Tensor]]:
    """Of each row the log p of all but the last token of its spelling, and [V] of what may follow."""
    inputs = batch.student
    ce_N = answer_rows(prediction, batch).double()
    rows_N = inputs.places.response_N
    row_of_N = rows_N // inputs.labels_BT.shape[1]
    hidden_D = prediction.hidden_BTD.flatten(0, 1)
    for b, number in enumerate(numbers):
        own = (row_of_N == b).nonzero().squeeze(1)
        length = len(groups[number][0])
        state_D = hidden_D[rows_N[own[length]]]
        with torch.no_grad():
            said = prediction.head_VD, prediction.bias_V, prediction.cap
            (logits_V,) = head_logits(state_D.unsqueeze(0), *said)
        yield -float(ce_N[own[:length]].sum()), logits_V.double().log_softmax(0).cpu()


class _Candidates:
    """Records in memory, with their pictures below a root."""

    def __init__(self, records: Sequence[Record], root: Path) -> None:
        self._records, self._root = list(records), root

    def __len__(self) -> int:
        return len(self._records)

    def only(self, numbers: Sequence[int]) -> _Candidates:
        return _Candidates([self._records[i] for i in numbers], self._root)

    def record(self, i: int) -> Record:
        return self._records[i]

    def image_bytes(self, i: int, k: int) -> bytes:
        return read_confined(self._root, self._records[i].images[k], follow_symlinks=False)

    def name_of(self, i: int) -> str:
        return "candidates"

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256("\0".join(record.id for record in self._records).encode()).hexdigest()
