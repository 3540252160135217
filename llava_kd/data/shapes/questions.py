"""What can be said and asked about a scene of shapes: captions, questions, and which questions to pick."""

from __future__ import annotations

import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from llava_kd.data.shapes.scenes import CELLS, COLOURS, SHAPES, Scene, Shape

TYPES = ("colour", "shape", "count", "exist", "position", "compare")


@dataclass(frozen=True, kw_only=True)
class Question:
    """`form` names the sentence pattern inside a type; answers are balanced form by form.

    `pairs` are the colours and shapes that it turns on, where a setting keeps some pairs from training.
    """

    type: str
    form: str
    text: str
    answer: str
    pairs: frozenset[tuple[str, str]] = frozenset()


def caption(scene: Scene) -> str:
    """Every shape of the scene with all it has, cell by cell."""
    parts = [f"a {s.size} {s.colour} {s.shape} at the {CELLS[s.cell]}" for s in scene]
    sentence = ", ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}."


def questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Questions with exactly one right answer; `rng` picks which of the absent shapes are asked for."""
    return [
        *_colour_questions(scene),
        *_shape_questions(scene),
        *_count_questions(scene),
        *_exist_questions(scene, rng),
        *_position_questions(scene),
        *_compare_questions(scene),
    ]


def _unique(scene: Scene, key: Callable[[Shape], tuple[str, ...]]) -> Iterator[tuple[Shape, tuple[str, ...]]]:
    """The shapes that no other shape of the scene shares `key` with."""
    counts = Counter(key(s) for s in scene)
    return ((s, key(s)) for s in scene if counts[key(s)] == 1)


def _named(scene: Scene) -> dict[str, list[tuple[Shape, str]]]:
    """Shapes with a name that points at them without doubt, per kind of name: from easy to hard to find."""
    return {
        "by shape": [(s, shape) for s, (shape,) in _unique(scene, lambda s: (s.shape,))],
        "by colour": [(s, f"{colour} shape") for s, (colour,) in _unique(scene, lambda s: (s.colour,))],
        "by both": [(s, " ".join(key)) for s, key in _unique(scene, lambda s: (s.colour, s.shape))],
    }


def _colour_questions(scene: Scene) -> Iterator[Question]:
    for s, (shape,) in _unique(scene, lambda s: (s.shape,)):
        yield Question(type="colour", form="shape", text=f"What colour is the {shape}?", answer=s.colour)
    shared = Counter(s.shape for s in scene)
    for s, (size, shape) in _unique(scene, lambda s: (s.size, s.shape)):
        if shared[shape] > 1:
            text = f"What colour is the {size} {shape}?"
            yield Question(type="colour", form="size shape", text=text, answer=s.colour)
    for s in scene:
        text = f"What colour is the shape at the {CELLS[s.cell]}?"
        yield Question(type="colour", form="cell", text=text, answer=s.colour)


def _shape_questions(scene: Scene) -> Iterator[Question]:
    for s, (colour,) in _unique(scene, lambda s: (s.colour,)):
        yield Question(type="shape", form="colour", text=f"What shape is the {colour} one?", answer=s.shape)
    for s in scene:
        yield Question(
            type="shape", form="cell", text=f"What shape is at the {CELLS[s.cell]}?", answer=s.shape
        )


def _count_questions(scene: Scene) -> Iterator[Question]:
    yield Question(type="count", form="all", text="How many shapes are there?", answer=str(len(scene)))
    for colour in COLOURS:
        count = sum(s.colour == colour for s in scene)
        text = f"How many {colour} shapes are there?"
        yield Question(type="count", form="colour", text=text, answer=str(count))
    for shape in SHAPES:
        count = sum(s.shape == shape for s in scene)
        plural = "crosses" if shape == "cross" else f"{shape}s"
        text = f"How many {plural} are there?"
        yield Question(type="count", form="shape", text=text, answer=str(count))


def _exist_questions(scene: Scene, rng: random.Random) -> Iterator[Question]:
    colours, shapes = {s.colour for s in scene}, {s.shape for s in scene}
    for colour in COLOURS:
        yield _exist("by colour", f"{colour} shape", colour in colours)
    for shape in SHAPES:
        yield _exist("by shape", shape, shape in shapes)
    present = sorted({(s.colour, s.shape) for s in scene})
    for colour, shape in present:
        yield _exist("by both", f"{colour} {shape}", True)
    for colour, shape in _absent_pairs(present, rng):
        yield _exist("by both", f"{colour} {shape}", False)


def _absent_pairs(present: Sequence[tuple[str, str]], rng: random.Random) -> list[tuple[str, str]]:
    """As many pairs as are present; half of them have their colour and their shape in the scene, apart."""
    absent = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in present]
    colours, shapes = {c for c, _ in present}, {s for _, s in present}
    swapped = [(c, s) for c, s in absent if c in colours and s in shapes]
    pairs = rng.sample(swapped, min(len(swapped), (len(present) + 1) // 2))
    return pairs + rng.sample([pair for pair in absent if pair not in pairs], len(present) - len(pairs))


def _exist(form: str, name: str, is_present: bool) -> Question:
    article = "an" if name[0] in "aeiou" else "a"
    answer = "yes" if is_present else "no"
    return Question(type="exist", form=form, text=f"Is there {article} {name}?", answer=answer)


def _position_questions(scene: Scene) -> Iterator[Question]:
    for form, named in _named(scene).items():
        for s, name in named:
            yield Question(type="position", form=form, text=f"Where is the {name}?", answer=CELLS[s.cell])


def _compare_questions(scene: Scene) -> Iterator[Question]:
    """Both orders of every pair; a relation is asked only where it, or its opposite, strictly holds."""
    for kind, named in _named(scene).items():
        for (a, name_a), (b, name_b) in itertools.permutations(named, 2):
            for relation, holds in _relations(a, b):
                text = f"Is the {name_a} {relation} the {name_b}?"
                answer = "yes" if holds else "no"
                yield Question(type="compare", form=f"{relation} {kind}", text=text, answer=answer)


def _relations(a: Shape, b: Shape) -> Iterator[tuple[str, bool]]:
    """The relations that `a` has to `b`, or strictly has not."""
    larger = (a.size == "large") - (b.size == "large")
    for relation, opposite, amount in (
        ("left of", "right of", b.column - a.column),
        ("above", "below", b.row - a.row),
        ("larger than", "smaller than", larger),
    ):
        if amount:
            yield relation, amount > 0
            yield opposite, amount < 0


class Picker:
    """Picks questions such that the answers of each form become equally frequent."""

    def __init__(self) -> None:
        self._used: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)

    def pick(self, candidates: Iterable[Question], question_type: str, rng: random.Random) -> Question | None:
        """One question of the type, or None where the scene allows none."""
        of_type = [q for q in candidates if q.type == question_type]
        if not of_type:
            return None
        form = rng.choice(sorted({q.form for q in of_type}))
        used = self._used[question_type, form]
        of_form = [q for q in of_type if q.form == form]
        fewest = min(used[q.answer] for q in of_form)
        answer = rng.choice(sorted({q.answer for q in of_form if used[q.answer] == fewest}))
        used[answer] += 1
        return rng.choice([q for q in of_form if q.answer == answer])


def blind_accuracy(known: Iterable[Question], asked: Iterable[Question]) -> Mapping[str, float]:
    """Accuracy per type, and "all", of the best guesser that sees no image.

    It answers with the most frequent answer of the same question in `known`, else of the same type.
    """
    by_text: defaultdict[str, Counter[str]] = defaultdict(Counter)
    by_type: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for q in known:
        by_text[q.text][q.answer] += 1
        by_type[q.type][q.answer] += 1
    hits: defaultdict[str, list[bool]] = defaultdict(list)
    for q in asked:
        answers = by_text[q.text] or by_type[q.type]
        is_hit = bool(answers) and answers.most_common(1)[0][0] == q.answer
        hits[q.type].append(is_hit)
        hits["all"].append(is_hit)
    return {name: sum(found) / len(found) for name, found in hits.items()}
