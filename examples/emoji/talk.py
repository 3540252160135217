"""What is said of drawings: LLaVA records of captions, questions and text, and who is in which of them."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from draw import Drawing
from things import GROUPS, Thing

Record = dict[str, object]
TYPES = ("name", "which of four", "yes or no", "group", "colour", "same thing")


@dataclass(frozen=True, kw_only=True)
class Split:
    """Drawings to train on; of an artist that training never sees; of things that it never sees."""

    train: list[Drawing]
    new_artist: list[Drawing]
    new_things: list[Drawing]


def split(drawings: Sequence[Drawing], test_artist: str, unseen: Sequence[Thing]) -> Split:
    """Things that are held out are so for every artist, and in no text."""
    names = {thing.name for thing in unseen}
    seen = [d for d in drawings if d.thing.name not in names]
    return Split(
        train=[d for d in seen if d.artist != test_artist],
        new_artist=[d for d in seen if d.artist == test_artist],
        new_things=[d for d in drawings if d.thing.name in names],
    )


def record(name: str, question: str, answer: str, *, kind: str, files: Sequence[str] = ()) -> Record:
    images = "".join("<image>\n" for _ in files)
    talk = [{"from": "human", "value": images + question}, {"from": "gpt", "value": answer}]
    made: Record = {"id": name, "type": kind, "conversations": talk}
    if files:
        made["image"] = files[0] if len(files) == 1 else list(files)
    return made


def captions(drawings: Sequence[Drawing]) -> list[Record]:
    found = []
    for d in drawings:
        colour = f" {d.colour}," if d.colour else ""
        text = f"{d.thing.name.capitalize()},{colour} {d.thing.group}."
        found.append(record(f"{d.artist}/{d.thing.name}", "", text, kind="caption", files=[d.file]))
    return found


def texts(things: Sequence[Thing], unsaid: Collection[str] = ()) -> list[Record]:
    """Without a picture: what a cut language model is healed with. No word of `unsaid` is in it."""
    found = []
    for thing in things:
        found.append(
            record(f"{thing.name}/group", f"Which group has {thing.name}?", thing.group, kind="text")
        )
        if words := ", ".join(word for word in thing.keywords if word not in unsaid):
            found.append(record(f"{thing.name}/words", f"Words for {thing.name}?", words, kind="text"))
    return found


def questions(
    asked: Sequence[Drawing], beside: Sequence[Drawing], rng: random.Random, *, yes_and_no: bool
) -> list[Record]:
    """Every type of question about each drawing of `asked`.

    Other names and second pictures are those of `beside` and of `asked` itself. `yes_and_no` asks what can be
    denied both ways; otherwise one of them, in turn, so that half of the answers are yes.
    """
    pool = [*beside, *asked]
    names = sorted({d.thing.name for d in asked} | {d.thing.name for d in beside})
    by_name: dict[str, list[Drawing]] = defaultdict(list)
    for d in pool:
        by_name[d.thing.name].append(d)
    found: list[Record] = []
    for number, d in enumerate(asked):
        base, name = f"{d.artist}/{d.thing.name}", d.thing.name
        others = rng.sample([n for n in names if n != name], 3)
        four = sorted([name, *others], key=lambda _: rng.random())
        ways = [True, False] if yes_and_no else [number % 2 == 0]
        found.append(record(f"{base}/name", "What is this?", name, kind="name", files=[d.file]))
        found.append(
            record(
                f"{base}/four", f"Which is it: {', '.join(four)}?", name, kind="which of four", files=[d.file]
            )
        )
        for way in ways:
            said, answer = (name, "yes") if way else (others[0], "no")
            text = f"Is this {said}?"
            found.append(record(f"{base}/is/{answer}", text, answer, kind="yes or no", files=[d.file]))
        text = f"Which group: {', '.join(GROUPS.values())}?"
        found.append(record(f"{base}/group", text, d.thing.group, kind="group", files=[d.file]))
        if d.colour:
            text = "Which colour is most of it?"
            found.append(record(f"{base}/colour", text, d.colour, kind="colour", files=[d.file]))
        found += _pairs(d, by_name, others[1], rng, ways)
    return found


def _pairs(
    d: Drawing, by_name: dict[str, list[Drawing]], other: str, rng: random.Random, ways: Sequence[bool]
) -> Iterator[Record]:
    """A second picture, by another artist, of the same thing or of another."""
    for way in ways:
        found = [o for o in by_name[d.thing.name if way else other] if o.artist != d.artist]
        if found:
            answer, second = ("yes", rng.choice(found)) if way else ("no", rng.choice(found))
            files = [d.file, second.file]
            name = f"{d.artist}/{d.thing.name}/same/{answer}"
            yield record(name, "Are both the same thing?", answer, kind="same thing", files=files)
