"""A source that a plug-in opened: the same records in every process that reads them."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace

from llava_kd.data.sources.conversation import Record
from llava_kd.data.sources.kinds import FileSource, Place, SourceKind
from llava_kd.plugin_file import PluginFile, described

_MEMBERS = ("record", "image_bytes", "name_of", "fingerprint", "faults", "__len__")


class PluggedSource:
    """Passes everything on. A worker process that gets it imports the plug-in first."""

    def __init__(self, plugin: PluginFile, source: FileSource) -> None:
        self._plugin = plugin
        self._source = source

    def __getstate__(self) -> tuple[PluginFile, bytes]:
        return self._plugin, pickle.dumps(self._source)

    def __setstate__(self, state: tuple[PluginFile, bytes]) -> None:
        self._plugin, pickled = state
        self._plugin.module()
        self._source = pickle.loads(pickled)  # from the process that started this one, never from a file

    def __len__(self) -> int:
        return len(self._source)

    def record(self, i: int) -> Record:
        return self._source.record(i)

    def image_bytes(self, i: int, k: int) -> bytes:
        return self._source.image_bytes(i, k)

    def name_of(self, i: int) -> str:
        return self._source.name_of(i)

    @property
    def faults(self) -> Sequence[int]:
        return self._source.faults

    @property
    def fingerprint(self) -> str:
        """Of the records, and of the code that read them."""
        return f"{self._plugin.sha256} {self._source.fingerprint}"


def plugged(kind: SourceKind, plugin: PluginFile) -> SourceKind:
    """The kind, with what it opens held to what a source must be."""

    def opened(place: Place) -> FileSource:
        try:
            source = kind.open(place)
            _check(source, place)
            pickle.dumps(source)
        except ValueError as error:
            raise ValueError(f"plug-in {plugin.name}: {error}") from error
        except Exception as error:
            raise ValueError(f"plug-in {plugin.name} cannot open {place.path}: {described(error)}") from error
        return PluggedSource(plugin, source)

    return replace(kind, open=opened)


def _check(source: FileSource, place: Place) -> None:
    members = dir(source)
    if missing := [name for name in _MEMBERS if name not in members]:
        raise ValueError(f"the source that it opens for {place.path} has no {', '.join(missing)}")
    if len(source) < 1:
        raise ValueError(f"{place.path} has no records")
    first = source.record(0)
    if not isinstance(first, Record):
        raise ValueError(f"record 0 of {place.path} must be a Record; got {type(first).__name__}")
