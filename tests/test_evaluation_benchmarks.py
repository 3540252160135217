"""The ten benchmarks on tiny files in their real layouts."""

from __future__ import annotations

import json
import random
import re
import zipfile
from pathlib import Path

import pytest
import tiny_benchmarks as tiny
from tiny_llava import make_tiny_llava

from llava_kd.evaluation.benchmarks import run
from llava_kd.evaluation.benchmarks.base import Quirks, Score
from llava_kd.evaluation.benchmarks.catalogue import BENCHMARKS, FURTHER, OTHER_SPLITS, PAPER, find
from llava_kd.evaluation.benchmarks.published import AVG7, AVG10, PUBLISHED, average
from llava_kd.evaluation.benchmarks.run import (
    evaluate_benchmarks,
    match_answers,
    score_file,
    verify,
    write_tables,
)
from llava_kd.evaluation.benchmarks.table import markdown_table
from llava_kd.evaluation.runner import Asking


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_all(tmp_path_factory.mktemp("benchmarks"))


def score(root: Path, name: str, answers: dict[str, str], **quirks: bool) -> Score:
    benchmark = BENCHMARKS[name]
    settings = Quirks(**quirks)
    assert benchmark.score is not None
    return benchmark.score(root, benchmark.read(root, settings), answers, settings)


RIGHT = {
    "vqav2_val": {"262148000": "2", "262148001": "yes", "262148002": "Red bus."},
    "gqa": {"200": "Dining table.", "201": "Yes", "202": "left"},
    "vizwiz_val": {"VizWiz_val_00000000.jpg": "Unanswerable", "VizWiz_val_00000001.jpg": "blue"},
    "scienceqa": {"1": "B", "2": "A. because", "3": "The answer is B."},
    "textvqa": {"34602": "Dakota", "34603": "1999", "34604": "McDonald's"},
    "mmbench": {"1": "B", "1000001": "A.", "2": "yes", "3": "B"},
    "mmbench_cn": {"1": "\u9009B", "1000001": "A\u3002", "2": "A", "3": "B"},
    "seed_bench": {"101669": "A", "2": "C"},
    "mmmu": {"validation_Art_Theory_1": "(B) iron", "validation_Music_2": "It is 0.963"},
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # 2 matches "two" and "2" (6 of 10); the last is "red bus" against nine "a red bus".
        ("vqav2_val", 100.0),
        ("gqa", 100.0),
        # Humans are not normalised: 7 "Blue" do not match, 3 "blue" give 0.9.
        ("vizwiz_val", 95.0),
        ("scienceqa", 100.0),
        # 1,999 loses its comma; the third matches 3 of 10.
        ("textvqa", 100 * (1 + 1 + 0.9) / 3),
        ("mmbench", 100.0),
        ("mmbench_cn", 100.0),
        ("seed_bench", 100.0),
    ],
)
def test_right_answers_score_what_the_rules_give(root: Path, name: str, expected: float) -> None:
    assert score(root, name, RIGHT[name]).value == pytest.approx(expected)


@pytest.mark.parametrize("name", list(RIGHT))
def test_the_score_does_not_depend_on_the_order_of_answers(root: Path, name: str) -> None:
    names = list(RIGHT[name])
    random.Random(1).shuffle(names)
    shuffled = {key: RIGHT[name][key] for key in names}
    assert score(root, name, shuffled) == score(root, name, RIGHT[name])


@pytest.mark.parametrize("name", list(RIGHT))
def test_a_missing_answer_is_noted_and_wrong(root: Path, name: str) -> None:
    first = next(iter(RIGHT[name]))
    kept = {key: text for key, text in RIGHT[name].items() if key != first} | {"stranger": "yes"}
    lacking = score(root, name, kept, mmmu_guess=False)
    assert lacking.value < score(root, name, RIGHT[name], mmmu_guess=False).value
    assert any(
        f"1 questions have no answer and count as wrong, the first is {first}" in n for n in lacking.notes
    )
    assert any("1 answers belong to no question, the first is stranger" in n for n in lacking.notes)
    assert len(lacking.items) == len(score(root, name, RIGHT[name]).items)


def test_vqav2_counts_the_questions_that_identical_humans_decide(root: Path) -> None:
    answers = RIGHT["vqav2_val"] | {"262148001": "Yes."}
    official, kind = (
        score(root, "vqav2_val", answers),
        score(root, "vqav2_val", answers, vqav2_skip_identical=False),
    )
    assert official.parts["yes/no"] == 0
    assert kind.parts["yes/no"] == 100
    assert any(
        "1 questions with ten equal answers are not normalised" in n and "decides 1" in n
        for n in official.notes
    )


