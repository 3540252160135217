"""Scenes of the hard setting: three to nine shapes at free places of 96 by 96 pixels, some with a label."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from llava_kd.data.shapes.hard.labels import LABELS
from llava_kd.data.shapes.scenes import CELLS, COLOURS, GRID, SHAPES

SIDE = 96
FEWEST, MOST = 3, 9
# In no picture, caption or question but of their own test; each colour and each shape is in one or two.
HELD_OUT_PAIRS = (
    ("red", "star"),
    ("orange", "cross"),
    ("green", "circle"),
    ("cyan", "triangle"),
    ("blue", "square"),
    ("purple", "star"),
)
PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
SEEN_PAIRS = tuple(pair for pair in PAIRS if pair not in HELD_OUT_PAIRS)
ROOM = {
    "small": 6.5,
    "large": 12.5,
}  # half the side of the square that a shape may fill and nothing else may touch

_CLEAR = 3  # pixels from a centre to the next line of the grid of nine, so that every place has one name
_MOST_LARGE = 4
_LABELLED = 0.7  # of the large ones, which alone have room for a label
_TRIES = 60

Pair = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One shape: `x` and `y` are its centre's pixel from the top left, `label` is "" where it has none."""

    x: int
    y: int
    colour: str
    shape: str
    size: str
    label: str

    @property
    def cell(self) -> int:
        """Its place among nine, row by row."""
        return self.y * GRID // SIDE * GRID + self.x * GRID // SIDE

    @property
    def place(self) -> str:
        return CELLS[self.cell]

    @property
    def pair(self) -> Pair:
        return self.colour, self.shape


HardScene = tuple[Thing, ...]  # in reading order


def random_scene(rng: random.Random) -> HardScene:
    """A scene of seen pairs; often of few colours or few forms, so that there is much to count."""
    return _scene(rng, _few_pairs(rng, rng.randint(FEWEST, MOST)))


def random_scene_of_unseen_pairs(rng: random.Random) -> HardScene:
    """A scene in which one to three shapes are of pairs that training never shows."""
    pairs = _few_pairs(rng, rng.randint(FEWEST, MOST))
    for i in rng.sample(range(len(pairs)), rng.randint(1, FEWEST)):
        pairs[i] = rng.choice(HELD_OUT_PAIRS)
    return _scene(rng, pairs)


def _few_pairs(rng: random.Random, num_things: int) -> list[Pair]:
    choice: list[Pair] = []
    while not choice:
        colours = rng.sample(COLOURS, rng.choice((1, 2, 3, 4, len(COLOURS), len(COLOURS))))
        shapes = rng.sample(SHAPES, rng.choice((1, 2, 3, len(SHAPES), len(SHAPES))))
        choice = [(c, s) for c in colours for s in shapes if (c, s) in SEEN_PAIRS]
    return [rng.choice(choice) for _ in range(num_things)]


def _scene(rng: random.Random, pairs: list[Pair]) -> HardScene:
    num_large = min(sum(rng.random() < 0.5 for _ in pairs), _MOST_LARGE)
    sizes = ["large"] * num_large + ["small"] * (len(pairs) - num_large)
    places = None
    while places is None:
        places = _places(rng, sizes)
    labels = iter(rng.sample(LABELS, num_large))
    things = [
        Thing(x=x, y=y, colour=colour, shape=shape, size=size, label=_label(rng, size, labels))
        for (x, y), size, (colour, shape) in zip(places, sizes, pairs, strict=True)
    ]
    return tuple(sorted(things, key=lambda thing: (thing.cell, thing.y, thing.x)))


def _label(rng: random.Random, size: str, labels: Iterator[str]) -> str:
    return next(labels) if size == "large" and rng.random() < _LABELLED else ""


def _places(rng: random.Random, sizes: list[str]) -> list[tuple[int, int]] | None:
    """A centre for each, its square apart from all others; None where there was no room left."""
    places: list[tuple[int, int]] = []
    for size in sizes:
        for _ in range(_TRIES):
            x, y = _along(rng, ROOM[size]), _along(rng, ROOM[size])
            others = zip(places, sizes, strict=False)
            if all(max(abs(x - a), abs(y - b)) >= ROOM[size] + ROOM[other] for (a, b), other in others):
                places.append((x, y))
                break
        else:
            return None
    return places


def _along(rng: random.Random, room: float) -> int:
    """A pixel, `room` from both edges, and clear of the lines between thirds."""
    while True:
        at = rng.randint(round(room + 0.5), round(SIDE - 1.5 - room))
        if all(abs(at + 0.5 - SIDE * k / GRID) >= _CLEAR for k in range(1, GRID)):
            return at
