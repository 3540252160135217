"""Records of three kinds for the proof of `llava-kd data select`, from the shapes data.

easy: is there a red shape, how many shapes are there. hard: what is where, which can be learned from the
picture alone. noise: questions of the hard kind, each with the answer to another question of its form, so
that nothing about the text gives it away. Every record has as many turns; `kind` says which it is, and no
model is shown that.

    python make_data.py OUT [--records 1000] [--test 200] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from llava_kd.data.shapes.questions import Question, questions
from llava_kd.data.shapes.scenes import Scene, encode_picture, random_scene
from llava_kd.data.shapes.scenes import draw as draw_scene

TURNS = 3
EASY = {("exist", "by colour"), ("count", "all")}
HARD = {
    ("colour", "cell"),
    ("colour", "shape"),
    ("shape", "cell"),
    ("position", "by shape"),
    ("position", "by colour"),
}
KINDS = ("easy", "hard", "noise")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--records", type=int, default=1000, help="of each kind")
    parser.add_argument("--test", type=int, default=200, help="of each kind that is tested")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(f"kinds {arguments.seed}")
    seen: set[Scene] = set()
    (arguments.out / "images").mkdir(parents=True, exist_ok=True)
    train = [record for kind in KINDS for record in draw(kind, "train", arguments, rng, seen)]
    rng.shuffle(train)
    write(arguments.out / "train.json", train)
    for kind in ("easy", "hard"):
        tested = draw(kind, "test", arguments, rng, seen)
        write(arguments.out / f"test_{kind}.json", tested)


def draw(
    kind: str, split: str, arguments: argparse.Namespace, rng: random.Random, seen: set[Scene]
) -> list[dict]:
    """Records of one kind, each of a scene of its own, which no other record of any split has."""
    wanted = EASY if kind == "easy" else HARD
    scenes, asked = [], []
    while len(scenes) < (arguments.records if split == "train" else arguments.test):
        scene = random_scene(rng)
        candidates = [q for q in questions(scene, rng) if (q.type, q.form) in wanted]
        if scene in seen or len(candidates) < TURNS:
            continue
        seen.add(scene)
        scenes.append(scene)
        asked.append(rng.sample(candidates, TURNS))
    answers = shuffled(asked, rng) if kind == "noise" else [[q.answer for q in turns] for turns in asked]
    records = []
    for number, (scene, turns, said) in enumerate(zip(scenes, asked, answers, strict=True)):
        name = f"{split}_{kind}_{number:05d}"
        own = random.Random(f"picture {arguments.seed} {name}")
        picture = encode_picture(draw_scene(scene, own), own, image_format="JPEG")
        (arguments.out / "images" / f"{name}.jpg").write_bytes(picture)
        talk = [
            {"from": speaker, "value": value}
            for k, (q, answer) in enumerate(zip(turns, said, strict=True))
            for speaker, value in (("human", "<image>\n" * (k == 0) + q.text), ("gpt", answer))
        ]
        records.append({"id": name, "image": f"images/{name}.jpg", "kind": kind, "conversations": talk})
    return records


def shuffled(asked: Sequence[Sequence[Question]], rng: random.Random) -> list[list[str]]:
    """Each question's answer from another question of its form."""
    by_form: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for turns in asked:
        for q in turns:
            by_form[q.type, q.form].append(q.answer)
    for answers in by_form.values():
        rng.shuffle(answers)
    return [[by_form[q.type, q.form].pop() for q in turns] for turns in asked]


def write(path: Path, records: list[dict]) -> None:
    path.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
