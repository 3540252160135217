"""Tables become LLaVA records, and whatever is wrong with one is said with what came."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from own_pictures import write_csv

from llava_kd.curation import spreadsheets
from llava_kd.curation.spreadsheets import choose_columns, is_table, read_rows, to_records
from llava_kd.data.sources.conversation import parse_record

ROWS = [
    ["a.png", 'Is it "red", or not?', "yes"],
    ["b.png", "Zwei\nZeilen?", "ja, gr\u00fcn"],
]
NAMES = ["image", "question", "answer"]


def records(path: Path, **chosen: str) -> list[dict]:
    names, rows = read_rows(path)
    found, faults = to_records(rows, choose_columns(path, names, chosen))
    assert not faults
    return found


def write_xlsx(path: Path, rows: list[list[object]]) -> Path:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.save(path)
    return path


def said(found: list[dict]) -> list[tuple[str, str, str]]:
    read = [parse_record(entry, 0) for entry in found]
    return [(record.images[0], record.turns[0].text, record.turns[1].text) for record in read]


EXPECTED = [(image, f"<image>\n{question}", answer) for image, question, answer in ROWS]


TORN = {
    "a comma": ("a.png,What?,red, or blue", r"row 3, has 4 cells under 3 columns: ' or blue' would be lost"),
    "a quote": ('a.png,What?,"STOP', r"double quote is never closed, .*: 'STOP\\nc.png,Is it\?,no\\n"),
}


@pytest.mark.parametrize("kind", TORN)
def test_a_row_that_is_torn_or_takes_in_others_is_refused(tmp_path: Path, kind: str) -> None:
    row, words = TORN[kind]
    path = tmp_path / "t.csv"
    path.write_text(f"image,question,answer\nb.png,What?,blue,,\n{row}\nc.png,Is it?,no\n")
    with pytest.raises(ValueError, match=words):
        read_rows(path)


def test_a_list_of_texts_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "metadata.jsonl"
    boxes = {"bbox": [[1, 2, 3, 4]]}
    lines = [
        {"file_name": "a.png", "text": ["a cat", "a pet"]},
        {"file_name": "b.png", "text": "a dog", "objects": boxes},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    names, rows = read_rows(path)
    found, faults = to_records(rows, choose_columns(path, names, {}, "What?"))
    assert faults == ["row 1 must have one text as text, got ['a cat', 'a pet']; write a row for each"]
    assert said(found) == [("b.png", "<image>\nWhat?", "a dog")]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "with a mark of Excel"])
def test_a_csv_is_read_whatever_cuts_its_cells(tmp_path: Path, delimiter: str, mark: str) -> None:
    import csv
    import io

    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows([NAMES, *ROWS])
    path = tmp_path / "t.csv"
    path.write_bytes((mark + text.getvalue()).encode())
    assert said(records(path)) == EXPECTED


def test_an_xlsx_says_what_the_csv_says(tmp_path: Path) -> None:
    assert said(records(write_xlsx(tmp_path / "t.xlsx", [NAMES, *ROWS]))) == EXPECTED


def test_numbers_and_empty_rows_of_a_sheet(tmp_path: Path) -> None:
    rows = [
        [None, None, None],
        NAMES,
        ["a.png", "How many?", 3],
        [None, None, None],
        ["b.png", "How many?", 4],
    ]
    found = records(write_xlsx(tmp_path / "t.xlsx", rows))
    assert [entry["id"] for entry in found] == ["row3", "row5"]  # as the spreadsheet counts
    assert [answer for _, _, answer in said(found)] == ["3", "4"]


def test_the_table_of_an_image_folder(tmp_path: Path) -> None:
    path = tmp_path / "metadata.jsonl"
    path.write_text('\n{"file_name": "a.png", "text": "a cat"}\n')
    assert is_table(path)
    names, rows = read_rows(path)
    found, _ = to_records(rows, choose_columns(path, names, {}, "What is it?"))
    assert said(found) == [("a.png", "<image>\nWhat is it?", "a cat")]


def test_llava_json_lines_are_no_table(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"id": "1", "image": "a.png", "conversations": []}))
    assert not is_table(path)


def test_columns_by_their_own_names(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", ROWS, ("Foto", "Frage", "Antwort"))
    assert said(records(path, image="Foto", question="Frage", answer="Antwort")) == EXPECTED
    path = write_csv(tmp_path / "u.csv", ROWS, (" Image ", "QUESTION", "Answer"))
    assert said(records(path)) == EXPECTED


def test_a_placeholder_in_a_cell_is_no_second_picture(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", [["a.png", "<image> What?", "an <image>"]])
    assert said(records(path)) == [("a.png", "<image>\nWhat?", "an")]


def test_a_row_that_lacks_a_cell_is_named(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path / "t.csv", [["a.png", "What?", ""], ["", "What?", "x"], ["c.png", "What?", "y"]]
    )
    names, rows = read_rows(path)
    found, faults = to_records(rows, choose_columns(path, names, {}))
    assert [entry["image"] for entry in found] == ["c.png"]
    assert faults == ["row 2 has no answer", "row 3 has no image"]


@pytest.mark.parametrize(
    ("names", "chosen", "asked", "words"),
    [
        (["picture", "text"], {}, None, "no column for question; its columns are picture, text. Name them"),
        (["a", "b"], {}, "Q?", "no column for image and answer; its columns are a, b."),
        (
            ["image", "q", "answer"],
            {"question": "Q"},
            None,
            "no column 'Q' for the question; its columns are im",
        ),
        (
            ["image", "answer"],
            {"caption": "x"},
            None,
            "--columns takes image, question, answer; got caption=x",
        ),
        (NAMES, {}, "Q?", "has the questions in its column question, and --question gives one for all"),
    ],
)
def test_columns_that_are_not_there_are_told_with_those_that_came(
    names: list[str], chosen: dict[str, str], asked: str | None, words: str
) -> None:
    with pytest.raises(ValueError, match="column") as caught:
        choose_columns(Path("t.csv"), names, chosen, asked)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("t.csv", b"", "is empty; its first row names the columns"),
        (
            "t.csv",
            b"image,question,answer\n",
            "has the columns image, question, answer and no row below them",
        ),
        ("t.csv", b"image,answer,answer\n1,2,3\n", "has the column answer twice"),
        (
            "t.csv",
            "image,question,answer\na,b,gr\u00fcn".encode("latin-1"),
            "byte 28 is not; save it as `CSV UTF-8`",
        ),
        ("t.xlsx", b"no zip", "cannot be read as .xlsx"),
        ("t.jsonl", b'{"a": 1}\n{', "line 2, is not JSON"),
        ("t.jsonl", b'{"a": 1}\n[1]', "line 2, must be an object"),
    ],
)
def test_a_file_that_is_no_table(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    if name.endswith("xlsx"):
        pytest.importorskip("openpyxl")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=r"t\.") as caught:
        read_rows(tmp_path / name)
    assert words in str(caught.value)


def test_an_archive_that_unpacks_to_too_much_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openpyxl")
    path = tmp_path / "t.xlsx"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("xl/worksheets/sheet1.xml", b" " * (3 << 20))
    monkeypatch.setattr(spreadsheets, "MAX_BYTES", 2 << 20)
    assert path.stat().st_size < 2 << 20
    with pytest.raises(ValueError, match="is 3 MB, and a table may have 2 MB"):
        read_rows(path)
