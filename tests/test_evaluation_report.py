"""Results of a comparison run, and the page made of them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from llava_kd.assembly.settings import labels
from llava_kd.evaluation.report.charts import Line, dot_rows, line_chart, nice_ticks, smooth, thin
from llava_kd.evaluation.report.page import GRADIENT_SHARE, TOKENS, report
from llava_kd.evaluation.report.results import (
    collect_results,
    difference,
    paired_bootstrap,
    read_metrics,
    read_run,
    t_interval,
)
from llava_kd.evaluation.scorers.exact import is_correct, score_exact

HOSTILE = "<script>alert(1)</script>"


def write_model(directory: Path, answers: str, image: str = "") -> None:
    """A scored model: '1' in `answers` is a right answer, anything else a wrong one."""
    directory.mkdir(parents=True)
    lines = [
        {
            "id": str(k),
            "type": ("colour", "count")[k % 2],
            "question": "<image>\nWhat <b>now</b>?",
            "image": image,
            "truth": "red",
            "answer": "Red." if mark == "1" else HOSTILE,
        }
        for k, mark in enumerate(answers)
    ]
    (directory / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    score = score_exact(lines)
    (directory / "summary.json").write_text(json.dumps({**vars(score), "versions": {"torch": "2"}}))


def write_log(directory: Path, terms: tuple[str, ...]) -> None:
    directory.mkdir(parents=True)
    rows = [{"step": step, **{term: 2.0 / step for term in terms}} for step in range(1, 30)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    Image.new("RGB", (48, 40), (200, 30, 30)).save(tmp_path / "a.png")
    write_model(tmp_path / "teacher" / "eval", "11111110", str(tmp_path / "a.png"))
    for seed, (plain, distilled) in enumerate([("10100000", "11110000"), ("00000001", "11111000")]):
        for arm, answers in (("plain", plain), ("kd", distilled)):
            write_model(tmp_path / f"seed{seed}" / arm / "eval", answers, str(tmp_path / "a.png"))
            terms = ("cross_entropy", "relation") if arm == "kd" else ("cross_entropy",)
            write_log(tmp_path / f"seed{seed}" / arm / "stage1", terms)
    (tmp_path / "seconds.json").write_text('{"train": 60}')
    return tmp_path


def test_results_hold_the_means_over_seeds_and_each_seed(run_dir: Path) -> None:
    results = collect_results(read_run(run_dir))
    assert results["teacher"] == {"accuracy": 7 / 8, "by_type": {"colour": 1.0, "count": 0.75}}
    assert results["plain"] == {"accuracy": 1.5 / 8, "by_type": {"colour": 0.25, "count": 0.125}}
    assert results["kd"] == {"accuracy": 4.5 / 8, "by_type": {"colour": 0.625, "count": 0.5}}
    assert results["seeds"] == [
        {"seed": 0, "plain": 0.25, "kd": 0.5, "difference": 0.25},
        {"seed": 1, "plain": 0.125, "kd": 0.625, "difference": 0.5},
    ]
    assert results["seconds"] == {"train": 60.0}


def test_the_interval_over_seeds_is_students() -> None:
    low, high = t_interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))


def test_one_seed_gets_a_paired_bootstrap(run_dir: Path) -> None:
    for path in sorted((run_dir / "seed1").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (run_dir / "seed1").rmdir()
    gap = difference(read_run(run_dir))
    assert gap["mean"] == 0.25
    assert gap["low"] is not None
    assert gap["high"] is not None
    assert gap["low"] < 0.25 < gap["high"]
    assert "bootstrap" in gap["interval"]


def test_the_bootstrap_agrees_with_the_normal_interval_of_many_questions() -> None:
    def answers(marks: str) -> dict[str, dict[str, str]]:
        return {str(k): {"truth": "1", "answer": mark} for k, mark in enumerate(marks)}

    better, worse = answers("1" * 600 + "0" * 400), answers("1" * 300 + "0" * 200 + "1" * 100 + "0" * 400)
    low, high = paired_bootstrap(better, worse)
    # 200 up, 0 down of 1000
    reach = 1.96 * (0.2 * 0.8 / 1000) ** 0.5
    assert (low, high) == pytest.approx((0.2 - reach, 0.2 + reach), abs=0.004)
    assert paired_bootstrap(better, better) == (0.0, 0.0)


def test_the_page_loads_nothing_and_escapes_what_models_say(run_dir: Path) -> None:
    page = report(run_dir, terms=labels()).read_text(encoding="utf-8")
    assert HOSTILE not in page
    assert "&lt;script&gt;" in page
    assert "&lt;b&gt;now" in page
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:)|url\(|https?://|@import""", page)
    assert page.count("data:image/png;base64,") >= 4
    assert json.loads((run_dir / "results.json").read_text())["difference"]["every_seed_positive"]


