"""Which models wrote the answers of a stage's data, and that its teacher is one with them.

Lightning OPD (arXiv 2604.13010): what a student says, rolled out once and scored once, teaches what a live
rollout does, if the teacher that scores also wrote the data that the student learned to answer from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from llava_kd.assembly.runs.provenance import WRITTEN_BY
from llava_kd.config import TrainConfig
from llava_kd.data.sources.entries import read_entries
from llava_kd.evaluation.generation.model_directory import model_directory
from llava_kd.evaluation.runner import model_fingerprint

_MARK, _LOOKED_AT = b'"elicited"', 1 << 16
_SUFFIXES = (".json", ".jsonl")
Role = Literal["student", "teacher", "other"]


@dataclass(frozen=True)
class Writer:
    """A model that answered records of `data`; `role` is what it is in the stage that reads them."""

    data: str
    model: str
    model_hash: str
    role: Role


def checked_writers(config: TrainConfig, parent: Mapping[str, object] | None) -> list[dict[str, str]]:
    """As run.json holds them. `parent`: the run that the student is of. ValueError as of the two parts."""
    found = writers(config)
    check_lineage(config, parent)
    return [asdict(writer) for writer in found]


def writers(config: TrainConfig) -> list[Writer]:
    """Those that `llava-kd data answer` left in the files of the stage, each once a file.

    Raises ValueError where there is a teacher, and a writer is neither it nor the student as it begins.
    """
    found = [(path, *said) for path in _files(config) for said in dict.fromkeys(_written(path))]
    if not found:
        return []
    own, teachers = _hashes([config.student.checkpoint]), _hashes(_teachers(config))
    roles: list[Writer] = []
    for path, model, model_hash in found:
        role: Role = "student" if model_hash in own else "teacher" if model_hash in teachers else "other"
        roles.append(Writer(str(path), model, model_hash, role))
    strange = [writer for writer in roles if writer.role == "other"]
    if teachers and strange:
        raise ValueError(
            "`teacher.checkpoint` must be the model that generated the answers of the data, or the "
            f"current student must have generated them: {strange[0].data} is by {strange[0].model} (hash "
            f"{strange[0].model_hash}), the teacher is {config.teacher and config.teacher.checkpoint} "
            f"(hash {teachers[0]}); generate the answers again with `llava-kd data answer label`, or use "
            "that model as teacher"
        )
    return roles


def check_lineage(config: TrainConfig, parent: Mapping[str, object] | None) -> None:
    """ValueError where the student was taught by answers of another model than the teacher, in any stage."""
    teachers = _hashes(_teachers(config)) if parent is not None else []
    while teachers and parent is not None:
        written = parent.get(WRITTEN_BY)
        for one in written if isinstance(written, list) else []:
            if one["role"] != "student" and one["model_hash"] not in teachers:
                raise ValueError(
                    "`teacher.checkpoint` must be the model that generated the student's earlier training "
                    f"data: {parent.get('run')} learned the answers of {one['model']} (hash "
                    f"{one['model_hash']}), the teacher is {config.teacher and config.teacher.checkpoint} "
                    f"(hash {teachers[0]}); use that model as teacher, or generate the data of that stage "
                    "with this teacher"
                )
        above = parent.get("parent")
        parent = above if isinstance(above, Mapping) else None


def _teachers(config: TrainConfig) -> list[str]:
    return [] if config.teacher is None else [config.teacher.checkpoint, *config.teacher.others]


def _hashes(names: Sequence[str | None]) -> list[str]:
    """Of models that are there: a student that is new has written nothing."""
    return [model_fingerprint(model_directory(name)) for name in names if name is not None]


def _files(config: TrainConfig) -> Iterator[Path]:
    for part in config.data.parts:
        path = Path(part.path)
        if path.suffix in _SUFFIXES and path.is_file():
            with path.open("rb") as stream:
                if _MARK in stream.read(_LOOKED_AT):
                    yield path


def _written(path: Path) -> Iterator[tuple[str, str]]:
    """Model and hash of each answered record; what filtered records has written nothing."""
    for entry in read_entries(path):
        origin = entry.get("elicited") if isinstance(entry, dict) else None
        while isinstance(origin, dict) and origin.get("how") != "label":
            origin = origin.get("of")
        if isinstance(origin, dict) and isinstance(origin.get("model_hash"), str):
            yield str(origin.get("model")), origin["model_hash"]
