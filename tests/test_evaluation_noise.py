"""Accuracy by the noise of the pictures: what is drawn, that it is asked about, and where it is shown."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluation_report import write_model
from tiny_llava import make_tiny_llava

from llava_kd.cli import main
from llava_kd.evaluation.answers import read_lines
from llava_kd.evaluation.generation import noise as module
from llava_kd.evaluation.generation.generate import Generator, prepare
from llava_kd.evaluation.generation.noise import Noise, check_levels
from llava_kd.evaluation.generation.questions import Question, fingerprint, read_llava_json
from llava_kd.evaluation.report.results import collect_results, read_run
from llava_kd.evaluation.runner import Asking, evaluate
from llava_kd.evaluation.scorers.exact import score_exact


def grey(value: int = 128, *, height: int = 300, width: int = 200) -> Image.Image:
    return Image.fromarray(np.full((height, width, 3), value, dtype=np.uint8))


def drawn(
    noise: Noise, *, name: str = "a", number: int = 0, picture: Image.Image | None = None
) -> np.ndarray:
    return np.array(noise.on(picture or grey(), name, number)).astype(float)


def test_the_level_is_the_standard_deviation_and_every_channel_has_its_own() -> None:
    found = drawn(Noise(level=0.1)) - 128
    assert found.std() == pytest.approx(25.5, rel=0.01)
    assert abs(found.mean()) < 0.3
    channels = np.corrcoef(found.reshape(-1, 3).T)
    assert abs(channels[np.triu_indices(3, 1)]).max() < 0.02


def test_a_picture_has_one_pattern_at_all_levels() -> None:
    little, much = (drawn(Noise(level=level)) - 128 for level in (0.05, 0.1))
    np.testing.assert_allclose(much, 2 * little, atol=1.6)  # both are rounded


def test_it_depends_on_record_picture_and_seed_and_on_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    first = drawn(Noise(level=0.2, seed=3))
    np.testing.assert_array_equal(first, drawn(Noise(level=0.2, seed=3)))
    others = (
        drawn(Noise(level=0.2, seed=4)),
        drawn(Noise(level=0.2, seed=3), name="b"),
        drawn(Noise(level=0.2, seed=3), number=1),
    )
    for other in others:
        assert abs(np.corrcoef((first - 128).ravel(), (other - 128).ravel())[0, 1]) < 0.02
    monkeypatch.setattr(module, "_ROWS", 7)
    np.testing.assert_array_equal(first, drawn(Noise(level=0.2, seed=3)))


@pytest.mark.parametrize("value", [0, 255])
def test_black_and_white_are_the_ends(value: int) -> None:
    found = drawn(Noise(level=1.0), picture=grey(value))
    assert found.min() == 0
    assert found.max() == 255
    assert (found == value).mean() == pytest.approx(0.5, abs=0.02)  # it is cut, and does not wrap


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def data_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six questions with a picture and one without, whose truth nothing can say."""
    root = tmp_path_factory.mktemp("data")
    records: list[dict] = []
    for k in range(6):
        grey(40 * k, height=30, width=40).save(root / f"{k}.png")
        turns = [{"from": "human", "value": f"<image>\nHow many? {k}"}, {"from": "gpt", "value": "-"}]
        records.append({"id": f"r{k}", "image": f"{k}.png", "conversations": turns})
    turns = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "-"}]
    records.append({"id": "text", "conversations": turns})
    (root / "test.json").write_text(json.dumps(records))
    return root / "test.json"


ASKING = Asking(max_new_tokens=6, progress=False, noise=(0.4, 0.1), noise_seed=2)


def given(directory: Path) -> dict[str, str]:
    return {line["id"]: line["answer"] for line in read_lines(directory / "answers.jsonl")}


def with_truths(data_json: Path, root: Path, plain: dict[str, str], noisy: dict[str, str]) -> Path:
    """The same questions: of some the plain answer is the truth, of some the one under noise."""
    records = json.loads(data_json.read_text())
    for k, record in enumerate(records):
        source = plain if k % 3 else noisy
        record["conversations"][1]["value"] = source.get(record["id"], plain[record["id"]])
    path = root / "scored.json"
    path.write_text(json.dumps(records))
    return path


def test_each_level_is_asked_and_scored(model_dir: Path, data_json: Path, tmp_path: Path) -> None:
    evaluate(model_dir, data_json, tmp_path / "first", asking=ASKING)
    plain, noisy = given(tmp_path / "first"), given(tmp_path / "first" / "noise_0.4")
    assert noisy.keys() == plain.keys() - {"text"}
    assert any(noisy[name] != plain[name] for name in noisy)
    scored = with_truths(data_json, tmp_path, plain, noisy)
    images = data_json.parent
    summary = evaluate(model_dir, scored, tmp_path / "out", image_root=images, asking=ASKING)
    found = summary["noise"]
    assert found["count"] == 6
    assert found["seed"] == 2
    assert list(found["accuracy"]) == ["0", "0.1", "0.4"]
    for level, accuracy in found["accuracy"].items():
        folder = tmp_path / "out" / ("" if level == "0" else f"noise_{level}")
        answers = [line for line in read_lines(folder / "answers.jsonl") if line["id"] != "text"]
        assert accuracy == score_exact(answers).accuracy
    assert found["accuracy"]["0"] < summary["accuracy"]  # which counts the question without a picture
    assert found["accuracy"]["0.4"] > 0
    table = (tmp_path / "out" / "noise.md").read_text().splitlines()
    assert table[0] == "| noise | accuracy of 6 questions, % | points |"
    assert [line.split(" | ")[0] for line in table[2:]] == ["| 0", "| 0.1", "| 0.4"]


