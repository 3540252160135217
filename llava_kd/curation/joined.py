"""Several sources one after the other, each record once, and the groups that its records fall into."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from llava_kd.data.record_lists import RecordList
from llava_kd.data.sources.conversation import Record
from llava_kd.data.sources.kinds import FileSource

FILE, FOLDER = "file", "folder"


class Joined:
    """Records of several sources in their order; `names` are what the sources are reported by.

    `templates` has of each source the name of its own template, if it has one, as in `Mixture`.
    """

    def __init__(self, sources: Mapping[str, FileSource], templates: Sequence[str | None] = ()) -> None:
        """Raises ValueError for two sources of the same records."""
        self.names = tuple(sources)
        self._sources = tuple(sources.values())
        self._templates = tuple(templates) or (None,) * len(sources)
        prints = [source.fingerprint for source in self._sources]
        for name, print_ in sources.items():
            if prints.count(print_.fingerprint) > 1:
                raise ValueError(
                    f"{name} has the same records as another source; name it once, with a weight"
                )
        self._ends = np.cumsum([len(source) for source in self._sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def record(self, i: int) -> Record:
        part, number = self._find(i)
        record = self._sources[part].record(number)
        template = self._templates[part]
        return record if template is None else replace(record, template=template)

    def image_bytes(self, i: int, k: int) -> bytes:
        part, number = self._find(i)
        return self._sources[part].image_bytes(number, k)

    def name_of(self, i: int) -> str:
        return self.names[self._find(i)[0]]

    @property
    def fingerprint(self) -> str:
        parts = [source.fingerprint for source in self._sources]
        if any(self._templates):
            parts.append(repr(self._templates))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def lists(self, is_kept_R: np.ndarray) -> list[RecordList]:
        """What stays of each source. [records] bool; ValueError for a source of which nothing stays."""
        stops = self._ends.tolist()
        starts = [0, *stops[:-1]]
        return [
            RecordList(
                name=name,
                fingerprint=source.fingerprint,
                num_records=len(source),
                records=tuple(is_kept_R[start:stop].nonzero()[0].tolist()),
            )
            for name, source, start, stop in zip(self.names, self._sources, starts, stops, strict=True)
        ]

    def _find(self, i: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._ends, i, side="right"))
        return part, i - (int(self._ends[part - 1]) if part else 0)


def group_of(source: Joined, i: int, by: str) -> str:
    """Of record `i`: its source (`file`), with the first folder of its image (`folder`), or with a field."""
    name = source.name_of(i)
    if by == FILE:
        return name
    record, prefix = source.record(i), f"{name}: " if len(source.names) > 1 else ""
    if by == FOLDER:
        return prefix + (record.images[0].split("/")[0] if record.images else "no image")
    return prefix + record.extra.get(by, f"no {by}")


def groups(source: Joined, by: str) -> list[str]:
    """The group of every record. ValueError for a field that no record has."""
    found = [group_of(source, i, by) for i in range(len(source))]
    if by not in (FILE, FOLDER) and all(name.endswith(f"no {by}") for name in found):
        raise ValueError(
            f"--group {by}: no record has that field; give `{FILE}`, `{FOLDER}` (of the image), or a field "
            "of the records such as `type`"
        )
    return found
