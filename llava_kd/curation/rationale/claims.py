"""Sentences about the things of a picture, read whole or not at all, and held against its scene.

    There are two red circles (at the top).      The number of red circles is 2.
    The large circle is red / a circle / at the top left.      The star is left of the red circle.

A sentence of another form, with a word that no scene knows, or whose truth the scene does not say, cannot be
read: nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from llava_kd.curation.rationale.evidence import Verdict
from llava_kd.curation.rationale.things import ANY, Scene, Thing, Wanted, Words, plural

_NUMBERS = (
    "no",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)
_COUNT = rf"(?P<count>an?|zero|\d{{1,4}}|{'|'.join(_NUMBERS)})"
_PLACED = r"(?P<placed>\s+(?:at|in|on)\s+the\s+(?P<place>.+?))??"
_PICTURE = re.compile(r"\s+in\s+the\s+(?:picture|image|scene|photo)$", re.IGNORECASE)
_THERE = re.compile(rf"there\s+(?P<verb>is|are)\s+{_COUNT}\s+(?P<what>.+?){_PLACED}", re.IGNORECASE)
_NUMBER_OF = re.compile(rf"the\s+number\s+of\s+(?P<what>.+?)\s+is\s+{_COUNT}", re.IGNORECASE)
_IS = re.compile(
    r"the\s+(?P<what>.+?)\s+is\s+(?P<lead>(?:at\s+the|in\s+the|on\s+the|an?|of\s+colou?r)\s+)?(?P<value>.+?)",
    re.IGNORECASE,
)
_OPPOSITES = {
    "left of": "right of",
    "above": "below",
    "larger than": "smaller than",
    "in front of": "behind",
}
_OPPOSITES |= {opposite: relation for relation, opposite in _OPPOSITES.items()}
_SAME = {
    "to the left of": "left of",
    "on the left of": "left of",
    "to the right of": "right of",
    "on the right of": "right of",
    "over": "above",
    "under": "below",
    "beneath": "below",
    "bigger than": "larger than",
}


def check_claim(claim: str, scene: Scene, words: Words) -> Verdict | None:
    """None where the claim cannot be read."""
    said = claim.strip()
    body = said.rstrip(".! ")
    end = said[len(body) :]
    if picture := _PICTURE.search(body):
        end, body = body[picture.start() :] + end, body[: picture.start()]
    for form in (_there, _number_of, _relation, _value):
        if (verdict := form(body, scene, words)) is not None:
            correction = verdict.correction and verdict.correction + end
            return replace(verdict, correction=correction)
    return None


def _split(scene: Scene, wanted: Wanted) -> tuple[list[int], list[int]]:
    """Numbers of the things that fit, and of those of which it is not known."""
    fits = [wanted.fits(thing) for thing in scene]
    return [k for k, fit in enumerate(fits) if fit], [k for k, fit in enumerate(fits) if fit is None]


def _there(body: str, scene: Scene, words: Words) -> Verdict | None:
    if not (found := _THERE.fullmatch(body)):
        return None
    wanted = words.read(found["what"])
    if wanted is not None and found["place"]:
        kind = words.kinds.get(place := found["place"].lower())
        if kind is None or wanted.attributes.get(kind, place) != place:
            return None
        wanted = replace(wanted, attributes={**wanted.attributes, kind: place})

    def corrected(number: int) -> str:
        is_one = number == 1
        name = found["what"].split()[-1]
        singular = words.name(name) or name
        noun = singular if is_one else plural(singular)
        what = found["what"][: len(found["what"]) - len(name)] + noun
        there = found[0][: found.start("verb")]
        return (
            f"{there}{'is' if is_one else 'are'} {_as(number, found['count'])} {what}{found['placed'] or ''}"
        )

    return _counted(found["count"], wanted, scene, corrected)


def _number_of(body: str, scene: Scene, words: Words) -> Verdict | None:
    if not (found := _NUMBER_OF.fullmatch(body)):
        return None

    def corrected(number: int) -> str:
        return body[: found.start("count")] + _as(number, found["count"])

    return _counted(found["count"], words.read(found["what"]), scene, corrected)


def _counted(
    count: str, wanted: Wanted | None, scene: Scene, corrected: Callable[[int], str]
) -> Verdict | None:
    if wanted is None:
        return None
    sure, unsure = _split(scene, wanted)
    count = count.lower()
    fact = f"it has {len(sure)} of them"
    if count in ("a", "an"):
        if unsure and not sure:
            return None
        # That there is none is what a graph says, and no sentence to go on from.
        return Verdict(holds=bool(sure), fact=fact)
    if unsure:
        return None
    number = _NUMBERS.index(count) if count in _NUMBERS else 0 if count == "zero" else int(count)
    holds = number == len(sure)
    return Verdict(holds=holds, fact=fact, correction="" if holds else corrected(len(sure)))


def _as(number: int, like: str) -> str:
    """A number in digits or in a word, as another was written."""
    if like.isdecimal() or number >= len(_NUMBERS):
        return str(number)
    return "zero" if number == 0 and like.lower() == "zero" else _NUMBERS[number]


def _value(body: str, scene: Scene, words: Words) -> Verdict | None:
    found = _IS.fullmatch(body)
    wanted = found and words.read(found["what"])
    if not found or not wanted:
        return None
    value, name = found["value"].lower(), words.name(found["value"])
    if value in words.kinds:
        kind = words.kinds[value]
        own = [thing.attributes.get(kind) for thing in scene]
    elif name is not None and name not in ANY:
        value, own = name, [thing.name for thing in scene]
    elif value in words.tags:
        own = [value if value in thing.tags else None for thing in scene]  # a graph lists some of them
    else:
        return None
    sure, unsure = _split(scene, wanted)
    if unsure or not sure:
        return None if unsure else Verdict(holds=False, fact=f"it has no {found['what']}")
    values = {own[k] for k in sure}
    if None in values or (value in values and len(values) > 1):
        return None
    if values == {value}:
        return Verdict(holds=True, fact=f"{found['what']}: {value}")
    fact = f"{found['what']}: {', '.join(sorted(filter(None, values)))}"
    if len(values) > 1:
        return Verdict(holds=False, fact=fact)
    (true,) = filter(None, values)
    lead = found["lead"] or ""
    if lead.strip().lower() in ("a", "an"):
        lead = "an " if true[0] in "aeiou" else "a "
    return Verdict(holds=False, fact=fact, correction=body[: found.end("what")] + f" is {lead}{true}")


def _relation(body: str, scene: Scene, words: Words) -> Verdict | None:
    known = sorted({*_OPPOSITES, *_SAME, *words.relations}, key=len, reverse=True)
    names = "|".join(map(re.escape, known))
    pattern = rf"the\s+(?P<first>.+?)\s+is\s+(?P<relation>{names})\s+(?:the|an?)\s+(?P<second>.+?)"
    if not (found := re.fullmatch(pattern, body, re.IGNORECASE)):
        return None
    sides = [words.read(found[side]) for side in ("first", "second")]
    if sides[0] is None or sides[1] is None:
        return None
    numbers = []
    for side, wanted in zip(("first", "second"), filter(None, sides), strict=True):
        sure, unsure = _split(scene, wanted)
        if not sure and not unsure:
            return Verdict(holds=False, fact=f"it has no {found[side]}")
        if unsure or len(sure) > 1:
            return None
        numbers.append(sure[0])
    written = found["relation"].lower()
    relation = _SAME.get(written, written)
    holds = _related(scene, numbers[0], numbers[1], relation)
    if holds is None:
        return None
    true = relation if holds else _OPPOSITES[relation]
    fact = f"the {found['first']} is {true} the {found['second']}"
    lead = "to the " if written.startswith("to the ") and true in ("left of", "right of") else ""
    correction = body[: found.start("relation")] + lead + true + body[found.end("relation") :]
    return Verdict(holds=holds, fact=fact, correction="" if holds else correction)


def _related(scene: Scene, first: int, second: int, relation: str) -> bool | None:
    """By the graph, else by the boxes; a relation without an opposite is never known to be wrong."""
    a, b, opposite = scene[first], scene[second], _OPPOSITES.get(relation)
    if second in _said(a, relation) or (opposite and first in _said(b, opposite)):
        return True
    if opposite and (second in _said(a, opposite) or first in _said(b, relation)):
        return False
    if a.box is None or b.box is None:
        return None
    (x_a, y_a, size_a), (x_b, y_b, size_b) = _measures(a), _measures(b)
    amount = {
        "left of": x_b - x_a,
        "right of": x_a - x_b,
        "above": y_b - y_a,
        "below": y_a - y_b,
        "larger than": size_a - size_b,
        "smaller than": size_b - size_a,
    }.get(relation)
    return amount > 0 if amount else None


def _said(thing: Thing, relation: str) -> set[int]:
    names = [relation, *(name for name, same in _SAME.items() if same == relation)]
    return {number for name in names for number in thing.relations.get(name, ())}


def _measures(thing: Thing) -> tuple[float, float, float]:
    """Centre and area."""
    assert thing.box is not None
    left, top, right, bottom = thing.box
    return (left + right) / 2, (top + bottom) / 2, (right - left) * (bottom - top)
