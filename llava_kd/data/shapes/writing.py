"""Writes the shapes data: generated pictures, captions and questions in LLaVA format.

Three splits of scenes, no two of the same content, whatever the split. The scenes of test and validation
do not depend on how many others are asked for.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from llava_kd.data.shapes.questions import TYPES, Picker, Question, blind_accuracy, caption, questions
from llava_kd.data.shapes.scenes import Scene, encode_picture, random_scene

MANIFEST = "shapes.json"
DESCRIBE = "Describe the picture."
DESCRIBED_SHARE = 1 / 4  # of the training scenes are also described in full among the instructions

_FORMAT = 1  # raised whenever the same arguments give other files
_MAX_TRIES = 20_000

Record = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class Example:
    """A scene with the questions asked about it; `id` is also the stem of its picture's file name."""

    id: str
    scene: Scene
    questions: tuple[Question, ...]


def write_shapes(
    out_dir: str | Path,
    *,
    num_train: int,
    num_validation: int,
    num_test: int,
    seed: int = 0,
    progress: bool = True,
) -> Mapping[str, float]:
    """Write images/, captions.json, instructions.json, validation.json and test.json; the same arguments
    give the same bytes. A directory that already holds just this data is left as it is.

    Returns the accuracy per question type on the test split of a guesser who sees no image.
    """
    sizes = {"train": num_train, "validation": num_validation, "test": num_test}
    if bad := {name: size for name, size in sizes.items() if size < 1}:
        raise ValueError(f"every split of the shapes data needs at least one scene; got {bad}")
    out_dir = Path(out_dir)
    wanted = {"format": _FORMAT, "seed": seed, **{f"num_{name}": size for name, size in sizes.items()}}
    if (blind := _existing(out_dir, wanted)) is not None:
        return blind
    partial = out_dir.with_name(f".{out_dir.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    (partial / "images").mkdir(parents=True)

    examples = make_examples(num_train=num_train, num_validation=num_validation, num_test=num_test, seed=seed)
    everything = [example for split in examples.values() for example in split]
    for example in tqdm(everything, desc="drawing shapes", unit="image", disable=not progress):
        (partial / _image_path(example.id)).write_bytes(_picture(example, seed))
    _write_json(partial / "captions.json", [_caption_record(e) for e in examples["train"]])
    _write_json(partial / "instructions.json", list(_instruction_records(examples["train"])))
    for split in ("validation", "test"):
        _write_json(partial / f"{split}.json", [_question_record(e) for e in examples[split]])
    blind = blind_accuracy(
        (q for e in examples["train"] for q in e.questions),
        (q for e in examples["test"] for q in e.questions),
    )
    _write_json(partial / MANIFEST, {**wanted, "blind_accuracy": blind})
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial.replace(out_dir)
    return blind


def make_examples(
    *, num_train: int, num_validation: int, num_test: int, seed: int
) -> dict[str, list[Example]]:
    """Scenes and questions of the three splits: one question a scene to test with, several to train on."""
    rng = random.Random(f"scenes {seed}")
    seen: set[Scene] = set()
    test = list(_held_out("test", num_test, rng, seen))
    validation = list(_held_out("validation", num_validation, rng, seen))
    train = list(_training(num_train, rng, seen))
    return {"train": train, "validation": validation, "test": test}


def _new_scene(rng: random.Random, seen: set[Scene]) -> Scene:
    for _ in range(_MAX_TRIES):
        scene = random_scene(rng)
        if scene not in seen:
            seen.add(scene)
            return scene
    raise AssertionError("no new scene found")  # there are more than 10^12


def _held_out(split: str, num_scenes: int, rng: random.Random, seen: set[Scene]) -> Iterator[Example]:
    """One question a scene, the types in turn."""
    picker = Picker()
    for i in range(num_scenes):
        scene, question = (), None
        while question is None:
            scene = _new_scene(rng, seen)
            question = picker.pick(questions(scene, rng), TYPES[i % len(TYPES)], rng)
        yield Example(id=f"{split}_{i:06d}", scene=scene, questions=(question,))


def _training(num_scenes: int, rng: random.Random, seen: set[Scene]) -> Iterator[Example]:
    """One question of each type that the scene allows, in random order."""
    picker = Picker()
    for i in range(num_scenes):
        scene = _new_scene(rng, seen)
        candidates = questions(scene, rng)
        picked = [picker.pick(candidates, question_type, rng) for question_type in TYPES]
        asked = [q for q in picked if q is not None]
        rng.shuffle(asked)
        yield Example(id=f"train_{i:06d}", scene=scene, questions=tuple(asked))


def _asked(examples: Sequence[Example]) -> Iterator[Question]:
    return (question for example in examples for question in example.questions)


def _image_format(example_id: str) -> str:
    """A third of the pictures are PNG files; which ones is a property of the id alone."""
    return "PNG" if hashlib.sha256(example_id.encode()).digest()[0] % 3 == 0 else "JPEG"


def _image_path(example_id: str) -> str:
    return f"images/{example_id}.{'png' if _image_format(example_id) == 'PNG' else 'jpg'}"


def _picture(example: Example, seed: int) -> bytes:
    rng = random.Random(f"picture {seed} {example.id}")
    return encode_picture(example.scene, rng, image_format=_image_format(example.id))


def _conversation(example: Example, turns: Sequence[tuple[str, str]]) -> Record:
    """A LLaVA record; the image stands before the first human turn."""
    conversations: list[dict[str, str]] = []
    for human, gpt in turns:
        text = human if conversations else f"<image>\n{human}".rstrip()
        conversations += [{"from": "human", "value": text}, {"from": "gpt", "value": gpt}]
    return {"id": example.id, "image": _image_path(example.id), "conversations": conversations}


def _caption_record(example: Example) -> Record:
    return _conversation(example, [("", caption(example.scene))])


def _instruction_records(examples: Sequence[Example]) -> Iterator[Record]:
    """Questions about every scene, and apart from them descriptions of some."""
    every = round(1 / DESCRIBED_SHARE)
    for i, example in enumerate(examples):
        yield _conversation(example, _turns(example))
        if i % every == 0:
            record = _conversation(example, [(DESCRIBE, caption(example.scene))])
            yield {**record, "id": f"{example.id}_described"}


def _question_record(example: Example) -> Record:
    (question,) = example.questions
    return {**_conversation(example, _turns(example)), "type": question.type}


def _turns(example: Example) -> list[tuple[str, str]]:
    return [(q.text, q.answer) for q in example.questions]


def _existing(out_dir: Path, wanted: Mapping[str, object]) -> Mapping[str, float] | None:
    """The blind accuracy where `out_dir` holds just this data, None where there is nothing; else an error."""
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return None
    manifest = out_dir / MANIFEST
    if not manifest.is_file():
        raise ValueError(
            f"{out_dir} must be empty or new, or hold the same shapes data; it holds something else. "
            "Choose another directory or empty this one."
        )
    found = json.loads(manifest.read_text())
    blind = found.pop("blind_accuracy", {})
    if found != wanted:
        raise ValueError(
            f"{out_dir} already holds shapes data made with {found}, not with {dict(wanted)}. "
            "Choose another directory or delete this one."
        )
    return blind


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