def test_vqav2_without_answer_ids_is_counted_human_by_human(tmp_path: Path) -> None:
    tiny.write_vqav2_val(tmp_path, answer_ids=False)
    result = score(tmp_path, "vqav2_val", RIGHT["vqav2_val"])
    assert result.value == 100
    assert any("3 annotations lack answer_id" in note for note in result.notes)


def test_gqa_splits_by_structure_and_keeps_outer_space(root: Path) -> None:
    result = score(root, "gqa", RIGHT["gqa"] | {"201": " yes", "202": "right"})
    assert (result.parts["open"], result.parts["binary"]) == (100, 0)


def test_scienceqa_headline_is_over_questions_with_an_image(root: Path) -> None:
    result = score(root, "scienceqa", RIGHT["scienceqa"] | {"3": "(B)"})
    assert result.parts == {"image": 50, "text only": 50, "total": 50}
    assert any("1 questions of the test split" in note for note in result.notes)
    assert any("no letter could be read from 2 answers" in note for note in result.notes)


def test_textvqa_questions_that_share_an_image_stay_apart(root: Path) -> None:
    ids = [question.id for question in BENCHMARKS["textvqa"].read(root, Quirks())]
    assert ids == ["34602", "34603", "34604"]


def test_mme_reads_both_layouts_and_double_spaces(root: Path) -> None:
    truths = [question.truth for question in BENCHMARKS["mme"].read(root, Quirks())]
    assert truths == ["yes", "no"] * 6


def test_mme_sums_tasks_over_answers_and_images(root: Path) -> None:
    questions = BENCHMARKS["mme"].read(root, Quirks())
    answers = {q.id: q.truth.title() for q in questions} | {"OCR/0001.jpg#2": "Yes"}
    result = score(root, "mme", answers)
    assert result.parts["existence"] == 200
    assert result.parts["OCR"] == 75 + 50
    assert result.parts["perception"] == 325
    assert result.parts["cognition"] == 200
    assert result.value == pytest.approx(325 / 20)
    assert any("no questions of count, position" in note for note in result.notes)


def test_mmbench_needs_every_rotation(root: Path) -> None:
    result = score(root, "mmbench", RIGHT["mmbench"] | {"1000001": "B"})
    assert result.parts["circular"] == pytest.approx(100 * 2 / 3)
    assert result.parts["vanilla"] == 100
    assert (result.parts["animals"], result.parts["logic"]) == (0, 100)


def test_mmbench_stops_at_an_option_that_pandas_takes_for_missing(root: Path) -> None:
    official = BENCHMARKS["mmbench"].read(root, Quirks())[3].text
    kept = BENCHMARKS["mmbench"].read(root, Quirks(mmbench_stop_at_none=False))[3].text
    assert "B. two\nAnswer" in official
    assert "B. two\nC. None\nD. four\nAnswer" in kept
    notes = score(root, "mmbench", RIGHT["mmbench"]).notes
    assert any("1 rows have an option such as None or NA; it is left out" in note for note in notes)


def test_mmbench_chinese_answers_are_lost_by_the_published_rule(root: Path) -> None:
    published = score(root, "mmbench_cn", RIGHT["mmbench_cn"], mmbench_latin_only=True)
    assert published.value == pytest.approx(100 * 2 / 3)
    assert any("2 answers are read differently" in note for note in published.notes)


def test_mmbench_takes_the_image_of_the_row_it_names(root: Path) -> None:
    questions = BENCHMARKS["mmbench"].read(root, Quirks())
    assert questions[1].images == questions[0].images


@pytest.mark.parametrize("name", ["mmbench", "mmbench_test"])
def test_mmbench_upload_has_the_columns_of_llava(root: Path, tmp_path: Path, name: str) -> None:
    benchmark = BENCHMARKS[name]
    assert benchmark.upload is not None
    answers = {"1": "B & <C>", "2": "\x0b\u9009A"}
    path = benchmark.upload(root, benchmark.read(root, Quirks()), answers, Quirks(), tmp_path)
    sheet = zipfile.ZipFile(path).read("xl/worksheets/sheet1.xml").decode()
    rows = [
        re.findall(r"<c[^>]*?(?:/>|>(?:<v>|<is><t[^>]*>)(.*?)<)", row) for row in sheet.split("<row>")[1:]
    ]
    truth = ["answer"] if name == "mmbench" else []
    assert rows[0] == ["index", "question", "A", "B", "C", "D", "prediction", *truth, "split"]
    assert rows[1][:7] == ["1", "What is it?", "cat", "dog", "owl", "fox", "B &amp; &lt;C&gt;"]
    assert rows[3][4:7] == ["", "", "\u9009A"]


