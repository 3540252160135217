"""Shapes data: every answer recomputed from the scene, splits apart, bytes reproducible, format valid."""

from __future__ import annotations

import io
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from llava_kd.data.shapes.questions import TYPES, Picker, Question, blind_accuracy, caption, questions
from llava_kd.data.shapes.scenes import CELLS, COLOURS, SHAPES, SIZES, Scene, draw, random_scene
from llava_kd.data.shapes.writing import MANIFEST, make_examples, write_shapes

SIZES_OF_SPLITS = {"num_train": 40, "num_validation": 12, "num_test": 18}


def things(scene: Scene) -> list[dict[str, object]]:
    return [
        {"x": s.cell % 3, "y": s.cell // 3, "cell": CELLS[s.cell], "c": s.colour, "s": s.shape, "z": s.size}
        for s in scene
    ]


def the_one(scene: Scene, **wanted: object) -> dict[str, object]:
    """The single thing with these properties; more or less than one means that the question is ambiguous."""
    found = [t for t in things(scene) if all(t[key] == value for key, value in wanted.items())]
    assert len(found) == 1, (scene, wanted)
    return found[0]


def fits(thing: dict[str, object], name: str) -> bool:
    """Whether "red circle", "red shape" or "circle" is a name of the thing."""
    return all(word in ("shape", thing["c"], thing["s"]) for word in name.split())


def pointed_at(scene: Scene, name: str) -> dict[str, object]:
    found = [t for t in things(scene) if fits(t, name)]
    assert len(found) == 1, (scene, name)
    return found[0]


def truth(scene: Scene, text: str) -> str:
    """The right answer, from the words of the question alone."""
    if m := re.fullmatch(r"What colour is the shape at the (.+)\?", text):
        return str(the_one(scene, cell=m[1])["c"])
    if m := re.fullmatch(r"What colour is the (small|large) (\w+)\?", text):
        return str(the_one(scene, z=m[1], s=m[2])["c"])
    if m := re.fullmatch(r"What colour is the (\w+)\?", text):
        return str(the_one(scene, s=m[1])["c"])
    if m := re.fullmatch(r"What shape is at the (.+)\?", text):
        return str(the_one(scene, cell=m[1])["s"])
    if m := re.fullmatch(r"What shape is the (\w+) one\?", text):
        return str(the_one(scene, c=m[1])["s"])
    if m := re.fullmatch(r"How many (?:(\w+) )?(\w+) are there\?", text):
        kept = [
            t
            for t in things(scene)
            if m[1] in (None, t["c"]) and m[2] in ("shapes", f"{t['s']}s", f"{t['s']}es")
        ]
        return str(len(kept))
    if m := re.fullmatch(r"Is there an? (.+)\?", text):
        return "yes" if any(fits(t, m[1]) for t in things(scene)) else "no"
    if m := re.fullmatch(r"Where is the (.+)\?", text):
        return str(pointed_at(scene, m[1])["cell"])
    m = re.fullmatch(r"Is the (.+) (left of|right of|above|below|larger than|smaller than) the (.+)\?", text)
    assert m, text
    a, b = pointed_at(scene, m[1]), pointed_at(scene, m[3])
    key = {"left of": "x", "right of": "x", "above": "y", "below": "y"}.get(m[2], "z")
    low, high = (a[key], b[key]) if m[2] in ("left of", "above", "smaller than") else (b[key], a[key])
    order = {"small": 0, "large": 1}
    low, high = order.get(low, low), order.get(high, high)  # type: ignore[call-overload]
    assert low != high, f"{text} has no clear answer in {scene}"
    return "yes" if low < high else "no"  # type: ignore[operator]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shapes") / "data"
    write_shapes(out, **SIZES_OF_SPLITS, seed=3, progress=False)
    return out


def test_every_answer_is_the_one_that_the_scene_gives() -> None:
    rng = random.Random(0)
    forms = set()
    for _ in range(400):
        scene = random_scene(rng)
        for question in questions(scene, rng):
            forms.add((question.type, question.form))
            assert question.answer == truth(scene, question.text), (scene, question)
    assert {question_type for question_type, _ in forms} == set(TYPES)
    assert len(forms) == 3 + 2 + 3 + 3 + 3 + 18


def test_captions_name_every_shape_once() -> None:
    rng = random.Random(1)
    for _ in range(100):
        scene = random_scene(rng)
        parts = re.findall(r"an? (\w+) (\w+) (\w+) at the ([\w ]+)", caption(scene).lower())
        assert parts == [(s.size, s.colour, s.shape, CELLS[s.cell]) for s in scene]


def test_no_scene_occurs_twice_and_none_in_two_splits() -> None:
    splits = make_examples(num_train=3000, num_validation=300, num_test=300, seed=0)
    scenes = [example.scene for split in splits.values() for example in split]
    assert len(set(scenes)) == len(scenes) == 3600
    ids = [example.id for split in splits.values() for example in split]
    assert len(set(ids)) == len(ids)


def test_held_out_scenes_do_not_depend_on_the_amount_of_training_data() -> None:
    few, many = (make_examples(num_train=n, num_validation=20, num_test=20, seed=5) for n in (1, 200))
    assert few["test"] == many["test"]
    assert few["validation"] == many["validation"]
    assert many["train"][:1] == few["train"]


def test_held_out_splits_ask_each_type_equally_often() -> None:
    splits = make_examples(num_train=1, num_validation=60, num_test=120, seed=0)
    assert Counter(e.questions[0].type for e in splits["test"]) == dict.fromkeys(TYPES, 20)
    assert Counter(e.questions[0].type for e in splits["validation"]) == dict.fromkeys(TYPES, 10)


def test_guessing_without_the_image_scores_low() -> None:
    splits = make_examples(num_train=4000, num_validation=1, num_test=1200, seed=0)
    asked = {name: [q for e in split for q in e.questions] for name, split in splits.items()}
    blind = blind_accuracy(asked["train"], asked["test"])
    assert blind["all"] < 0.35
    assert all(blind[name] < 0.60 for name in ("exist", "compare"))
    assert all(blind[name] < 0.35 for name in ("colour", "shape", "count", "position"))


def test_blind_accuracy_is_that_of_the_most_frequent_answer() -> None:
    def q(text: str, answer: str, kind: str = "colour") -> Question:
        return Question(type=kind, form="", text=text, answer=answer)

    known = [q("a", "red"), q("a", "red"), q("a", "blue"), q("b", "blue"), q("c", "blue")]
    asked = [q("a", "red"), q("a", "blue"), q("new", "blue"), q("n", "1", "count")]
    assert blind_accuracy(known, asked) == {"colour": 2 / 3, "count": 0.0, "all": 0.5}


def test_answers_of_a_form_are_balanced() -> None:
    rng, picker = random.Random(0), Picker()
    counts: Counter[str] = Counter()
    for _ in range(1800):
        question = picker.pick(questions(random_scene(rng), rng), "position", rng)
        counts[question.answer if question else "none"] += 1
    counts.pop("none")
    assert set(counts) == set(CELLS)
    assert max(counts.values()) - min(counts.values()) <= 9


def test_absent_shapes_are_often_made_of_present_parts() -> None:
    """Else "is that colour there, is that form there" would answer without binding the two."""
    rng = random.Random(0)
    wrong = total = 0
    for _ in range(500):
        scene = random_scene(rng)
        for q in questions(scene, rng):
            if q.type == "exist" and q.form == "by both" and q.answer == "no":
                colour, shape = q.text.rstrip("?").split()[-2:]
                parts_present = colour in {s.colour for s in scene} and shape in {s.shape for s in scene}
                wrong, total = wrong + parts_present, total + 1
    assert wrong / total > 0.4


def test_a_picture_shows_each_colour_in_its_cell_and_nothing_elsewhere() -> None:
    rng = random.Random(2)
    hues = {
        "red": 0,
        "orange": 25,
        "green": 92,
        "cyan": 130,
        "blue": 164,
        "purple": 205,
    }  # of 256, as PIL counts
    for _ in range(40):
        scene = random_scene(rng)
        picture = draw(scene, rng).resize((90, 90), Image.Resampling.BOX).convert("HSV")
        by_cell = {s.cell: s for s in scene}
        for cell in range(9):
            x, y = 30 * (cell % 3) + 15, 30 * (cell // 3) + 15
            hue, saturation, _ = picture.getpixel((x, y))  # type: ignore[misc]
            if cell in by_cell:
                distance = abs(hue - hues[by_cell[cell].colour])
                assert saturation > 100
                assert min(distance, 256 - distance) < 16
            else:
                assert saturation < 60


def test_large_shapes_fill_more_of_the_picture_than_small_ones() -> None:
    rng = random.Random(4)
    for shape in SHAPES:
        areas = {}
        for size in SIZES:
            scene = random_scene(rng)[:1]
            (one,) = scene
            pictures = [
                draw((type(one)(cell=4, colour="blue", shape=shape, size=size),), rng) for _ in range(10)
            ]
            filled = [
                sum(s > 120 for s in p.convert("HSV").getdata(1)) / (p.width * p.height) for p in pictures
            ]
            areas[size] = filled
        assert max(areas["small"]) < min(areas["large"])


def test_files_are_llava_records_with_readable_images(written: Path) -> None:
    for name, length in (("captions", 40), ("instructions", 50), ("validation", 12), ("test", 18)):
        records = json.loads((written / f"{name}.json").read_text())
        assert len(records) == length
        for record in records:
            turns = record["conversations"]
            assert [t["from"] for t in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert "".join(t["value"] for t in turns).count("<image>") == 1
            assert turns[0]["value"].startswith("<image>")
            assert all(t["value"] for t in turns)
            with Image.open(written / record["image"]) as picture:
                picture.load()
            assert (record["image"].endswith(".png")) == (picture.format == "PNG")
            assert ("type" in record) == (name in ("validation", "test"))


def test_some_scenes_are_described_among_the_instructions_apart_from_their_questions(written: Path) -> None:
    captions = json.loads((written / "captions.json").read_text())
    caption_of = {record["image"]: record["conversations"][1]["value"] for record in captions}
    records = json.loads((written / "instructions.json").read_text())
    described = [r for r in records if r["id"].endswith("_described")]
    assert len(described) == 10
    for record in described:
        question, answer = (turn["value"] for turn in record["conversations"])
        assert question == "<image>\nDescribe the picture."
        assert answer == caption_of[record["image"]]
    assert not any("Describe" in json.dumps(r) for r in records if r not in described)
    assert len({r["id"] for r in records}) == len(records)


def test_pictures_vary_in_format_and_size(written: Path) -> None:
    kinds, sizes = set(), set()
    for path in (written / "images").iterdir():
        with Image.open(io.BytesIO(path.read_bytes())) as picture:
            kinds.add(picture.format)
            sizes.add(picture.size)
    assert kinds == {"JPEG", "PNG"}
    assert len(sizes) > 20


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(written: Path, tmp_path: Path) -> None:
    def content(directory: Path) -> dict[str, bytes]:
        return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}

    write_shapes(tmp_path / "again", **SIZES_OF_SPLITS, seed=3, progress=False)
    write_shapes(tmp_path / "other", **SIZES_OF_SPLITS, seed=4, progress=False)
    assert content(tmp_path / "again") == content(written)
    assert content(tmp_path / "other")["test.json"] != content(written)["test.json"]


def test_finished_data_is_left_alone_and_anything_else_is_refused(written: Path, tmp_path: Path) -> None:
    before = (written / "test.json").stat().st_mtime_ns
    blind = write_shapes(written, **SIZES_OF_SPLITS, seed=3, progress=False)
    assert blind == {"test": json.loads((written / MANIFEST).read_text())["blind_accuracy"]}
    assert (written / "test.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"already holds shapes data made with .*'seed': 3"):
        write_shapes(written, **SIZES_OF_SPLITS, seed=4, progress=False)
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        write_shapes(tmp_path, **SIZES_OF_SPLITS, progress=False)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_an_interrupted_run_leaves_nothing_that_looks_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("llava_kd.data.shapes.writing.encode_picture", fail)
        with pytest.raises(KeyboardInterrupt):
            write_shapes(tmp_path / "data", **SIZES_OF_SPLITS, progress=False)
    assert not (tmp_path / "data").exists()
    write_shapes(tmp_path / "data", **SIZES_OF_SPLITS, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one scene"):
        write_shapes(tmp_path / "data", num_train=0, num_validation=1, num_test=1, progress=False)


def test_vocabularies_are_distinct() -> None:
    words = [*COLOURS, *SHAPES, *SIZES, *CELLS]
    assert len(set(words)) == len(words)