def test_the_page_has_a_row_for_each_type_and_a_chart_for_each_term(run_dir: Path) -> None:
    page = report(run_dir, terms=labels()).read_text(encoding="utf-8")
    assert '<th scope="row">colour</th><td>100.0</td><td>25.0</td><td>62.5</td>' in page
    assert '<th scope="row">count</th><td>75.0</td><td>12.5</td><td>50.0</td>' in page
    assert page.count('class="curve baseline"') == 2
    assert page.count('class="curve distilled"') == 4
    assert "visual_kl" not in page


def test_the_page_draws_the_diagnostics_of_a_run_that_has_them(run_dir: Path) -> None:
    assert "Diagnostics" not in report(run_dir, terms=labels()).read_text(encoding="utf-8")
    figures = (f"{GRADIENT_SHARE}cross_entropy", f"{GRADIENT_SHARE}relation", *TOKENS)
    write_log(run_dir / "seed0" / "kd" / "stage2", figures)
    page = report(run_dir, terms=labels()).read_text(encoding="utf-8")
    assert page.index("<h2>Losses</h2>") < page.index("<h2>Diagnostics</h2>")
    for name in figures:
        assert f"<title>{name}, stage2</title>" in page
    assert f"{GRADIENT_SHARE}visual_kl" not in page


def test_the_page_says_what_may_be_concluded(run_dir: Path, tmp_path: Path) -> None:
    """Two seeds of unlike gains leave zero in their interval; one seed that loses is not called a gain."""
    low, high = t_interval([0.25, 0.5])
    assert low < 0 < high
    page = report(run_dir, terms=labels()).read_text(encoding="utf-8")
    assert "That closes 55 % of the distance" in page
    assert "95 % t interval over 2 seeds. It contains zero: this run alone does not show" in page
    for arm, answers in (("plain", "1" * 60 + "0" * 40), ("kd", "0" * 100)):
        write_model(tmp_path / "loses" / "seed0" / arm / "eval", answers)
    write_model(tmp_path / "loses" / "teacher" / "eval", "1" * 100)
    page = report(tmp_path / "loses", terms=labels()).read_text(encoding="utf-8")
    assert "The teacher did not help here." in page
    assert "That closes" not in page
    assert "It contains zero" not in page


def test_a_card_shows_every_picture_of_its_question(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("a cat.png", "dog.png", "a")]
    for path in paths:
        Image.new("RGB", (8, 8)).save(path, "PNG")
    for arm, answers in (("plain", "0000"), ("kd", "1111")):
        write_model(tmp_path / "seed0" / arm / "eval", answers, f"{paths[0]} {paths[1]}")
    page = report(tmp_path, terms=labels()).read_text(encoding="utf-8")
    assert page.count('<div class="example">') == 4
    assert page.count("data:image/png;base64,") == 8


def test_a_seed_that_is_not_finished_is_left_out_by_name(tmp_path: Path) -> None:
    for arm in ("plain", "kd"):
        write_model(tmp_path / "seed1" / arm / "eval", "1100")
    write_model(tmp_path / "seed0" / "plain" / "eval", "1100")
    (tmp_path / "seed2").mkdir()
    assert list(read_run(tmp_path).seeds) == [1]
    page = report(tmp_path, terms=labels()).read_text(encoding="utf-8")
    assert "left out, as not finished" in page
    assert "seed 0, seed 2" in page
    shutil.rmtree(tmp_path / "seed1")
    with pytest.raises(
        ValueError, match=r"seed0 must hold two scored arms, one of them 'kd', found \['plain'\]"
    ):
        read_run(tmp_path)


