"""What each kind of evidence reads of a sentence: right, wrong with its correction, or nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava_kd.curation.rationale.evidence import Check, Evidence, read_by_key
from llava_kd.curation.rationale.passages import read_passages
from llava_kd.curation.rationale.scenes import read_boxes, read_scene_graphs
from llava_kd.curation.rationale.words import read_facts, read_written_words
from llava_kd.data.sources.conversation import Record

GRAPH = {
    "objects": {
        "c": {
            "name": "circle",
            "attributes": {"colour": "red", "size": "large", "place": "top left"},
            "relations": [{"name": "left of", "object": "s"}, {"name": "wearing", "object": "h"}],
        },
        "d": {"name": "circle", "attributes": {"colour": "red", "size": "small", "place": "bottom"}},
        "s": {"name": "star", "attributes": {"colour": "blue", "size": "small", "place": "top"}},
        "h": {"name": "hat", "attributes": ["woollen"]},
    }
}
OTHER = {
    "objects": [{"name": "box", "attributes": {"colour": "orange"}}, {"name": "bag", "attributes": ["old"]}]
}


def about(evidence: Evidence, name: str = "a") -> Check:
    check = evidence.about(Record(id=name, images=(), turns=()))
    assert check is not None
    return check


def said(check: Check, claim: str) -> str | bool | None:
    """True where it holds, False where it does not and nothing corrects it, the correction, None: unread."""
    verdict = check(claim)
    if verdict is None or verdict.holds:
        return None if verdict is None else True
    if verdict.correction:
        again = check(verdict.correction)
        assert again is not None, verdict.correction
        assert again.holds, verdict.correction  # what corrects a claim is itself borne out
    return verdict.correction or False


def written(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


@pytest.fixture
def graph(tmp_path: Path) -> Check:
    return about(read_scene_graphs(written(tmp_path / "graphs.json", {"a": GRAPH, "b": OTHER})))


@pytest.mark.parametrize(
    ("claim", "truth"),
    [
        ("There are two red circles.", True),
        ("There are 2 circles in the picture.", True),
        ("There are three red circles.", "There are two red circles."),
        ("There is one circle.", "There are two circles."),
        ("There are 4 stars in the image.", "There is 1 star in the image."),
        ("There is a star.", True),
        ("There is a blue circle.", False),
        ("There are no orange circles.", True),
        ("There is one circle at the bottom.", True),
        ("There are two circles at the top left.", "There is one circle at the top left."),
        ("the number of shapes is 4", True),
        ("The number of red shapes is 3.", None),  # the hat's colour is not known
        ("The number of circles is zero.", "The number of circles is two."),
        ("The large circle is red.", True),
        ("The small red circle is blue!", "The small red circle is red!"),
        ("The star is orange.", "The star is blue."),
        ("The star is at the bottom.", "The star is at the top."),
        ("The circle is at the top.", False),
        ("The circle is at the bottom.", None),  # one of them is
        ("The circles are red.", None),
        ("The blue one is a circle.", None),  # what colour the hat has is not known
        ("The small star is a box.", "The small star is a star."),
        ("The small star is an old bag.", None),
        ("The hat is woollen.", True),
        ("The hat is old.", None),  # a list of words is not all that can be said
        ("The box is orange.", False),  # no box is there
        ("The large circle is left of the star.", True),
        ("The star is left of the large circle.", "The star is right of the large circle."),
        ("The star is to the left of the large circle.", "The star is to the right of the large circle."),
        ("The circle is left of the star.", None),  # which circle?
        ("The large circle is above the star.", None),
        ("The large circle is wearing the hat.", True),
        ("The star is wearing the hat.", None),
        ("The star is right of the box.", False),
        ("The star is not red.", None),
        ("The star is red and the circle is red.", None),
        ("The star is magenta.", None),
        ("The dragon is red.", None),
        ("Red is warm.", None),
        ("", None),
    ],
)
def test_scene_graphs(graph: Check, claim: str, truth: str | bool | None) -> None:
    assert said(graph, claim) == truth


@pytest.mark.parametrize(
    ("claim", "truth"),
    [
        ("The dog is left of the red car.", True),
        ("The dog is right of the red car.", "The dog is left of the red car."),
        ("The red car is smaller than the dog.", "The red car is larger than the dog."),
        ("The dog is under the red car.", True),
        ("The dog is over the red car.", "The dog is below the red car."),
        ("The dog is at the top right.", "The dog is at the bottom left."),
        ("There are 2 dogs.", "There is 1 dog."),
        ("The dog is red.", None),
    ],
)
def test_boxes(tmp_path: Path, claim: str, truth: str | bool | None) -> None:
    boxes = [{"label": "dog", "box": [0, 80, 20, 100]}, {"label": "Red car", "box": [50, 0, 100, 50]}]
    entries = [
        {"image": "a.jpg", "boxes": boxes, "width": 100, "height": 100},
        {"image": "b.jpg", "boxes": [{"label": "cat", "box": [90, 0, 100, 10]}], "width": 100, "height": 100},
    ]
    evidence = read_boxes(written(tmp_path / "boxes.json", entries))
    check = evidence.about(Record(id="7", images=("a.jpg",), turns=()))
    assert check is not None
    assert said(check, claim) == truth


@pytest.mark.parametrize(
    ("claim", "truth"),
    [
        ('The sign says "main street".', True),
        ('It reads "Main Stret".', 'It reads "Main Street".'),
        ('It reads \u201cMain\u201d and "Open".', True),
        ('It reads "Station".', False),
        ('It reads "in".', False),  # a part of a word is no word
        ('It does not read "Open".', None),
        ("It reads Open.", None),
    ],
)
def test_written_words(tmp_path: Path, claim: str, truth: str | bool | None) -> None:
    path = written(tmp_path / "ocr.json", {"a": ["Main", "Street", "OPEN"]})
    assert said(about(read_written_words(path)), claim) == truth


@pytest.mark.parametrize(
    ("claim", "truth"),
    [
        ("Paris is the capital of France.", True),
        ("The capital of France is Lyon.", "The capital of France is Paris."),
        ("The capital of France is New York City.", "The capital of France is Paris."),
        ("The capital of Francesca is Lyon.", None),
        ("The capital of France is a city.", None),
        ("The capital of France is Paris or Lyon.", None),
        ("Lyon is not the capital of France.", None),
        ("The height of Rigi is 1797 m.", "The height of Rigi is 1798 m."),
        ("The height of Rigi, in 2020, was 1797.", False),  # which of the numbers is wrong is not known
        ("Rigi is in Italy, the country.", "Rigi is in Switzerland, the country."),
        ("Rome is the capital of France and Paris that of Italy.", None),
    ],
)
def test_facts(tmp_path: Path, claim: str, truth: str | bool | None) -> None:
    path = tmp_path / "facts.csv"
    rows = ["France,capital,Paris", "Italy,capital,Rome", "Rhone,capital,Lyon", "Rigi,height,1798"]
    rows += [
        "USA,capital,New York City",
        "Albany,capital,New York",
        "Rigi,country,Switzerland",
        "Etna,country,Italy",
    ]
    path.write_text("subject,relation,object\n" + "\n".join(rows))
    assert said(about(read_facts(path)), claim) == truth


def test_facts_of_a_record_are_about_no_other(tmp_path: Path) -> None:
    rows = [{"subject": "the car", "relation": "brand", "object": "Fiat", "record": "a"}]
    evidence = read_facts(written(tmp_path / "facts.json", rows))
    assert said(about(evidence), "The brand of the car is Fiat.") is True
    assert evidence.about(Record(id="b", images=(), turns=())) is None
    assert evidence.keys == {"a"}


@pytest.mark.parametrize(
    ("claim", "truth"),
    [
        ("The tower was finished in 1889.", True),
        ("The tower was finished in 1887.", "The tower was finished in 1889."),
        ("The bridge was designed by Roebling.", True),
        ("The bridge was designed by Eiffel.", False),
        ("The bridge is made of green cheese.", None),
        ("The tower was not finished in 1887.", None),
        ("Qwerty zxcv.", None),
    ],
)
def test_passages(tmp_path: Path, claim: str, truth: str | bool | None) -> None:
    (tmp_path / "one.txt").write_text(
        "The tower was\nfinished in 1889.\n\nIt is made of iron, and painted brown."
    )
    (tmp_path / "two.md").write_text("The bridge was designed by Roebling. It is made of steel.")
    (tmp_path / "no.csv").write_text("The bridge was designed by Eiffel.")
    evidence = read_passages(tmp_path)
    assert len(evidence.passages) == 3
    assert said(about(evidence), claim) == truth


LONG = "The old bridge over the wide river was opened in 1883 and has two high towers of grey granite."


@pytest.mark.parametrize(
    ("claim", "truth"),
    [
        (LONG, True),
        (LONG.replace("1883", "1893"), LONG),  # nearly all words are there, and the number is not
        (LONG.replace("two", "three"), None),  # as a word too
        (LONG.replace("was opened", "was not opened"), None),
        (LONG.replace("was opened", "wasn\u2019t opened"), None),
        (LONG.replace("was opened", "cannot have been opened"), None),
        ("The old harbour was closed in 1901 for large ships.", None),  # a passage denies it, in one sentence
        ("The old harbour was closed in 1902 for large ships.", None),  # what is denied corrects nothing
        ("The old mill by the small lake burnt down in 1851.", False),  # nor in the sentence beside
        ("It still serves small boats every summer.", True),  # the sentence beside it denies
        ("The 5th arch of the long stone viaduct is blue.", True),
        ("The 6th arch of the long stone viaduct is blue.", None),
    ],
)
def test_a_passage_bears_out_neither_another_number_nor_the_contrary(
    tmp_path: Path, claim: str, truth: str | bool | None
) -> None:
    """Each claim has more than the share of its words in a passage that would make it hold."""
    denial = (
        "The old harbour was not closed in 1901 for large ships. It still serves small boats every summer."
    )
    viaduct = "The 5th arch of the long stone viaduct is blue."
    mill = "The old mill by the small lake burnt down. It was not in 1850."
    (tmp_path / "one.txt").write_text(f"{LONG}\n\n{denial}\n\n{viaduct}\n\n{mill}")
    check = about(read_passages(tmp_path))
    assert said(check, claim) == truth


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ([], "holds no scene graphs"),
        (7, "by record, got int"),
        ([{"objects": []}], "entry 0 must be an object with the `id` or `image`"),
        ([{"id": 1, "objects": []}, {"id": "1", "objects": []}], "'1' occurs twice"),
        ({"a": []}, "record 'a': must be an object with `objects`"),
        ({"a": {"objects": [{"attributes": {}}]}}, "a name or a word is missing"),
        ({"a": {"objects": [{"name": "x", "attributes": 3}]}}, "`attributes` are values by kind"),
        (
            {"a": {"objects": [{"name": "x", "relations": [{"name": "on", "object": "y"}]}]}},
            "the `object` it is to",
        ),
        ({"a": {"objects": [{"name": "x", "box": [0, 0, 5]}]}}, "four numbers"),
        ({"a": {"objects": [{"name": "x", "box": [5, 0, 0, 5]}]}}, "goes from left, top"),
        ({"a": {"objects": [{"name": "x", "box": [0, 0, 5, float("nan")]}]}}, "four numbers"),
    ],
)
def test_a_scene_graph_that_is_none_is_refused_by_name(tmp_path: Path, value: object, why: str) -> None:
    with pytest.raises(ValueError, match=r"graphs\.json") as caught:
        read_scene_graphs(written(tmp_path / "graphs.json", value))
    assert why in str(caught.value)


def test_other_files_that_are_none_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file of OCR tokens"):
        read_written_words(tmp_path / "none.json")
    with pytest.raises(ValueError, match="record 'a': OCR tokens are a list of words"):
        read_written_words(written(tmp_path / "ocr.json", {"a": [1]}))
    with pytest.raises(ValueError, match="fact 1 must have subject, relation, object"):
        read_facts(written(tmp_path / "facts.json", [{"subject": "x", "relation": "", "object": "y"}]))
    with pytest.raises(ValueError, match=r"no \.txt or \.md file below"):
        read_passages(tmp_path / "none")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"bad.txt must be UTF-8 text"):
        read_passages(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_by_key(tmp_path / "broken.json", "things")


def test_lines_of_json_are_read_too_and_what_changes_changes_the_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "graphs.jsonl"
    path.write_text("".join(json.dumps({"id": name, **GRAPH}) + "\n" for name in "ab"))
    first = read_scene_graphs(path)
    assert set(first.keys) == {"a", "b"}
    path.write_text(path.read_text().replace("blue", "green"))
    assert read_scene_graphs(path).fingerprint != first.fingerprint
