"""What is drawn: things with a one-word name, their group, the words that go with them; and by whom."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Unicode's groups that hold things rather than people and signs, as the questions call them.
GROUPS = {
    "Animals & Nature": "nature",
    "Food & Drink": "food",
    "Travel & Places": "travel",
    "Objects": "objects",
}
_SPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
KEYWORDS = 3  # of a thing, in its text record


@dataclass(frozen=True, kw_only=True)
class Thing:
    name: str
    group: str
    keywords: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Artist:
    """A set of drawings: `icons` by name without spaces and signs; SVG bodies in a box of their own size."""

    name: str
    icons: Mapping[str, Mapping[str, Any]]

    def svg(self, thing: Thing) -> str:
        icon = self.icons[key_of(thing.name)]
        box = " ".join(str(icon.get(side, 0)) for side in ("left", "top", "width", "height"))
        body = icon["body"]
        return f'<svg {_SPACES} viewBox="{box}">{body}</svg>'


def key_of(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def read_artist(folder: Path, name: str) -> Artist:
    """Of an unpacked `@iconify-json` package. Raises ValueError for a folder that is none."""
    path = folder / "package" / "icons.json"
    if not path.is_file():
        raise ValueError(f"{path} is not there: fetch {name} again")
    tree = json.loads(path.read_text(encoding="utf-8"))
    sides = {side: tree[side] for side in ("left", "top", "width", "height") if side in tree}
    sides = {"width": 16, "height": 16, **sides}  # the format's defaults
    icons = {key_of(key): {**sides, **icon} for key, icon in tree["icons"].items() if not icon.get("hidden")}
    return Artist(name=name, icons=icons)


def read_things(names: Path, keywords: Path | None) -> list[Thing]:
    """Of `unicode-emoji-json` and, where it is there, `emojilib`: those with a plain one-word name."""
    tree = json.loads(names.read_text(encoding="utf-8"))
    words = {} if keywords is None else json.loads(keywords.read_text(encoding="utf-8"))
    things = []
    for emoji, entry in tree.items():
        name, group = entry["name"].lower(), GROUPS.get(entry["group"])
        if group is not None and re.fullmatch("[a-z]+", name):
            things.append(Thing(name=name, group=group, keywords=_plain(words.get(emoji, ()), name)))
    return things


def _plain(words: Sequence[str], name: str) -> tuple[str, ...]:
    plain = [word for word in words if re.fullmatch("[a-z]{3,}", word) and word != name]
    return tuple(dict.fromkeys(plain))[:KEYWORDS]


def chosen(things: Sequence[Thing], artists: Sequence[Artist], count: int) -> list[Thing]:
    """Those that every artist has drawn, the shortest names of each group first, as many of each group.

    A group that is too small leaves its share. Raises ValueError where fewer than 8 are left.
    """
    drawn = [t for t in things if all(key_of(t.name) in artist.icons for artist in artists)]
    picked = []
    for group in GROUPS.values():
        of_group = sorted((t for t in drawn if t.group == group), key=lambda t: (len(t.name), t.name))
        picked += of_group[: max(1, count // len(GROUPS))]
    if len(picked) < 8:
        raise ValueError(
            f"only {len(picked)} things are drawn by all of {', '.join(a.name for a in artists)}; it takes 8"
        )
    return picked


def held_out(things: Sequence[Thing], every: int = 7) -> list[Thing]:
    """Each `every`th of a group: those that no training sees, by whichever artist."""
    out = []
    for group in GROUPS.values():
        of_group = [t for t in things if t.group == group]
        out += of_group[every - 1 :: every] or of_group[-1:]
    return out
