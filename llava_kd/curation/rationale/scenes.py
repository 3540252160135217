"""Evidence about pictures: scene graphs, and boxes, by record.

A scene graph is `{"objects": [...]}`, a list, or an object by name as GQA writes them; each has a `name`, and
may have `attributes` (values by kind, or a list of words), `relations` (`{"name": "left of", "object": KEY}`)
and a box (`box`: left, top, right, bottom, or `x`, `y`, `w`, `h`). Boxes are `{"boxes": [{"label", "box"}]}`,
with the `width` and `height` of the picture where places such as "top left" are to be read.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llava_kd.curation.rationale.claims import check_claim
from llava_kd.curation.rationale.evidence import Check, of_record, read_by_key
from llava_kd.curation.rationale.things import Box, Scene, Thing, Words
from llava_kd.data.sources.conversation import Record

_ROWS, _COLUMNS = ("top", "", "bottom"), ("left", "", "right")


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """Scenes by record; what words mean is taken from all of them together."""

    name: str
    scenes: Mapping[str, Scene]
    fingerprint: str
    words: Words = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", Words.of(self.scenes.values()))

    @property
    def keys(self) -> Collection[str]:
        return self.scenes.keys()

    def about(self, record: Record) -> Check | None:
        found = of_record(self.scenes, record)
        if found is None:
            return None
        scene: Scene = found  # pyright: ignore[reportAssignmentType]
        return lambda claim: check_claim(claim, scene, self.words)


def read_scene_graphs(path: str | Path) -> Scenes:
    """ValueError for a graph that is none, with its record."""
    return _read(path, "scene graphs", "objects")


def read_boxes(path: str | Path) -> Scenes:
    return _read(path, "boxes", "boxes")


def _read(path: str | Path, name: str, field_name: str) -> Scenes:
    by_key, fingerprint = read_by_key(path, name)
    scenes = {}
    for key, raw in by_key.items():
        try:
            if not isinstance(raw, Mapping):
                raise ValueError(f"must be an object with `{field_name}`, got {type(raw).__name__}")
            scenes[key] = _graph(raw) if field_name == "objects" else _boxes(raw)
        except ValueError as error:
            raise ValueError(f"{path}, record {key!r}: {error}") from None
    return Scenes(name=name, scenes=scenes, fingerprint=fingerprint)


def _listed(raw: Mapping, field_name: str) -> dict[str, Mapping]:
    """The objects of a field, by name or by their place."""
    given = raw.get(field_name)
    if isinstance(given, list):
        given = {str(k): one for k, one in enumerate(given)}
    if not isinstance(given, Mapping) or not all(isinstance(one, Mapping) for one in given.values()):
        raise ValueError(f"`{field_name}` must hold objects, got {str(given)[:80]}")
    return {str(name): one for name, one in given.items()}


def _graph(raw: Mapping) -> Scene:
    objects = _listed(raw, "objects")
    keys = {str(one.get("id", name)): k for k, (name, one) in enumerate(objects.items())}
    return tuple(_thing(one, keys) for one in objects.values())


def _thing(one: Mapping, keys: Mapping[str, int]) -> Thing:
    given = one.get("attributes") or {}
    if not isinstance(given, Mapping | list):
        raise ValueError(f"`attributes` are values by kind, or a list of words; got {str(given)[:80]}")
    relations: dict[str, set[int]] = {}
    for relation in one.get("relations") or []:
        to = str(relation.get("object")) if isinstance(relation, Mapping) else ""
        if not isinstance(relation, Mapping) or to not in keys or not relation.get("name"):
            raise ValueError(f"a relation has a `name` and the `object` it is to, got {str(relation)[:80]}")
        relations.setdefault(_text(relation["name"]), set()).add(keys[to])
    return Thing(
        name=_text(one.get("name")),
        attributes={str(k): _text(v) for k, v in given.items()} if isinstance(given, Mapping) else {},
        tags=frozenset(map(_text, given)) if isinstance(given, list) else frozenset(),
        relations={name: frozenset(to) for name, to in relations.items()},
        box=_box(one),
    )


def _boxes(raw: Mapping) -> Scene:
    width, height = raw.get("width"), raw.get("height")
    things = []
    for one in _listed(raw, "boxes").values():
        if (box := _box(one)) is None:
            raise ValueError(f"a box has a `label` and a `box`, got {str(one)[:80]}")
        place = _place(box, width, height) if width and height else {}
        things.append(Thing(name=_text(one.get("label")), attributes=place, box=box))
    return tuple(things)


def _place(box: Box, width: float, height: float) -> dict[str, str]:
    """The cell of a grid of three by three that the centre is in."""
    across, down = (box[0] + box[2]) / 2 / float(width), (box[1] + box[3]) / 2 / float(height)
    row, column = (min(2, max(0, int(3 * share))) for share in (down, across))
    return {"place": f"{_ROWS[row]} {_COLUMNS[column]}".strip() or "centre"}


def _box(one: Mapping) -> Box | None:
    given = one.get("box")
    if given is None and all(key in one for key in "xywh"):
        left, top, wide, high = (one[key] for key in "xywh")
        given = [left, top, left + wide, top + high]
    if given is None:
        return None
    is_box = isinstance(given, list) and len(given) == 4
    if not is_box or not all(isinstance(v, int | float) and math.isfinite(v) for v in given):
        raise ValueError(f"a box is four numbers: left, top, right, bottom; got {str(given)[:80]}")
    left, top, right, bottom = map(float, given)
    if right < left or bottom < top:
        raise ValueError(f"a box goes from left, top to right, bottom; got {given}")
    return left, top, right, bottom


def _text(value: object) -> str:
    if not isinstance(value, str | int | float) or not str(value).strip():
        raise ValueError(f"a name or a word is missing: got {str(value)[:80]}")
    return str(value).strip().lower()
