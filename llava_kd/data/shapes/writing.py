"""Writes the shapes data: generated pictures, captions and questions in LLaVA format.

Splits of scenes, no two of the same content, whatever the split. The scenes of test and validation do not
depend on how many others are asked for; in the hard setting no split's do.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_kd.bar import Bar
from llava_kd.data.shapes.questions import Picker, Question, blind_accuracy
from llava_kd.data.shapes.scenes import encode_picture
from llava_kd.data.shapes.settings import EASY, Setting, Split
from llava_kd.durable import make_folder, put_folder

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
    scene: Hashable
    questions: tuple[Question, ...]


def write_shapes(
    out_dir: str | Path,
    *,
    num_train: int,
    num_validation: int,
    num_test: int,
    seed: int = 0,
    setting: Setting[Any] = EASY,
    progress: bool = True,
) -> Mapping[str, Mapping[str, float]]:
    """Write images/, captions.json, instructions.json, and a file of questions for validation and each test;
    the same arguments give the same bytes. A directory that already holds just this data is left as it is.

    Returns per test split the accuracy per question type of a guesser who sees no image.
    """
    sizes = {"train": num_train, "validation": num_validation, "test": num_test}
    if bad := {name: size for name, size in sizes.items() if size < 1}:
        raise ValueError(f"every split of the shapes data needs at least one scene; got {bad}")
    out_dir = Path(out_dir)
    counts = {f"num_{name}": size for name, size in sizes.items()}
    wanted = {"format": _FORMAT, "seed": seed, **counts, **setting.manifest}
    if (blind := _existing(out_dir, wanted, setting.tests)) is not None:
        return blind
    partial = out_dir.with_name(f".{out_dir.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    make_folder(partial / "images")

    examples = make_examples(
        num_train=num_train, num_validation=num_validation, num_test=num_test, seed=seed, setting=setting
    )
    _write_pictures(partial, examples, seed, setting, progress=progress)
    _write_json(partial / "captions.json", [_caption_record(e, setting) for e in examples["train"]])
    _write_json(partial / "instructions.json", list(_instruction_records(examples["train"], setting)))
    for split in ("validation", *setting.tests):
        _write_json(partial / f"{split}.json", [_question_record(e) for e in examples[split]])
    blind = {
        split: blind_accuracy(_asked(examples["train"]), _asked(examples[split])) for split in setting.tests
    }
    written = {_blind_key(split): accuracy for split, accuracy in blind.items()}
    _write_json(partial / MANIFEST, {**wanted, **written})
    put_folder(partial, out_dir)
    return blind


def make_examples(
    *, num_train: int, num_validation: int, num_test: int, seed: int, setting: Setting[Any] = EASY
) -> dict[str, list[Example]]:
    """Scenes and questions of all splits: one question a scene to test with, several to train on."""
    streams = {split.stream: random.Random(f"{split.stream} {seed}") for split in setting.splits.values()}
    seen: set[Hashable] = set()
    examples: dict[str, list[Example]] = {}
    for name, split in setting.splits.items():
        rng = streams[split.stream]
        if name == "train":
            made = _training(num_train, split, setting.types, rng, seen)
        else:
            count = num_validation if name == "validation" else num_test
            made = _held_out(name, count, split, setting.types, rng=rng, seen=seen)
        examples[name] = list(made)
    return examples


def _new_scene(split: Split[Any], rng: random.Random, seen: set[Hashable]) -> Hashable:
    for _ in range(_MAX_TRIES):
        scene = split.scene(rng)
        if scene not in seen:
            seen.add(scene)
            return scene
    raise AssertionError("no new scene found")  # there are more than 10^12


def _held_out(
    name: str,
    num_scenes: int,
    split: Split[Any],
    types: Sequence[str],
    *,
    rng: random.Random,
    seen: set[Hashable],
) -> Iterator[Example]:
    """One question a scene, the types in turn."""
    picker = Picker()
    for i in range(num_scenes):
        scene, question = (), None
        while question is None:
            scene = _new_scene(split, rng, seen)
            question = picker.pick(split.questions(scene, rng), types[i % len(types)], rng)
        yield Example(id=f"{name}_{i:06d}", scene=scene, questions=(question,))


def _training(
    num_scenes: int, split: Split[Any], types: Sequence[str], rng: random.Random, seen: set[Hashable]
) -> Iterator[Example]:
    """One question of each type that the scene allows, in random order."""
    picker = Picker()
    for i in range(num_scenes):
        scene = _new_scene(split, rng, seen)
        candidates = split.questions(scene, rng)
        picked = [picker.pick(candidates, question_type, rng) for question_type in types]
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


def _write_pictures(
    out: Path,
    examples: Mapping[str, Sequence[Example]],
    seed: int,
    setting: Setting[Any],
    *,
    progress: bool,
) -> None:
    """Each picture's look is drawn from the seed and its own id."""
    everything = [(name, example) for name, split in examples.items() for example in split]
    with Bar(len(everything), "drawing shapes", "images", is_shown=progress) as bar:
        for name, example in everything:
            rng = random.Random(f"picture {seed} {example.id}")
            picture = setting.splits[name].draw(example.scene, rng)
            content = encode_picture(picture, rng, image_format=_image_format(example.id))
            (out / _image_path(example.id)).write_bytes(content)
            bar.advance()


def _conversation(example: Example, turns: Sequence[tuple[str, str]]) -> Record:
    """A LLaVA record; the image stands before the first human turn."""
    conversations: list[dict[str, str]] = []
    for human, gpt in turns:
        text = human if conversations else f"<image>\n{human}".rstrip()
        conversations += [{"from": "human", "value": text}, {"from": "gpt", "value": gpt}]
    return {"id": example.id, "image": _image_path(example.id), "conversations": conversations}


def _caption_record(example: Example, setting: Setting[Any]) -> Record:
    return _conversation(example, [("", setting.caption(example.scene))])


def _instruction_records(examples: Sequence[Example], setting: Setting[Any]) -> Iterator[Record]:
    """Questions about every scene, and apart from them descriptions of some."""
    every = round(1 / DESCRIBED_SHARE)
    for i, example in enumerate(examples):
        yield _conversation(example, _turns(example))
        if i % every == 0:
            record = _conversation(example, [(DESCRIBE, setting.caption(example.scene))])
            yield {**record, "id": f"{example.id}_described"}


def _question_record(example: Example) -> Record:
    (question,) = example.questions
    return {**_conversation(example, _turns(example)), "type": question.type}


def _turns(example: Example) -> list[tuple[str, str]]:
    return [(q.text, q.answer) for q in example.questions]


def _blind_key(split: str) -> str:
    """Where the manifest says how well a blind guesser does: `blind_accuracy`, `blind_accuracy_ood`, ..."""
    return "blind_accuracy" + split.removeprefix("test")


def _existing(
    out_dir: Path, wanted: Mapping[str, object], tests: Sequence[str]
) -> Mapping[str, Mapping[str, float]] | None:
    """Blind accuracies where `out_dir` holds just this data, None where it holds nothing, else an error."""
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return None
    manifest = out_dir / MANIFEST
    if not manifest.is_file():
        raise ValueError(
            f"{out_dir} must be empty or new, or hold the same shapes data; it holds something else. "
            "Choose another directory or empty this one."
        )
    found = json.loads(manifest.read_text())
    blind = {split: found.pop(_blind_key(split), {}) for split in tests}
    if found != wanted:
        raise ValueError(
            f"{out_dir} already holds shapes data made with {found}, not with {dict(wanted)}. "
            "Choose another directory or delete this one."
        )
    return blind


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