def pope_answers(root: Path) -> dict[str, str]:
    return {q.id: ("Yes", "No")[k % 2] for k, q in enumerate(BENCHMARKS["pope"].read(root, Quirks()))}


def test_pope_joins_labels_by_image_and_question(root: Path, tmp_path: Path) -> None:
    tiny.write_pope(tmp_path)
    path = tmp_path / "pope/coco/coco_pope_popular.json"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert score(tmp_path, "pope", pope_answers(tmp_path)).value == 100
    assert score(root, "pope", pope_answers(root)).value == 100


def test_pope_counts_a_missing_answer_as_wrong_without_shifting_the_rest(root: Path) -> None:
    answers = pope_answers(root)
    del answers["2"]
    result = score(root, "pope", answers)
    assert result.parts["random accuracy"] == 75
    assert result.parts["mean F1"] == pytest.approx(100 * (0.8 + 1 + 1) / 3)
    assert result.parts["mean accuracy"] == pytest.approx(100 * (0.75 + 1 + 1) / 3)


def test_pope_files_of_two_releases_are_refused(tmp_path: Path) -> None:
    tiny.write_pope(tmp_path)
    path = tmp_path / "pope/coco/coco_pope_random.json"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]))
    with pytest.raises(
        ValueError, match=r"different releases: question 4 has no label.*2,910 rows in one and 3,000"
    ):
        BENCHMARKS["pope"].read(tmp_path, Quirks())
    path.write_text("".join([*lines, lines[0].replace("thing0", "thing9")]))
    with pytest.raises(ValueError, match="different releases: 1 labels have no question"):
        score(tmp_path, "pope", pope_answers(tmp_path))


def test_pope_ids_that_start_anew_in_each_category_stay_apart(tmp_path: Path) -> None:
    tiny.write_pope(tmp_path)
    path = tmp_path / "pope/llava_pope_test.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    tiny.write_lines(path, [row | {"question_id": k % 4} for k, row in enumerate(rows)])
    assert score(tmp_path, "pope", pope_answers(tmp_path)).value == 100


def test_pope_without_a_yes_says_so(root: Path) -> None:
    result = score(root, "pope", dict.fromkeys(pope_answers(root), "No"))
    assert result.value == 0
    assert any("no yes was predicted in random, popular, adversarial" in note for note in result.notes)


def test_mmmu_guesses_as_the_official_code_or_not_at_all(root: Path) -> None:
    drawn = random.Random(42).choice(["A", "B", "C"])
    official, strict = (score(root, "mmmu", RIGHT["mmmu"], mmmu_guess=guess) for guess in (True, False))
    assert official.items[2].reading == f"{drawn} (guess)"
    assert strict.value == pytest.approx(100 * 2 / 3)
    assert official.value == pytest.approx(100 * (3 if drawn == "C" else 2) / 3)
    assert any(
        "1 questions have several images and are not asked: they count as wrong" in n for n in strict.notes
    )
    assert strict.parts["Art_Theory"] == 100
    assert strict.parts["Music"] == 50


def test_uploads_hold_normalised_answers_of_every_question(root: Path, tmp_path: Path) -> None:
    for name, answers in (
        ("vqav2", {"11": "The dog.", "12": "McDonald's"}),
        ("vizwiz", dict.fromkeys(("VizWiz_test_00000000.jpg", "VizWiz_test_00000001.jpg"), "Two cats")),
    ):
        benchmark = BENCHMARKS[name]
        assert benchmark.upload is not None
        questions = benchmark.read(root, Quirks())
        path = benchmark.upload(root, questions, answers, Quirks(), tmp_path)
        rows = json.loads(path.read_text())
        if name == "vqav2":
            assert rows == [
                {"question_id": 13, "answer": ""},
                {"question_id": 11, "answer": "dog"},
                {"question_id": 12, "answer": "mcdonald 's"},
            ]
            path = benchmark.upload(root, questions, answers, Quirks(upload_m4c=False), tmp_path)
            assert json.loads(path.read_text())[2]["answer"] == "mcdonald's"
        else:
            assert rows[1] == {"image": "VizWiz_test_00000001.jpg", "answer": "2 cats"}
            with pytest.raises(ValueError, match="VizWiz wants every answer; 1 are missing"):
                benchmark.upload(root, questions, dict(list(answers.items())[:1]), Quirks(), tmp_path)


