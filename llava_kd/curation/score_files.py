"""What is found of records, one by one, on disk: JSON lines, gone on with after a kill.

Each rank appends to a file of its own, NAME.rankR.jsonl, in batches of whole lines.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Generic, TypeVar

from llava_kd.durable import Lines, make_folder
from llava_kd.evaluation.answers import mend


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What was found of a record. Raises ValueError where that is nonsense."""

    number: int
    id: str


Row = TypeVar("Row", bound=Scored)


class ScoreFiles(Generic[Row]):
    """The files of one name in a folder, a `row` a line."""

    def __init__(self, folder: Path, name: str, row: type[Row]) -> None:
        self._folder, self._name, self._row = folder, name, row

    def begin(self) -> None:
        """Cut off what a kill left half-written. One rank calls it, before any reads."""
        make_folder(self._folder)
        for path in self._paths():
            mend(path)

    def read(self) -> dict[int, Row]:
        """By record number. ValueError, with the line, for what is no score."""
        found: dict[int, Row] = {}
        for path in self._paths():
            for place, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
                if not line:
                    continue
                try:
                    one = self._row(**json.loads(line))
                except (ValueError, TypeError) as error:
                    raise ValueError(
                        f"{path}, line {place} is no score ({error}); delete that line"
                    ) from error
                found[one.number] = one
        return found

    def append(self, rank: int, found: Iterable[Row]) -> None:
        """Whole lines, flushed to the system at once."""
        lines = Lines(self._folder / f"{self._name}.rank{rank}.jsonl")
        with closing(lines):
            lines.write("".join(json.dumps(asdict(one)) + "\n" for one in found))

    def _paths(self) -> list[Path]:
        return sorted(self._folder.glob(f"{self._name}.rank*.jsonl"))


def missing(found: Mapping[int, object], num_records: int) -> list[int]:
    """Numbers that have none: never read, or bad when they were."""
    return [number for number in range(num_records) if number not in found]