def test_cards_are_about_different_pictures_where_there_are_any(tmp_path: Path) -> None:
    for arm, answers in (("plain", "0" * 20), ("kd", "1" * 20)):
        folder = tmp_path / "seed0" / arm / "eval"
        write_model(folder, answers)
        lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
        for k, line in enumerate(lines):
            line |= {"image": f"{k // 5}.png", "question": f"picture {k // 5}?"}
        (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report(tmp_path, terms=labels()).read_text(encoding="utf-8")
    assert sorted(re.findall(r"picture (\d)\?", page)) == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        (80, "That closes 50 % of the distance"),
        (60, "answers 60.0 %, and is reached"),
        (40, "no more than a"),
    ],
)
def test_the_page_says_where_the_student_stands_beside_its_teacher(
    tmp_path: Path, teacher: int, said: str
) -> None:
    for where, right in (("seed0/plain", 40), ("seed0/kd", 60), ("teacher", teacher)):
        write_model(tmp_path / where / "eval", "1" * right + "0" * (100 - right))
    page = report(tmp_path, terms=labels()).read_text(encoding="utf-8")
    assert said in page
    assert page.count("The teacher") + page.count("That closes") == 1


def test_pictures_are_found_from_another_directory_and_after_a_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, name = tmp_path / "runs" / "quick", "runs/quick/data/a.png"
    (run / "data").mkdir(parents=True)
    Image.new("RGB", (48, 40), (200, 30, 30)).save(run / "data" / "a.png")
    for arm in ("plain", "kd"):
        write_model(run / "seed0" / arm / "eval", "1100", name)
    for folder in (tmp_path, tmp_path / "runs", Path("/")):
        monkeypatch.chdir(folder)
        assert "<img" in report(run, terms=labels()).read_text(encoding="utf-8")
    moved = run.rename(tmp_path / "elsewhere")
    assert "<img" in report(moved, terms=labels()).read_text(encoding="utf-8")


def test_a_dot_that_another_would_hide_is_a_ring_around_it() -> None:
    def radii(**dots: float) -> list[str]:
        return re.findall(r' r="(\d+)"', dot_rows({"colour": dots}, title="t"))

    assert radii(teacher=0.9, baseline=0.3, distilled=0.3) == ["6", "9", "6"]
    assert radii(teacher=0.5, baseline=0.5, distilled=0.5) == ["12", "9", "6"]
    assert radii(teacher=0.9, baseline=0.3, distilled=0.5) == ["6", "6", "6"]


def test_a_logarithmic_axis_says_so() -> None:
    assert "log scale" in line_chart([Line("kd", (1, 2), (100.0, 1.0))], title="t")
    assert "log scale" not in line_chart([Line("kd", (1, 2), (2.0, 1.0))], title="t")


def test_a_page_is_made_without_teacher_pictures_or_logs(tmp_path: Path) -> None:
    for arm in ("plain", "kd"):
        write_model(tmp_path / "seed0" / arm / "eval", "1100", "gone.png")
    page = report(tmp_path, terms=labels()).read_text(encoding="utf-8")
    assert "<img" not in page
    assert "Losses" not in page


def test_a_run_without_the_distilled_arm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must have directories seed0"):
        read_run(tmp_path)
    write_model(tmp_path / "seed0" / "plain" / "eval", "1")
    with pytest.raises(ValueError, match=r"one of them 'kd', found \['plain'\]"):
        read_run(tmp_path)


def test_a_resumed_log_counts_each_step_once_and_drops_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 9}\n{"step": 2, "loss": 2}\n{"step": 3, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 3}, {"step": 2, "loss": 2}]


def test_exact_match_ignores_case_space_and_a_final_period() -> None:
    assert is_correct(" Red.\n", "red")
    assert not is_correct("dark red", "red")
    assert not is_correct("", "red")
    with pytest.raises(ValueError, match="no answer"):
        score_exact([])


def test_smoothing_keeps_a_constant_and_thinning_the_ends() -> None:
    assert smooth([2.0] * 9, window=4) == pytest.approx((2.0,) * 9)
    line = thin(Line("distilled", tuple(range(1000)), tuple(range(1000))), limit=50)
    assert len(line.steps) == 50
    assert (line.steps[0], line.steps[-1]) == (0, 999)


def test_ticks_are_round_and_inside() -> None:
    assert nice_ticks(0.0, 1.0) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert all(3 <= tick <= 47 for tick in nice_ticks(3, 47))


@pytest.mark.parametrize("values", [(1.0,), (0.0, 0.0), (5.0, 0.001), (-1.0, 2.0)])
def test_a_chart_stays_in_its_frame(values: tuple[float, ...]) -> None:
    chart = line_chart([Line("baseline", tuple(range(len(values))), values)], title="loss")
    points = re.findall(r'points="([^"]*)"', chart)[0].split()
    for point in points:
        x, y = map(float, point.split(","))
        assert 0 <= x <= 340
        assert 0 <= y <= 190