def test_answers_of_llavas_scripts_are_joined_by_id_and_prompt(root: Path, tmp_path: Path) -> None:
    questions = BENCHMARKS["mme"].read(root, Quirks())
    rows = [
        {
            "question_id": q.extra["source_id"],
            "prompt": q.text.removeprefix("<image>\n"),
            "text": q.truth.title(),
        }
        for q in questions
    ]
    random.Random(3).shuffle(rows)
    tiny.write_lines(
        tmp_path / "merge.jsonl", [*rows, rows[0], {"question_id": "x", "prompt": "?", "text": "No"}]
    )
    result = score_file("mme", root, tmp_path / "merge.jsonl")
    assert result.parts["perception"] == 400
    assert any("1 questions are answered twice" in note for note in result.notes)
    assert any("1 answers belong to no question, the first is x" in note for note in result.notes)


def test_textvqa_answers_of_llavas_scripts_share_ids(root: Path) -> None:
    questions = BENCHMARKS["textvqa"].read(root, Quirks())
    rows = [
        {"question_id": q.extra["source_id"], "prompt": q.text, "text": str(k)}
        for k, q in reversed(list(enumerate(questions)))
    ]
    answers, notes = match_answers(questions, rows)
    assert answers == {"34602": "0", "34603": "1", "34604": "2"}
    assert notes == []


def test_answers_under_another_key_are_no_empty_answers(root: Path) -> None:
    questions = BENCHMARKS["pope"].read(root, Quirks())
    rows = [{"question_id": q.id, "text": None if k == 0 else "Yes"} for k, q in enumerate(questions)]
    answers, _ = match_answers(questions, rows)
    assert set(answers) == {q.id for q in questions[1:]}
    rows[2] = {"question_id": questions[2].id, "outputs": "Yes"}
    words = r"answer 3, of question '3', must have `answer` or `text`; got \['outputs', 'question_id'\]"
    with pytest.raises(ValueError, match=words):
        match_answers(questions, rows)


def test_verify_passes_whole_files_and_names_what_is_missing(root: Path, tmp_path: Path) -> None:
    assert all(not found.problems for found in verify("all", root).values())
    empty = verify(["pope", "mme"], tmp_path)
    assert any("llava_pope_test.jsonl is not there" in problem for problem in empty["pope"].problems)
    tiny.write_gqa(tmp_path)
    (tmp_path / "gqa/images/n1.jpg").unlink()
    assert "1 of 3 images are not there" in verify("gqa", tmp_path)["gqa"].problems[0]
    assert "3 questions; the published release has 12,578" in verify("gqa", tmp_path)["gqa"].remarks[0]
    (tmp_path / "gqa/testdev_balanced_questions.json").write_text("{")
    assert "not valid JSON" in verify("gqa", tmp_path)["gqa"].problems[0]


def test_an_unknown_benchmark_lists_the_ten() -> None:
    with pytest.raises(
        ValueError, match=r"no benchmark 'mmvet'; the ten are vqav2, gqa, vizwiz, scienceqa, textvqa"
    ):
        find("pope,mmvet")
    assert [b.name for b in find("all")] == list(AVG10) == [b.name for b in PAPER]


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_files_that_are_not_there_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} needs .*not there; see eval/README"):
        BENCHMARKS[name].read(tmp_path, Quirks())