def test_answers_depend_neither_on_the_batch_nor_on_a_kill(
    model_dir: Path, data_json: Path, tmp_path: Path
) -> None:
    whole = evaluate(model_dir, data_json, tmp_path / "a", asking=ASKING)
    small = Asking(max_new_tokens=6, progress=False, noise=(0.1, 0.4), noise_seed=2, batch_size=2)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for level in ("0.1", "0.4"):
        path = tmp_path / "b" / f"noise_{level}" / "answers.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    assert evaluate(model_dir, data_json, tmp_path / "b", asking=small)["noise"] == whole["noise"]
    for level in ("0.1", "0.4"):
        assert given(tmp_path / "a" / f"noise_{level}") == given(tmp_path / "b" / f"noise_{level}")
    other = Asking(max_new_tokens=6, progress=False, noise=(0.1,), noise_seed=3)
    with pytest.raises(ValueError, match=r"noise_0\.1 holds the answers of another run"):
        evaluate(model_dir, data_json, tmp_path / "b", asking=other)


def test_noise_reaches_the_pixels_of_its_own_question_alone(model_dir: Path, data_json: Path) -> None:
    plain, other, *_ = read_llava_json(data_json)
    noisy = Question(id=plain.id, text=plain.text, images=plain.images, noise=Noise(level=0.2))
    processor = Generator.load(model_dir, device=torch.device("cpu")).processor
    clean, mixed = (
        prepare(processor, pair).inputs["pixel_values"] for pair in ([plain, other], [noisy, other])
    )
    assert not torch.equal(clean[0], mixed[0])
    assert torch.equal(clean[1], mixed[1])
    assert fingerprint([plain]) != fingerprint([noisy])


def test_what_is_no_level_is_refused() -> None:
    assert check_levels([0.3, 0.1]) == (0.1, 0.3)
    for levels in ([0.0], [-0.1], [1.5], [float("nan")]):
        with pytest.raises(ValueError, match="a level of noise must be above 0 and at most 1"):
            check_levels(levels)
    with pytest.raises(ValueError, match=r"levels of noise must differ; got 0\.1, 0\.1"):
        check_levels([0.1, 0.1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--noise", "much"], "--noise must be numbers joined by commas, such as 0.1,0.2; got 'much'"),
        (["--noise", "0.1,"], "--noise must be numbers joined by commas"),
        (["--noise", "2"], "a level of noise must be above 0 and at most 1"),
        (["--noise", "0.1", "--benchmark", "pope"], "noise goes with a LLaVA JSON file"),
    ],
)
def test_the_command_refuses_in_one_line(
    model_dir: Path,
    data_json: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list,
    message: str,
) -> None:
    named = ["--model", str(model_dir), "--data", str(data_json), "--out", str(tmp_path / "out")]
    assert main(["eval", *named, *words]) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_questions_without_a_picture_are_refused(model_dir: Path, data_json: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.json"
    path.write_text(json.dumps(json.loads(data_json.read_text())[-1:]))
    with pytest.raises(ValueError, match="no question with a picture"):
        evaluate(model_dir, path, tmp_path / "out", asking=ASKING)


def test_the_command_prints_the_table(
    model_dir: Path, data_json: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(model_dir), "--data", str(data_json), "--out", str(tmp_path / "out")]
    assert main(["eval", *words, "--max_new_tokens", "4", "--noise", "0.1,0.4", "--noise_seed", "2"]) == 0
    assert (tmp_path / "out" / "noise.md").read_text().strip() in capsys.readouterr().out
    assert "noise" in json.loads((tmp_path / "out" / "summary.json").read_text())


def put_noise(evaluated: Path, **accuracy: float) -> None:
    path = evaluated / "summary.json"
    levels = {level.removeprefix("at_").replace("_", "."): value for level, value in accuracy.items()}
    noise = {"accuracy": levels, "count": 4, "seed": 0}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"noise": noise}))


def test_a_comparison_shows_it(tmp_path: Path) -> None:
    for arm, value in (("plain", 0.25), ("kd", 0.5)):
        write_model(tmp_path / "seed0" / arm / "eval", "yes")
        put_noise(tmp_path / "seed0" / arm / "eval", at_0=0.75, at_0_2=value)
    results = collect_results(read_run(tmp_path, distilled="kd"))
    assert results["kd"]["by_noise"] == {"0": 0.75, "0.2": 0.5}  # pyright: ignore[reportIndexIssue]
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "By noise of the picture" in page
    assert '<th scope="row">0.2</th><td>25.0</td><td>50.0</td>' in page


def test_a_run_shows_it(stage: Callable[..., Path], tmp_path: Path) -> None:
    assert main(["train", str(stage("run", distilled=False, max_steps=1))]) == 0
    write_model(tmp_path / "run" / "eval", "yes")
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "By noise" not in (tmp_path / "run" / "report.html").read_text()
    put_noise(tmp_path / "run" / "eval", at_0=0.75, at_0_2=0.25)
    assert main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "By noise of the picture" in page
    assert "<td>75.0</td><td>25.0</td>" in page
