"""Things in a picture, and which of them a phrase such as "large red circles" means.

What a graph does not say of a thing is not known of it, and no claim about that can be read. A thing that is
in no graph is not there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

ANY = frozenset({"shape", "thing", "object", "one", "item"})  # names that mean every thing
_ARTICLE = re.compile(r"(?:the|an?|some|any)\s+", re.IGNORECASE)

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True, kw_only=True)
class Thing:
    """`attributes` are one value for each kind, as colour; `tags` are words of no kind; `relations` are the
    numbers of the things that this one is, say, left of.
    """

    name: str
    attributes: Mapping[str, str] = field(default_factory=dict)
    tags: frozenset[str] = frozenset()
    relations: Mapping[str, frozenset[int]] = field(default_factory=dict)
    box: Box | None = None


Scene = tuple[Thing, ...]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a phrase asks of a thing. A name of None is any."""

    name: str | None
    attributes: Mapping[str, str]
    tags: frozenset[str]

    def fits(self, thing: Thing) -> bool | None:
        """None where it is not known."""
        own = {kind: thing.attributes.get(kind) for kind in self.attributes}
        if self.name not in (None, thing.name):
            return False
        if any(value is not None and value != self.attributes[kind] for kind, value in own.items()):
            return False
        return None if None in own.values() or not self.tags <= thing.tags else True


@dataclass(frozen=True, kw_only=True)
class Words:
    """The words of a file of scenes: names of things, values by their kind, tags and relations."""

    names: frozenset[str]
    kinds: Mapping[str, str]
    tags: frozenset[str]
    relations: frozenset[str]

    @staticmethod
    def of(scenes: Iterable[Scene]) -> Words:
        things = [thing for scene in scenes for thing in scene]
        return Words(
            names=frozenset(thing.name for thing in things),
            kinds={value: kind for thing in things for kind, value in thing.attributes.items()},
            tags=frozenset(tag for thing in things for tag in thing.tags),
            relations=frozenset(name for thing in things for name in thing.relations),
        )

    def name(self, text: str) -> str | None:
        """The name in the singular; None where it is none."""
        text = text.lower()
        singular = next((form for form in _singulars(text) if form in self.names or form in ANY), None)
        return singular

    def read(self, phrase: str) -> Wanted | None:
        """Values and tags, then a name: all of the words, or None."""
        words = _ARTICLE.sub("", phrase.strip(), count=1).lower().split()
        attributes: dict[str, str] = {}
        tags: set[str] = set()
        while words:
            if name := self.name(" ".join(words)):
                return Wanted(name=None if name in ANY else name, attributes=attributes, tags=frozenset(tags))
            size = next((n for n in range(len(words) - 1, 0, -1) if self._is_value(" ".join(words[:n]))), 0)
            if not size:
                return None
            value, words = " ".join(words[:size]), words[size:]
            kind = self.kinds.get(value)
            if kind is None:
                tags.add(value)
            elif attributes.setdefault(kind, value) != value:
                return None
        return None

    def _is_value(self, text: str) -> bool:
        return text in self.kinds or text in self.tags


def _singulars(word: str) -> Iterable[str]:
    yield word
    if word.endswith("s"):
        yield word[:-1]
    if word.endswith("es"):
        yield word[:-2]
    if word.endswith("ies"):
        yield f"{word[:-3]}y"


def plural(name: str) -> str:
    if name.endswith(("s", "x", "ch", "sh")):
        return f"{name}es"
    return f"{name[:-1]}ies" if name.endswith("y") and name[-2:-1] not in "aeiou" else f"{name}s"