@pytest.mark.parametrize(
    ("file", "text", "name", "message"),
    [
        ("gqa/llava_gqa_testdev_balanced.jsonl", '{"question_id": 1}\n', "gqa", "entry 1 has no 'image'"),
        ("gqa/llava_gqa_testdev_balanced.jsonl", '{"question_id', "gqa", "line 1 is not valid JSON"),
        (
            "pope/llava_pope_test.jsonl",
            '{"question_id": 1, "category": "odd", "image": "a", "text": "b"}\n',
            "pope",
            "category must be one of",
        ),
        (
            "vizwiz/llava_test.jsonl",
            '{"question_id": 1, "image": "../../x.jpg", "text": "b"}\n',
            "vizwiz",
            "leaves the image root",
        ),
        (
            "mmbench/MMBench_DEV_EN_legacy.tsv",
            "index\tquestion\n",
            "mmbench",
            r"no column \['A', 'B', 'image'\]",
        ),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, file: str, text: str, name: str, message: str) -> None:
    tiny.write_all(tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        BENCHMARKS[name].read(tmp_path, Quirks())


def test_all_benchmarks_run_with_a_stock_model(root: Path, tmp_path: Path) -> None:
    model = make_tiny_llava(tmp_path / "tiny")
    out = tmp_path / "out"
    short = {name: out / name / "answers.jsonl" for name in BENCHMARKS}
    summaries = evaluate_benchmarks(
        model, list(BENCHMARKS), root, out, asking=Asking(limit=3, max_new_tokens=4, progress=False)
    )
    assert all(path.is_file() for path in short.values())
    assert summaries["vqav2"]["value"] is None
    assert summaries["vqav2"]["upload"] is not None
    assert "only the first 3 questions" in summaries["pope"]["notes"][0]
    scored = [json.loads(line) for line in (out / "gqa" / "scored.jsonl").read_text().splitlines()]
    assert set(scored[0]) == {"id", "answer", "reading", "truth", "score"}
    assert "LLaVA-KD Qwen2.5-0.5B" in (out / "table.md").read_text()
    page = (out / "table.html").read_text()
    assert not re.search(r"https?://|src=|url\(", page)


def test_averages_need_every_benchmark() -> None:
    whole = dict.fromkeys(AVG10, 50.0) | {"mme": 60.0}
    assert average(whole, AVG10) == 51
    assert average({k: v for k, v in whole.items() if k != "pope"}, AVG10) is None
    assert average({k: v for k, v in whole.items() if k != "pope"}, AVG7) == pytest.approx(50 + 10 / 7)


@pytest.mark.parametrize(
    ("model", "avg7", "avg10"),
    [
        ("LLaVA-KD Qwen2.5-0.5B", 56.7, 58.9), ("LLaVA-KD Qwen2.5-1.5B", 63.9, 65.0),
        ("LLaVA-KD Qwen1.5-0.5B", 55.2, 57.9), ("LLaVA-KD Qwen1.5-1.8B", 60.3, 62.1),
        ("TinyLLaVA Qwen2.5-3B (teacher)", 64.9, 66.2), ("TinyLLaVA Qwen1.5-4B (teacher)", 63.7, 65.0),
        ("TinyLLaVA Qwen2.5-0.5B", 52.9, 56.5), ("TinyLLaVA Qwen1.5-0.5B", 51.1, 54.7),
        ("TinyLLaVA Qwen2.5-1.5B", 62.7, 64.0), ("TinyLLaVA Qwen1.5-1.8B", 53.9, 56.8),
        ("LLaVA-MoD Qwen1.5-1.8B", 59.9, None), ("LLaVA-MoD Qwen1.5-0.5B", 54.1, None),
        ("Switch-KD Qwen2.5-0.5B", None, 60.1),
    ],
)  # fmt: skip
def test_published_rows_have_their_published_averages(
    model: str, avg7: float | None, avg10: float | None
) -> None:
    (row,) = (row for row in PUBLISHED if row.model == model)
    if avg7 is not None:
        assert average(row.values, AVG7) == pytest.approx(avg7, abs=0.0501)
    if avg10 is None:
        assert average(row.values, AVG10) is None
    else:
        assert average(row.values, AVG10) == pytest.approx(avg10, abs=0.0501)


def test_the_table_puts_the_users_line_first_and_computes_averages(tmp_path: Path) -> None:
    values = dict.fromkeys(AVG10, 50.0)
    lines = markdown_table("mine", values, {"pope": ["a note"]}).splitlines()
    assert lines[2] == "| **mine** |  | " + " | ".join(["**50.0**"] * 12) + " |"
    assert "- pope: a note" in lines
    write_tables(tmp_path, "mine", {}, values)
    assert json.loads((tmp_path / "summary.json").read_text())["avg10"] == 50


def test_every_benchmark_is_of_the_paper_another_split_or_further_and_all_is_the_ten() -> None:
    listed = [*PAPER, *OTHER_SPLITS, *FURTHER]
    assert [benchmark.name for benchmark in listed] == list(BENCHMARKS)
    folder = Path(run.__file__).parent / "further"
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert {benchmark.name for benchmark in FURTHER} == files
    assert not {benchmark.name for benchmark in find("all")} & files


def test_seed_bench_takes_the_bare_letter_alone_and_asks_of_images_alone(root: Path, tmp_path: Path) -> None:
    result = score(root, "seed_bench", {"101669": "A. One", "2": "C"})
    assert result.value == 50
    assert result.parts == {"Instances Counting": 0, "Scene Understanding": 100}
    assert "1 answers begin with the right letter and say more: they count as wrong" in result.notes
    tiny.write_seed_bench(tmp_path)
    path = tmp_path / "seed_bench/llava-seed-bench.jsonl"
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join(others))
    with pytest.raises(ValueError, match=r"lacks 1 questions of .*the first is 101669"):
        BENCHMARKS["seed_bench"].read(tmp_path, Quirks())
    path.write_text("\n".join([first.replace("101669", "7"), *others]))
    with pytest.raises(ValueError, match=r"line 1: question 7 is not in .*SEED-Bench\.json"):
        BENCHMARKS["seed_bench"].read(tmp_path, Quirks())
