"""What is said and asked about a hard scene. Every question has one answer, and no answer is a close call.

Each says which colour-shape pairs it turns on: those of the things that it names by colour or shape, or asks
for the colour or shape of. A thing that is named by its label alone is found without either.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from llava_kd.data.shapes.hard.labels import LABELS
from llava_kd.data.shapes.hard.scenes import HELD_OUT_PAIRS, SEEN_PAIRS, HardScene, Pair, Thing
from llava_kd.data.shapes.questions import Question
from llava_kd.data.shapes.scenes import COLOURS, SHAPES, SIZES

TYPES = ("colour", "shape", "count", "exist", "position", "compare", "nearest", "outermost", "read")
MARGIN = 8  # pixels by which one centre is left of, or above, another that it is compared with
NEARER = 1.25  # the second nearest centre is this many times as far away, or the nearest is not asked for

Named = tuple[Thing, str, str]  # a thing, a name that points at it alone, and what kind of name that is


def caption(scene: HardScene) -> str:
    """Every shape with all it has, in reading order."""
    parts = [
        f"a {t.size} {t.colour} {t.shape}{f' labelled {t.label}' if t.label else ''} at the {t.place}"
        for t in scene
    ]
    sentence = ", ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}."


def questions(scene: HardScene, rng: random.Random) -> list[Question]:
    """Questions that name seen pairs only, where the scene shows no others; `rng` picks the absent."""
    return _questions(scene, rng, SEEN_PAIRS)


def questions_of_unseen_pairs(scene: HardScene, rng: random.Random) -> list[Question]:
    """Those questions that turn on a pair that training never shows."""
    asked = _questions(scene, rng, HELD_OUT_PAIRS)
    return [question for question in asked if question.pairs & set(HELD_OUT_PAIRS)]


def _questions(scene: HardScene, rng: random.Random, absent: Sequence[Pair]) -> list[Question]:
    named = list(_named(scene))
    return [
        *_colour_questions(scene),
        *_shape_questions(scene),
        *_count_questions(scene, named, absent),
        *_exist_questions(scene, rng, absent),
        *_position_questions(named),
        *_compare_questions(named),
        *_nearest_questions(scene, named),
        *_outermost_questions(scene),
        *_read_questions(named),
    ]


def _turning_on(things: Sequence[Thing]) -> frozenset[Pair]:
    return frozenset(thing.pair for thing in things)


def _by_look(kind: str, *things: Thing) -> tuple[Thing, ...]:
    """Those of the things that a name of this kind finds by colour or shape: all or none."""
    return () if kind == "by label" else things


def _alone(
    scene: HardScene, key: Callable[[Thing], tuple[str, ...]]
) -> Iterator[tuple[Thing, tuple[str, ...]]]:
    """The things that share `key` with no other thing."""
    counts = Counter(key(thing) for thing in scene)
    return ((thing, key(thing)) for thing in scene if counts[key(thing)] == 1)


def _named(scene: HardScene) -> Iterator[Named]:
    for thing, (shape,) in _alone(scene, lambda t: (t.shape,)):
        yield thing, shape, "by shape"
    for thing, (colour,) in _alone(scene, lambda t: (t.colour,)):
        yield thing, f"{colour} shape", "by colour"
    for thing, pair in _alone(scene, lambda t: t.pair):
        yield thing, " ".join(pair), "by both"
    shared = Counter(thing.pair for thing in scene)
    for thing, key in _alone(scene, lambda t: (t.size, *t.pair)):
        if shared[thing.pair] > 1:
            yield thing, " ".join(key), "by all"
    for thing in scene:
        if thing.label:
            yield thing, f"shape labelled {thing.label}", "by label"


def _colour_questions(scene: HardScene) -> Iterator[Question]:
    shared = Counter(thing.shape for thing in scene)
    names = [(thing, shape, "shape") for thing, (shape,) in _alone(scene, lambda t: (t.shape,))]
    names += [
        (thing, " ".join(key), "size shape")
        for thing, key in _alone(scene, lambda t: (t.size, t.shape))
        if shared[thing.shape] > 1
    ]
    names += [(thing, f"shape labelled {thing.label}", "label") for thing in scene if thing.label]
    for thing, name, form in names:
        yield _about(
            [thing], type="colour", form=form, text=f"What colour is the {name}?", answer=thing.colour
        )


def _shape_questions(scene: HardScene) -> Iterator[Question]:
    shared = Counter(thing.colour for thing in scene)
    asked = [
        (thing, f"What shape is the {colour} one?", "colour")
        for thing, (colour,) in _alone(scene, lambda t: (t.colour,))
    ]
    asked += [
        (thing, f"What shape is the {' '.join(key)} one?", "size colour")
        for thing, key in _alone(scene, lambda t: (t.size, t.colour))
        if shared[thing.colour] > 1
    ]
    asked += [(thing, f"What shape is labelled {thing.label}?", "label") for thing in scene if thing.label]
    for thing, text, form in asked:
        yield _about([thing], type="shape", form=form, text=text, answer=thing.shape)


def _about(things: Sequence[Thing], *, type: str, form: str, text: str, answer: str) -> Question:
    return Question(type=type, form=form, text=text, answer=answer, pairs=_turning_on(things))


def _plural(shape: str) -> str:
    return "crosses" if shape == "cross" else f"{shape}s"


def _count_questions(scene: HardScene, named: list[Named], absent: Sequence[Pair]) -> Iterator[Question]:
    yield _count(scene, "all", "shapes are there")
    for size in SIZES:
        yield _count([t for t in scene if t.size == size], "size", f"{size} shapes are there")
    for colour in COLOURS:
        counted = [t for t in scene if t.colour == colour]
        yield _count(counted, "colour", f"{colour} shapes are there", _turning_on(counted))
    for shape in SHAPES:
        counted = [t for t in scene if t.shape == shape]
        yield _count(counted, "shape", f"{_plural(shape)} are there", _turning_on(counted))
    for colour, shape in sorted({*absent, *_turning_on(scene)}):
        counted = [t for t in scene if t.pair == (colour, shape)]
        what = f"{colour} {_plural(shape)} are there"
        yield _count(counted, "both", what, frozenset([(colour, shape)]))
    for anchor, name, kind in named:
        others = [t for t in scene if t is not anchor]
        for side, gap in _SIDES.items():
            if all(abs(gap(t, anchor)) >= MARGIN for t in others):
                counted = [t for t in others if gap(t, anchor) > 0]
                yield _count(
                    counted, side, f"shapes are {side} the {name}", _turning_on(_by_look(kind, anchor))
                )


def _count(counted: Sequence[Thing], form: str, what: str, pairs: frozenset[Pair] = frozenset()) -> Question:
    answer = str(len(counted))
    return Question(type="count", form=form, text=f"How many {what}?", answer=answer, pairs=pairs)


def _exist_questions(scene: HardScene, rng: random.Random, absent: Sequence[Pair]) -> Iterator[Question]:
    for colour in COLOURS:
        yield _exist("by colour", f"{colour} shape", [t for t in scene if t.colour == colour])
    for shape in SHAPES:
        yield _exist("by shape", shape, [t for t in scene if t.shape == shape])
    present = sorted(_turning_on(scene))
    for pair in present:
        yield _exist("by both", " ".join(pair), [t for t in scene if t.pair == pair])
    for pair in _absent_pairs(present, rng, absent):
        text = f"Is there {_article(pair[0])} {' '.join(pair)}?"
        yield Question(type="exist", form="by both", text=text, answer="no", pairs=frozenset([pair]))
    labels = [t.label for t in scene if t.label]
    for label in labels:
        yield _exist("by label", f"shape labelled {label}", [t for t in scene if t.label == label])
        other = _misread(label, rng)
        if other not in labels:
            yield _exist("by label", f"shape labelled {other}", [])


def _absent_pairs(present: Sequence[Pair], rng: random.Random, absent: Sequence[Pair]) -> list[Pair]:
    """As many as are present, if there are; of half, colour and shape are in the scene, but apart."""
    missing = [pair for pair in absent if pair not in present]
    colours, shapes = {c for c, _ in present}, {s for _, s in present}
    swapped = [(c, s) for c, s in missing if c in colours and s in shapes]
    pairs = rng.sample(swapped, min(len(swapped), (len(present) + 1) // 2))
    rest = [pair for pair in missing if pair not in pairs]
    return pairs + rng.sample(rest, min(len(rest), len(present) - len(pairs)))


def _misread(label: str, rng: random.Random) -> str:
    """The label with another letter, or another digit."""
    letter, digit = label
    return rng.choice(
        [other for other in LABELS if other != label and (other[0] == letter or other[1] == digit)]
    )


def _exist(form: str, name: str, found: Sequence[Thing]) -> Question:
    """It turns on a pair where that pair alone makes the answer yes, and not a label."""
    pairs = _turning_on(_by_look(form, *found))
    return Question(
        type="exist",
        form=form,
        text=f"Is there {_article(name)} {name}?",
        answer="yes" if found else "no",
        pairs=pairs if len(pairs) == 1 else frozenset(),
    )


def _article(name: str) -> str:
    return "an" if name[0] in "aeiou" else "a"


def _position_questions(named: list[Named]) -> Iterator[Question]:
    for thing, name, kind in named:
        text = f"Where is the {name}?"
        yield _about(_by_look(kind, thing), type="position", form=kind, text=text, answer=thing.place)


# Pixels by which the first thing is on that side of the second.
_SIDES: dict[str, Callable[[Thing, Thing], int]] = {
    "left of": lambda a, b: b.x - a.x,
    "right of": lambda a, b: a.x - b.x,
    "above": lambda a, b: b.y - a.y,
    "below": lambda a, b: a.y - b.y,
}


def _compare_questions(named: list[Named]) -> Iterator[Question]:
    """Both orders of two things with names of one kind, and only what strictly holds or fails to."""
    for (a, name_a, kind), (b, name_b, kind_b) in itertools.permutations(named, 2):
        if kind == kind_b:
            for relation, holds in _relations(a, b, kind):
                yield _about(
                    _by_look(kind, a, b),
                    type="compare",
                    form=f"{relation} {kind}",
                    text=f"Is the {name_a} {relation} the {name_b}?",
                    answer="yes" if holds else "no",
                )


def _relations(a: Thing, b: Thing, kind: str) -> Iterator[tuple[str, bool]]:
    """The relations that `a` has to `b`, or clearly has not."""
    for side, gap in _SIDES.items():
        if abs(gap(a, b)) >= MARGIN:
            yield side, gap(a, b) > 0
    if a.size != b.size and kind != "by all":  # a name with a size answers by itself
        yield "larger than", a.size == "large"
        yield "smaller than", a.size == "small"


def _nearest_questions(scene: HardScene, named: list[Named]) -> Iterator[Question]:
    for anchor, name, kind in named:
        away = sorted(
            (math.dist((t.x, t.y), (anchor.x, anchor.y)), i) for i, t in enumerate(scene) if t is not anchor
        )
        (first, i), (second, _) = away[:2]
        if second >= NEARER * first:
            nearest, things = scene[i], (*_by_look(kind, anchor), scene[i])
            text = f"What colour is the shape nearest to the {name}?"
            yield _about(things, type="nearest", form=f"colour {kind}", text=text, answer=nearest.colour)
            text = f"What shape is nearest to the {name}?"
            yield _about(things, type="nearest", form=f"shape {kind}", text=text, answer=nearest.shape)


_ENDS: dict[str, Callable[[Thing], int]] = {
    "leftmost": lambda t: t.x,
    "rightmost": lambda t: -t.x,
    "highest": lambda t: t.y,
    "lowest": lambda t: -t.y,
}


def _outermost_questions(scene: HardScene) -> Iterator[Question]:
    for end, at in _ENDS.items():
        first, second, *_ = sorted(scene, key=at)
        if at(second) - at(first) >= MARGIN:
            text = f"What colour is the {end} shape?"
            yield _about([first], type="outermost", form=f"colour {end}", text=text, answer=first.colour)
            text = f"What shape is the {end} one?"
            yield _about([first], type="outermost", form=f"shape {end}", text=text, answer=first.shape)


def _read_questions(named: list[Named]) -> Iterator[Question]:
    for thing, name, form in named:
        if thing.label and form != "by label":
            text = f"What is written on the {name}?"
            yield _about([thing], type="read", form=form, text=text, answer=thing.label)
