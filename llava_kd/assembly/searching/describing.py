"""Data sets as the store compares them, from any kind of records."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from llava_kd.assembly.parts.data import source_in
from llava_kd.assembly.settings import tables_of
from llava_kd.config import TrainConfig
from llava_kd.data.sources.conversation import Record, Source
from llava_kd.data.sources.kinds import Place, open_source
from llava_kd.search.store.entries import DataSet
from llava_kd.search.store.features import Seen, describe

MOST_RECORDS = 5000  # that are read, evenly spread
MOST_PICTURES = 200


def data_set_of(config: TrainConfig) -> DataSet:
    """Of a stage. ValueError or OSError where its records cannot be read any more."""
    name = config.data.path or ", ".join(str(part.path) for part in config.data.sources)
    tables_of(config)
    return described(source_in(config), name)


def data_set_in(path: str, images: str | None) -> DataSet:
    """Of a data file that no stage has used yet."""
    if not any(Path(path).parent.glob(Path(path).name)):
        raise ValueError(f"no data file {path}; give a LLaVA .json or .jsonl file, .tar or .parquet")
    return described(open_source(Place(path=path, images=images)), path)


def described(source: Source, name: str) -> DataSet:
    """Features of some records, evenly spread, and how many there are in all."""
    chosen = _spread(len(source), MOST_RECORDS)
    records = [(i, source.record(i)) for i in chosen]
    sound = [(i, record) for i, record in records if not record.fault]
    features = describe([_seen(record) for _, record in sound], _sizes(source, sound))
    features["records"] = float(len(source))
    return DataSet(fingerprint=_fingerprint(source, sound), name=name, features=features)


def _spread(count: int, most: int) -> Sequence[int]:
    return range(count) if count <= most else [k * count // most for k in range(most)]


def _seen(record: Record) -> Seen:
    questions = [turn.text for turn in record.turns if turn.role == "user"]
    answers = [turn.text for turn in record.turns if turn.role == "assistant"]
    talk = list(zip(questions, answers, strict=False))
    return Seen(talk=talk, num_pictures=len(record.images))


def _sizes(source: Source, records: Sequence[tuple[int, Record]]) -> list[tuple[int, int]]:
    """Width and height by the files' heads; a picture that cannot be read has none."""
    having = [i for i, record in records if record.images]
    sizes = []
    for k in _spread(len(having), MOST_PICTURES):
        try:
            with Image.open(io.BytesIO(source.image_bytes(having[k], 0))) as picture:
                sizes.append(picture.size)
        except (OSError, ValueError, Image.DecompressionBombError):
            continue
    return sizes


def _fingerprint(source: Source, records: Sequence[tuple[int, Record]]) -> str:
    """Of what was read, so that the same records in another folder are the same data."""
    digest = hashlib.sha256(str(len(source)).encode())
    for _, record in records:
        turns = [(turn.role, turn.text) for turn in record.turns]
        digest.update(repr((record.id, record.images, turns)).encode())
    return digest.hexdigest()[:16]
