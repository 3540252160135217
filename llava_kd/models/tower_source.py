"""Where a vision tower comes from: a local path or hub id, `timm:NAME` or `open_clip:NAME`.

Options follow a `?`, as in `timm:convnext_tiny?pretrained=false&image_size=256`: `pretrained=false` draws
random weights, `image_size=N` chooses the input size of a tower that takes several, and the rest goes to the
library's own constructor. docs/towers.md has the table of families.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

Option = str | int | float | bool | None | list[int]
SIZES = ("image_size", "img_size")  # timm's word and ours mean the same
LIBRARIES = ("transformers", "timm", "open_clip")


@dataclass(frozen=True, kw_only=True)
class TowerSource:
    """Which library makes the tower, from which name, with which options."""

    library: str
    name: str
    options: Mapping[str, Option] = field(default_factory=dict)

    @property
    def is_pretrained(self) -> bool:
        return self.options.get("pretrained", True) is not False

    @property
    def image_size(self) -> int | None:
        given = [self.options[key] for key in SIZES if key in self.options]
        if len(given) > 1:
            raise ValueError(f"vision tower {self.name} has two sizes, {' and '.join(SIZES)}; give one")
        value = given[0] if given else None
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"image_size of vision tower {self.name} must be pixels; got {value!r}")
        return value

    def constructor_options(self) -> dict[str, Option]:
        """What is left for the library."""
        return {k: v for k, v in self.options.items() if k not in ("pretrained", *SIZES)}


def tower_source(text: str) -> TowerSource:
    """Read `[library:]name[?option=value&...]`. Raises ValueError for an unknown library or a bad option."""
    text, _, query = text.partition("?")
    library, colon, name = text.partition(":")
    if not colon:
        library, name = _library_of_directory(Path(text)), text
        if library == "transformers" and text.startswith("timm/"):
            library = "timm"
    elif library not in LIBRARIES:
        raise ValueError(
            f"vision tower {text!r}: no library {library!r}{nearest(library, LIBRARIES)}; a prefix is one of "
            f"{', '.join(LIBRARIES)}, or there is none"
        )
    if not name:
        raise ValueError(f"vision tower {text!r} has no name after its library")
    options: dict[str, Option] = {}
    for item in filter(None, query.split("&")):
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ValueError(f"vision tower options look like ?pretrained=false&depth=2; got {item!r}")
        options[key] = _value(value)
    return TowerSource(library=library, name=name, options=options)


def _library_of_directory(path: Path) -> str:
    """By the config file that each library writes; transformers' where the path is no directory."""
    if (path / "open_clip_config.json").is_file():
        return "open_clip"
    config = path / "config.json"
    if config.is_file() and "model_type" not in (tree := json.loads(config.read_text())):
        return "timm" if "architecture" in tree else "transformers"
    return "transformers"


def _value(text: str) -> Option:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def nearest(word: str, choices: Iterable[str]) -> str:
    """` (did you mean ...?)`, or nothing where no choice is near."""
    near = difflib.get_close_matches(word, list(choices), n=3)
    return f" (did you mean {', '.join(near)}?)" if near else ""


def nearest_neighbours(path: Path) -> str:
    """` (did you mean ...?)` with directories beside the one that is missing."""
    if not path.parent.is_dir():
        return ""
    return nearest(path.name, [child.name for child in path.parent.iterdir() if child.is_dir()])
