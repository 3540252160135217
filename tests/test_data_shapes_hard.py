"""The hard shapes: answers solved again from coordinates, pairs unseen, labels legible, looks apart."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image

from llava_kd.cli import main
from llava_kd.data.shapes.hard import drawing, questions, scenes
from llava_kd.data.shapes.hard.labels import DIGITS, LABELS, LETTERS
from llava_kd.data.shapes.hard.scenes import HELD_OUT_PAIRS, HardScene, Thing
from llava_kd.data.shapes.settings import HARD
from llava_kd.data.shapes.writing import MANIFEST, make_examples, write_shapes

SPLITS = ("train", "validation", "test", "test_unseen_pairs", "test_ood")
FILES = {"captions.json", "instructions.json", "shapes.json", "validation.json"} | {
    f"{split}.json" for split in SPLITS[2:]
}
WORDS = [" ".join(pair) for pair in HELD_OUT_PAIRS]

# What `llava-kd data shapes` wrote before there was a hard setting: 40, 12 and 18 scenes, seed 3.
EASY_TEXTS = {
    "captions.json": "852710b0e5e74da4a6ade7bebe0f5feaa7dc9edfbfa1ff89655df8c5adbe2e75",
    "instructions.json": "329e5490a418af793e9b9b36259a8f0a7b57863af3438d1d5cbb272fe936d1d7",
    "shapes.json": "191146fb749d8e1d4afdf95db27ae7f41d2b09c5f5e75e827c3ee87df1706707",
    "test.json": "fc07c327400c647dfd8c92f574a11d5854a33e7822e031d609c2498447e351c6",
    "validation.json": "31f829eb1014f9f7080af69a7e5158aa6ec51ae8871cff3e6c6bb3603c91b540",
}
EASY_PICTURES = "f33d78427c46a14834469bfcc85bb19da83dd11aa85b958cf963c04cdc5f5cfd"
PILLOW_OF_PICTURES = "13.0.0"  # encoders of files differ from one version to the next
EASY_PIXELS = "5c8d3cfb5a30a5efdbe2cdb4f685dd5175c52ddb15cc454b537cd7d9bf8cc3ce"


# A solver that knows a scene as dots with properties, and a question as words.

NINTHS = [
    *("top left", "top", "top right", "left", "centre", "right"),
    *("bottom left", "bottom", "bottom right"),
]
COLOUR = "red|orange|green|cyan|blue|purple"
SHAPE = "circle|square|triangle|cross|star"
NAME = re.compile(
    rf"(?:(?P<z>small|large) ?)?(?:(?P<c>{COLOUR}) ?)?(?P<s>shape|one|{SHAPE})?(?: labelled (?P<l>\w\d))?"
)


def fitting(scene: HardScene, name: str) -> list[Thing]:
    m = NAME.fullmatch(name)
    assert m, name
    assert name
    return [
        t
        for t in scene
        if m["z"] in (None, t.size)
        and m["c"] in (None, t.colour)
        and m["s"] in (None, "shape", "one", t.shape)
        and m["l"] in (None, t.label)
    ]


def only(things: Sequence[Thing], why: object) -> Thing:
    assert len(things) == 1, why
    return things[0]


def singular(plural: str) -> str:
    return plural.removesuffix("es") if plural.endswith("crosses") else plural.removesuffix("s")


def beyond(a: Thing, side: str, b: Thing) -> bool:
    """Whether `a` is on that side of `b`; nobody has to look closely."""
    dx, dy = a.x - b.x, a.y - b.y
    gap = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[side]
    assert abs(gap) > 5, (a, side, b)
    return gap > 0


def by_look(name: str, *things: Thing) -> list[Thing]:
    return [] if "labelled" in name else list(things)


def solve(scene: HardScene, text: str) -> tuple[str, list[Thing]]:
    """The answer to a question, and the things whose colour or shape it takes to find it."""
    if m := re.fullmatch(r"What colour is the shape nearest to the (.+)\?", text):
        anchor, near = nearest(scene, m[1], text)
        return near.colour, [*by_look(m[1], anchor), near]
    if m := re.fullmatch(r"What shape is nearest to the (.+)\?", text):
        anchor, near = nearest(scene, m[1], text)
        return near.shape, [*by_look(m[1], anchor), near]
    if m := re.fullmatch(
        r"What (colour|shape) is the (leftmost|rightmost|highest|lowest) (?:shape|one)\?", text
    ):
        key = {"leftmost": "x", "rightmost": "-x", "highest": "y", "lowest": "-y"}[m[2]]
        order = sorted(scene, key=lambda t: getattr(t, key[-1]) * (-1 if key[0] == "-" else 1))
        assert abs(getattr(order[0], key[-1]) - getattr(order[1], key[-1])) > 5, text
        return getattr(order[0], m[1]), [order[0]]
    if m := re.fullmatch(r"What (colour|shape) is (?:the )?(.+)\?", text):
        name = f"shape {m[2]}" if m[2].startswith("labelled") else m[2]
        found = only(fitting(scene, name), (scene, text))
        return getattr(found, m[1]), [found]
    if m := re.fullmatch(r"How many shapes are (left of|right of|above|below) the (.+)\?", text):
        anchor = only(fitting(scene, m[2]), (scene, text))
        return str(sum(beyond(t, m[1], anchor) for t in scene if t is not anchor)), by_look(m[2], anchor)
    if m := re.fullmatch(r"How many (.+) are there\?", text):
        found = fitting(scene, singular(m[1]))
        return str(len(found)), found if re.search(f"{COLOUR}|{SHAPE}", m[1]) else []
    if m := re.fullmatch(r"Is there an? (.+)\?", text):
        found = fitting(scene, m[1])
        return "yes" if found else "no", by_look(m[1], *found) if len({t.pair for t in found}) == 1 else []
    if m := re.fullmatch(
        r"Is the (.+) (left of|right of|above|below|larger than|smaller than) the (.+)\?", text
    ):
        a, b = (only(fitting(scene, m[i]), (scene, text)) for i in (1, 3))
        if m[2].endswith("than"):
            assert a.size != b.size, text
            return "yes" if (a.size == "large") == (m[2] == "larger than") else "no", by_look(text, a, b)
        return "yes" if beyond(a, m[2], b) else "no", by_look(text, a, b)
    m = re.fullmatch(r"(Where is|What is written on) the (.+)\?", text)
    assert m, text
    found = only(fitting(scene, m[2]), (scene, text))
    if m[1] == "Where is":
        return NINTHS[int(found.y / 96 * 3) * 3 + int(found.x / 96 * 3)], by_look(text, found)
    return found.label, [found]


def nearest(scene: HardScene, name: str, text: str) -> tuple[Thing, Thing]:
    anchor = only(fitting(scene, name), (scene, text))
    away = sorted(((t.x - anchor.x) ** 2 + (t.y - anchor.y) ** 2, t.x, t.y) for t in scene)
    assert away[0][0] == 0
    assert away[2][0] > 1.4 * away[1][0], f"{text}: a close call in {scene}"
    return anchor, next(t for t in scene if (t.x, t.y) == away[1][1:])


def some_scenes(count: int, split: str = "train", seed: int = 0) -> Iterator[tuple[HardScene, random.Random]]:
    rng = random.Random(f"{seed} {split}")
    return ((HARD.splits[split].scene(rng), rng) for _ in range(count))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hard") / "data"
    write_shapes(out, num_train=24, num_validation=9, num_test=18, seed=5, setting=HARD, progress=False)
    return out


@pytest.fixture(scope="module")
def examples():
    return make_examples(num_train=900, num_validation=90, num_test=450, seed=0, setting=HARD)


def test_the_easy_setting_writes_the_bytes_that_it_always_wrote(tmp_path: Path) -> None:
    write_shapes(tmp_path / "a", num_train=40, num_validation=12, num_test=18, seed=3, progress=False)
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "a").glob("*.json")
    }
    assert found == EASY_TEXTS
    files, pixels = hashlib.sha256(), hashlib.sha256()
    for path in sorted((tmp_path / "a" / "images").iterdir()):
        files.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
        if path.suffix == ".png":
            with Image.open(path) as picture:
                pixels.update(path.name.encode() + picture.tobytes())
    assert pixels.hexdigest() == EASY_PIXELS
    if PIL.__version__ == PILLOW_OF_PICTURES:
        assert files.hexdigest() == EASY_PICTURES


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_the_one_that_the_coordinates_give(split: str) -> None:
    types = Counter()
    for scene, rng in some_scenes(60, split):
        for question in HARD.splits[split].questions(scene, rng):
            answer, things = solve(scene, question.text)
            assert question.answer == answer, (scene, question)
            named = {pair for pair in scenes.PAIRS if re.search(rf"{pair[0]} {pair[1]}\b", question.text)}
            assert {t.pair for t in things} <= question.pairs | named, (scene, question)
            types[question.type] += 1
    assert set(types) == set(questions.TYPES)


def test_every_form_of_question_occurs() -> None:
    forms = {(q.type, q.form) for scene, rng in some_scenes(150) for q in questions.questions(scene, rng)}
    sides, names = 4, 5
    assert Counter(question_type for question_type, _ in forms) == {
        "colour": 3,
        "shape": 3,
        "count": 5 + sides,
        "exist": 4,
        "position": names,
        "compare": sides * names + 2 * (names - 2),  # labelled ones are all large
        "nearest": 2 * names,
        "outermost": 2 * 4,
        "read": names - 1,
    }


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("split", ["train", "test_unseen_pairs"])
def test_shapes_lie_apart_inside_the_picture_and_clear_of_the_lines(split: str, seed: int) -> None:
    for scene, _ in some_scenes(100, split, seed):
        assert 3 <= len(scene) <= 9
        boxes = [(t.x + 0.5, t.y + 0.5, {"small": 6.5, "large": 12.5}[t.size]) for t in scene]
        for x, y, room in boxes:
            assert room <= x <= 96 - room
            assert room <= y <= 96 - room
            assert min(abs(at - line) for at in (x, y) for line in (32, 64)) >= 2.5
        for (x, y, room), (x_b, y_b, room_b) in itertools.combinations(boxes, 2):
            assert max(abs(x - x_b), abs(y - y_b)) >= room + room_b
        patches = {(t.x // 12, t.y // 12) for t in scene}
        assert len(patches) == len(scene), "two centres in one patch of 12"
        labels = [t.label for t in scene if t.label]
        assert len(set(labels)) == len(labels)
        assert all(t.size == "large" and t.label in LABELS for t in scene if t.label)


def test_counts_go_from_none_to_nine_and_scenes_hold_three_to_nine(examples) -> None:
    held = Counter(len(e.scene) for e in examples["train"])
    assert set(held) == set(range(3, 10))
    assert min(held.values()) > 0.6 * max(held.values())
    answers = Counter(q.answer for e in examples["train"] for q in e.questions if q.type == "count")
    assert set(answers) == {str(n) for n in range(10)}


def test_pairs_that_are_held_out_are_in_no_scene_caption_or_question_but_of_their_own_test(
    written: Path,
) -> None:
    seen = ("captions", "instructions", "validation", "test", "test_ood")
    for name in seen:
        text = (written / f"{name}.json").read_text().lower()
        assert not re.search("|".join(WORDS), text), name
    captions = (written / "captions.json").read_text().lower()
    found = [pair for pair in scenes.SEEN_PAIRS if " ".join(pair) in captions]
    assert len(found) > 18, "a search finds what is there"
    assert re.search("|".join(WORDS), (written / "test_unseen_pairs.json").read_text())


def test_held_out_pairs_are_never_seen_and_each_of_their_parts_is(examples) -> None:
    for split in SPLITS:
        shown = {t.pair for e in examples[split] for t in e.scene}
        asked = {pair for e in examples[split] for q in e.questions for pair in q.pairs}
        if split == "test_unseen_pairs":
            assert shown >= set(HELD_OUT_PAIRS)
            assert all(any(t.pair in HELD_OUT_PAIRS for t in e.scene) for e in examples[split])
        else:
            assert not (shown | asked) & set(HELD_OUT_PAIRS)
            assert shown == set(scenes.SEEN_PAIRS)
    assert {colour for colour, _ in HELD_OUT_PAIRS} == {colour for colour, _ in scenes.PAIRS}
    assert {shape for _, shape in HELD_OUT_PAIRS} == {shape for _, shape in scenes.PAIRS}


def test_each_question_about_unseen_pairs_cannot_be_answered_without_one(examples) -> None:
    for example in examples["test_unseen_pairs"]:
        (question,) = example.questions
        _, things = solve(example.scene, question.text)
        named = re.sub("crosses", "cross", question.text)
        hinges = any(t.pair in HELD_OUT_PAIRS for t in things) or any(word in named for word in WORDS)
        assert hinges, (example.scene, question)


def test_a_blind_guess_is_right_as_often_as_chance_has_it(examples) -> None:
    from llava_kd.data.shapes.questions import blind_accuracy

    asked = {split: [q for e in examples[split] for q in e.questions] for split in SPLITS}
    for split in HARD.tests:
        blind = blind_accuracy(asked["train"], asked[split])
        assert all(blind[name] < 0.68 for name in ("exist", "compare")), (split, blind)
        # five shapes, six colours, nine places, 84 labels
        assert all(blind[name] < 0.40 for name in ("colour", "shape", "nearest", "outermost")), (split, blind)
        assert blind["count"] < 0.34
        assert blind["position"] < 0.25
        assert blind["read"] < 0.08
        assert blind["all"] < 0.32
        counted = Counter(q.type for q in asked[split])
        assert counted == dict.fromkeys(questions.TYPES, 50)


def test_the_answers_yes_and_no_are_equally_frequent_in_each_form(examples) -> None:
    by_form: dict[str, Counter[str]] = {}
    for example in examples["train"]:
        for q in example.questions:
            if q.type in ("exist", "compare"):
                by_form.setdefault(q.form, Counter())[q.answer] += 1
    for form, counts in by_form.items():
        assert abs(counts["yes"] - counts["no"]) <= 0.2 * counts.total() + 3, (form, counts)


def test_no_split_depends_on_how_large_any_is() -> None:
    few = make_examples(num_train=3, num_validation=9, num_test=9, seed=7, setting=HARD)
    many = make_examples(num_train=12, num_validation=18, num_test=27, seed=7, setting=HARD)
    for split in SPLITS:
        assert many[split][: len(few[split])] == few[split]
    all_scenes = [e.scene for split in SPLITS for e in many[split]]
    assert len(set(all_scenes)) == len(all_scenes)


def test_captions_name_every_shape_once() -> None:
    pattern = rf"a (\w+) ({COLOUR}) (\w+)(?: labelled (\w\d))? at the ([\w ]+)"
    for scene, _ in some_scenes(50):
        text = questions.caption(scene)
        parts = re.findall(pattern, f"a{text[1:]}")
        assert parts == [(t.size, t.colour, t.shape, t.label, NINTHS[t.cell]) for t in scene]


def test_the_label_that_is_absent_differs_in_one_character() -> None:
    for scene, rng in some_scenes(40):
        there = {t.label for t in scene} - {""}
        for q in questions.questions(scene, rng):
            if q.form == "by label" and q.answer == "no":
                asked = q.text[-3:-1]
                assert asked not in there
                assert any((asked[0] == label[0]) != (asked[1] == label[1]) for label in there)


# What the pictures show.


def rendered(label: str) -> np.ndarray:
    """The label on its plate, painted from the alphabet and nothing else."""
    plate = np.ones((9, 13))
    for left, rows in ((1, LETTERS[label[0]]), (7, DIGITS[label[1]])):
        for y, row in enumerate(rows.split()):
            for x, pixel in enumerate(row):
                plate[1 + y, left + x] = pixel == "."
    return plate


TEMPLATES = {label: rendered(label) - rendered(label).mean() for label in LABELS}


def read(grey: np.ndarray, x: int, y: int) -> str:
    """The label that looks most like what is there."""
    seen = grey[y - 4 : y + 5, x - 6 : x + 7]
    seen = seen - seen.mean()
    likeness = {
        label: (seen * template).sum() / (np.linalg.norm(seen) * np.linalg.norm(template))
        for label, template in TEMPLATES.items()
    }
    best = max(likeness, key=lambda label: likeness[label])
    assert likeness[best] > 0.7, (best, likeness[best])
    return best


def small(path: Path) -> Image.Image:
    """As a tower of 96 pixels gets it."""
    with Image.open(path) as picture:
        return picture.convert("RGB").resize((96, 96), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("split", ["train", "test_ood"])
def test_labels_are_legible_in_the_files(split: str, tmp_path: Path) -> None:
    from llava_kd.data.shapes.scenes import encode_picture

    num_read = 0
    for i, (scene, rng) in enumerate(some_scenes(40, split)):
        path = tmp_path / "picture"
        picture = HARD.splits[split].draw(scene, rng)
        path.write_bytes(encode_picture(picture, rng, image_format=("JPEG", "PNG")[i % 2]))
        grey = np.asarray(small(path).convert("L")) / 255
        for thing in scene:
            if thing.label:
                assert read(grey, thing.x, thing.y) == thing.label, (i, thing)
                num_read += 1
    assert num_read > 40


def test_characters_differ_in_four_pixels_or_more() -> None:
    for alphabet in (LETTERS, DIGITS):
        for a, b in itertools.combinations(alphabet.values(), 2):
            assert [len(row) for row in a.split()] == [5] * 7
            assert sum(p != q for p, q in zip(a, b, strict=True)) >= 4


HUES = {"red": 0, "orange": 25, "green": 92, "cyan": 130, "blue": 164, "purple": 205}  # of 256


@pytest.mark.parametrize("split", ["train", "test_unseen_pairs", "test_ood"])
def test_a_picture_shows_each_thing_where_it_is_and_nothing_elsewhere(split: str) -> None:
    for scene, rng in some_scenes(25, split):
        picture = HARD.splits[split].draw(scene, rng).resize((96, 96), Image.Resampling.BOX)
        rgb = np.asarray(picture, dtype=float)
        vivid = rgb.max(2) - rgb.min(2) > 72
        hue = np.asarray(picture.convert("HSV"))[..., 0].astype(int)
        elsewhere = np.ones((96, 96), bool)
        for t in scene:
            half = {"small": 7, "large": 13}[t.size]
            box = np.s_[max(t.y - half, 0) : t.y + half + 1, max(t.x - half, 0) : t.x + half + 1]
            elsewhere[box] = False
            inner = {"small": 3, "large": 9}[t.size]
            box = np.s_[t.y - inner : t.y + inner + 1, t.x - inner : t.x + inner + 1]
            found = np.median((hue[box] - HUES[t.colour] + 128)[vivid[box]] % 256) - 128
            assert abs(found) < 18, (t, found)
            assert vivid[box].sum() > 8
        assert not vivid[elsewhere].any()


def area(split: str, shape: str, size: str) -> float:
    """Pixels that an unlabelled shape fills more than half, a mean over pictures."""
    thing = Thing(x=48, y=48, colour="blue", shape=shape, size=size, label="")
    rng = random.Random(shape + size)
    found = []
    for _ in range(6):
        picture = HARD.splits[split].draw((thing,), rng).resize((96, 96), Image.Resampling.BOX)
        rgb = np.asarray(picture, dtype=int)
        found.append((rgb[..., 2] - rgb[..., 0] > 80).sum())
    return float(np.mean(found))


def test_sizes_of_the_other_looks_lie_outside_those_of_training_and_on_the_same_side() -> None:
    for shape in SHAPE.split("|"):
        usual_small, usual_large = (area("train", shape, size) for size in ("small", "large"))
        small_one, large_one = (area("test_ood", shape, size) for size in ("small", "large"))
        assert small_one < usual_small < 0.5 * usual_large < usual_large < large_one, shape
    assert drawing.OTHER_RADII["small"][1] < drawing.RADII["small"][0]
    assert drawing.RADII["large"][1] < drawing.OTHER_RADII["large"][0]
    assert all(drawing.OTHER_RADII[size][1] <= room for size, room in scenes.ROOM.items())


def test_the_other_looks_have_other_backgrounds_noise_and_sides() -> None:
    for scene, rng in some_scenes(20):
        usual, other = drawing.draw(scene, rng), drawing.draw_otherwise(scene, rng)
        assert usual.size == (96, 96)
        assert other.width == other.height >= 112
        corner = np.asarray(usual.crop((0, 0, 3, 3)), dtype=float)
        assert corner.std(axis=(0, 1)).max() == 0
        assert corner.min() > 210
        noisy = np.asarray(other.crop((0, 0, 3, 3)), dtype=float)
        assert noisy.std(axis=(0, 1)).min() > 1
        assert noisy.mean() < 205


# What is written.


def test_files_are_llava_records_with_a_picture_of_their_own(written: Path) -> None:
    assert {path.name for path in written.iterdir()} == FILES | {"images"}
    used = []
    for split in ("captions", *SPLITS[1:]):
        records = json.loads((written / f"{split}.json").read_text())
        for record in records:
            question, answer = (turn["value"] for turn in record["conversations"])
            assert question.startswith("<image>")
            assert answer
            assert (record.get("type") in questions.TYPES) == (split != "captions")
            used.append(record["image"])
    assert sorted(used) == sorted(f"images/{path.name}" for path in (written / "images").iterdir())
    assert len(set(used)) == len(used) == 24 + 9 + 3 * 18


def test_the_manifest_says_what_is_held_out_and_how_a_blind_guess_does(written: Path) -> None:
    manifest = json.loads((written / MANIFEST).read_text())
    assert manifest["setting"] == "hard"
    assert manifest["held_out_pairs"] == WORDS
    for key in ("blind_accuracy", "blind_accuracy_unseen_pairs", "blind_accuracy_ood"):
        assert set(manifest[key]) == {*questions.TYPES, "all"}


def test_the_command_gives_the_same_bytes_and_leaves_other_data_alone(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--num_train=24", "--num_validation=9", "--num_test=18", "--seed=5"]
    out = tmp_path / "again"
    assert main(["data", "shapes", "--hard", f"--out={out}", *sizes]) == 0
    said = capsys.readouterr().out
    assert [line.split(":")[0] for line in said.splitlines()] == [
        "accuracy without looking",
        "accuracy without looking in test_unseen_pairs.json",
        "accuracy without looking in test_ood.json",
    ]
    for path in (path for path in written.rglob("*") if path.is_file()):
        assert (out / path.relative_to(written)).read_bytes() == path.read_bytes()
    assert main(["data", "shapes", "--hard", f"--out={out}", *sizes]) == 0
    assert capsys.readouterr().out == said, "what is there already says the same"
    assert main(["data", "shapes", f"--out={out}", *sizes]) == 2
    assert "already holds shapes data made with" in capsys.readouterr().err
