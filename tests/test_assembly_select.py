"""`llava-kd data select`: scores as stock models give them, a list that a run reads, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_llava import make_tiny_llava

from llava_kd.assembly.curating import comparing, scoring
from llava_kd.assembly.curating.select import CHOSEN, SCORES, TABLE
from llava_kd.assembly.parts.data import side_of
from llava_kd.batch import IGNORE_INDEX
from llava_kd.cli import main
from llava_kd.config import DataConfig
from llava_kd.data.record_lists import read_lists
from llava_kd.data.sources.llava_json import LlavaJson
from llava_kd.models.files.checkpoint import load_stock

ANY = "--any_reference"  # models of random weights are as good as each other


@pytest.fixture
def config(stage: Callable[..., Path]) -> Path:
    return stage("run", max_steps=2)


@pytest.fixture
def select(config: Path, student_dir: Path, tmp_path: Path) -> Callable[..., int]:
    def call(*words: str, out: str = "out", keep: str = "0.5", reference: Path = student_dir) -> int:
        given = ["--keep", keep, "--out", str(tmp_path / out), "--reference", str(reference)]
        return main(["data", "select", str(config), *given, *words])

    return call


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def stock_logits(directory: Path, data: Path, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, V] before a record's answer tokens and these [N], by transformers' own forward, in fp64."""
    parts = load_stock(str(directory), dtype=torch.float64)
    side = side_of(
        parts.processor,
        parts.stock.config,
        DataConfig(path=str(data), template="vicuna", max_length=512),
    )
    source = LlavaJson(data, data.parent)
    from llava_kd.data.pixels.images import decode

    record = source.record(number)
    encoded = side.encoder()(record)
    pixels = side.transform(decode(source.image_bytes(number, 0))).double()
    with torch.no_grad():
        logits_TV = parts.stock.eval()(
            input_ids=encoded.ids[None],
            pixel_values=pixels[None],
            attention_mask=torch.ones(1, len(encoded.ids)),
        ).logits[0]
    targets = encoded.labels[1:]
    rows = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    return logits_TV[rows], targets[rows]


def stock_mean(directory: Path, data: Path, number: int) -> float:
    """Mean -log p of a record's answers, alone in its batch."""
    logits_NV, targets_N = stock_logits(directory, data, number)
    return float(-logits_NV.log_softmax(1).gather(1, targets_N[:, None]).mean())


def test_scores_are_those_of_the_stock_models_and_the_best_half_stays(
    select, tmp_path: Path, shapes_dir: Path, teacher_dir: Path, student_dir: Path, capsys
) -> None:
    assert select(ANY) == 0
    assert "| instructions.json | 30 | 0 | 15 |" in capsys.readouterr().out
    found = lines(tmp_path / "out" / SCORES)
    data = shapes_dir / "instructions.json"
    for number in (0, 7):
        assert found[number]["teacher"] == pytest.approx(stock_mean(teacher_dir, data, number), rel=1e-5)
        assert found[number]["reference"] == pytest.approx(stock_mean(student_dir, data, number), rel=1e-5)
    scores = [line["reference"] - line["teacher"] for line in found]
    assert [line["score"] for line in found] == pytest.approx(scores)
    best = sorted(sorted(range(30), key=lambda i: -scores[i])[:15])
    (listed,) = read_lists(tmp_path / "out" / CHOSEN)
    assert list(listed.records) == best == [line["number"] for line in found if line["kept"]]
    shown = (tmp_path / "out" / "examples.md").read_text()
    assert shown.index(found[max(range(30), key=lambda i: scores[i])]["id"]) < shown.index("## Least valued")


def test_a_score_does_not_depend_on_the_records_that_it_is_read_with(select, tmp_path: Path) -> None:
    assert select(ANY, "--micro_batch_size=1", "--global_batch_size=1", out="one") == 0
    assert select(ANY, "--micro_batch_size=4", out="four") == 0
    one, four = lines(tmp_path / "one" / SCORES), lines(tmp_path / "four" / SCORES)
    assert [line["score"] for line in one] == pytest.approx([line["score"] for line in four], abs=1e-5)


def test_a_broken_off_run_goes_on_and_another_share_needs_no_model(
    select, tmp_path: Path, monkeypatch
) -> None:
    assert select(ANY) == 0
    out, whole = tmp_path / "out", tmp_path / "whole"
    shutil.copytree(out, whole)
    for name, keeps in (("teacher", 11), ("reference", 0)):
        path = out / "scores" / f"{name}.rank0.jsonl"
        kept = path.read_text().splitlines(keepends=True)[:keeps]
        path.write_text("".join(kept) + '{"number": 29, "id": "tr')  # a kill in the middle of a line
    (out / CHOSEN).unlink()
    assert select(ANY) == 0
    assert (out / SCORES).read_bytes() == (whole / SCORES).read_bytes()
    assert read_lists(out / CHOSEN) == read_lists(whole / CHOSEN)
    monkeypatch.setattr(scoring, "load_stock", None)
    assert select(ANY, keep="0.2") == 0
    assert len(read_lists(out / CHOSEN)[0].records) == 6


def test_a_run_and_a_cache_know_the_list_by_what_it_says(
    select, config: Path, tmp_path: Path, capsys
) -> None:
    assert select(ANY) == 0
    assert select(ANY, out="fewer", keep="0.2") == 0
    half, fewer = (f"--data.records={tmp_path / name / CHOSEN}" for name in ("out", "fewer"))
    assert main(["train", str(config), half]) == 0
    steps = lines(tmp_path / "run" / "metrics.jsonl")
    assert sum(step["records"] for step in steps) == 8
    shutil.copy(tmp_path / "fewer" / CHOSEN, tmp_path / "out" / CHOSEN)  # the same name, another list
    assert main(["train", str(config), half, "--max_steps=3"]) == 2
    assert "data or tokenizer" in capsys.readouterr().err
    cache = f"--out={tmp_path / 'cache'}"
    assert main(["cache-teacher", str(config), fewer, cache]) == 0
    words = [f"--teacher.cache={tmp_path / 'cache'}", f"--output_dir={tmp_path / 'cached'}"]
    assert main(["train", str(config), fewer, *words]) == 0
    assert main(["train", str(config), *words[:1], f"--output_dir={tmp_path / 'other'}"]) == 2
    assert "was written with other inputs (data:" in capsys.readouterr().err


def test_groups_are_fields_of_the_records_too(select, config: Path, tmp_path: Path, shapes_dir: Path) -> None:
    entries = json.loads((shapes_dir / "instructions.json").read_text())
    entries = [{**raw, "kind": "even" if i % 2 else "odd"} for i, raw in enumerate(entries)]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(entries))
    words = [ANY, f"--data.path={data}", "--group=kind"]
    assert select(*words, "--quota", "odd=1") == 0
    kept = [line["group"] for line in lines(tmp_path / "out" / SCORES) if line["kept"]]
    assert (kept.count("odd"), kept.count("even")) == (15, 7)
    assert "| odd | 15 | 0 | 15 |" in (tmp_path / "out" / TABLE).read_text()


def test_models_of_different_tokens_are_compared_by_characters(
    select, tmp_path: Path, student_dir, capsys
) -> None:
    other = make_tiny_llava(tmp_path / "other", hidden=32, seed=4)
    path = other / "tokenizer.json"
    tree = json.loads(path.read_text())
    vocab = tree["model"]["vocab"]
    tree["model"]["merges"] = [["e", "d"]]  # one token for two characters
    vocab["ed"] = vocab.pop("\u00ff")  # in the place of a byte that no text has
    path.write_text(json.dumps(tree))
    assert select(ANY, reference=other) == 0
    assert "means are over the characters of the answers" in capsys.readouterr().err
    found = {one["number"]: one for one in lines(tmp_path / "out" / "scores" / "teacher.rank0.jsonl")}
    guessed = {one["number"]: one for one in lines(tmp_path / "out" / "scores" / "reference.rank0.jsonl")}
    assert any(found[n]["tokens"] > guessed[n]["tokens"] for n in found)
    for line in lines(tmp_path / "out" / SCORES):
        n = line["number"]
        assert line["teacher"] == found[n]["nll"] / found[n]["characters"]
        assert line["reference"] == guessed[n]["nll"] / found[n]["characters"]


def test_bad_records_are_named_counted_and_never_chosen(
    select, tmp_path: Path, shapes_dir: Path, capsys
) -> None:
    entries = json.loads((shapes_dir / "instructions.json").read_text())
    entries[3]["conversations"] = entries[3]["conversations"][:1]  # a question without an answer
    entries[5]["image"] = "images/none.jpg"
    data = tmp_path / "data.json"
    data.write_text(json.dumps(entries))
    assert select(ANY, f"--data.path={data}", keep="1") == 0
    assert "| data.json | 30 | 2 | 28 |" in capsys.readouterr().out
    (listed,) = read_lists(tmp_path / "out" / CHOSEN)
    assert set(range(30)) - set(listed.records) == {3, 5}
    named = lines(tmp_path / "out" / "scores" / "bad_records.jsonl")
    assert any("last turn must be an answer" in one["reason"] for one in named)
    assert any("missing below" in one["reason"] for one in named)
    assert select(ANY, f"--data.path={data}", "--data.max_bad_rate=0", out="strict") == 2
    assert "more than max_bad_rate" in capsys.readouterr().err


def test_what_does_not_fit_is_refused_with_what_to_do(
    select, config: Path, tmp_path: Path, teacher_dir, shapes_dir: Path, capsys
) -> None:
    def refused(*words: str, say: str, **more) -> None:
        assert select(*words, **more) == 2
        assert say in capsys.readouterr().err

    for share in ("0", "1.01", "-1", "half"):
        with pytest.raises(SystemExit):
            select(keep=share)
        assert "above 0 and at most 1" in capsys.readouterr().err
    refused(say="as good in every group", reference=teacher_dir)
    assert (tmp_path / "out" / TABLE).is_file()
    assert not (tmp_path / "out" / CHOSEN).exists()
    refused(ANY, say="reference: weights")  # the folder holds scores of another reference
    data = tmp_path / "data.json"
    data.write_text((shapes_dir / "instructions.json").read_text().replace("What", "Which"))
    refused(ANY, f"--data.path={data}", reference=teacher_dir, say="teacher: data:")
    refused(ANY, "--data.template=plain", reference=teacher_dir, say="teacher: data.template")
    refused(ANY, "--data.records=some.json", say="set it to null")
    refused(ANY, "--quota", "coco=0.5", out="quota", say="must name groups that exist; got ['coco']")
    refused(ANY, "--group=nothing", out="group", say="no record has that field")
    alone = ["--teacher=null", "--objective={cross_entropy: {weight: 1.0}}"]
    refused(ANY, *alone, out="alone", say="this stage has no teacher")
    data.write_text("[]")
    refused(ANY, f"--data.path={data}", out="empty", say="has no records")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    refused(ANY, out="taken", say="is not empty")


def test_a_stage_without_a_teacher_is_given_one(select, tmp_path: Path, teacher_dir: Path) -> None:
    alone = ["--teacher=null", "--objective={cross_entropy: {weight: 1.0}}"]
    assert select(ANY, *alone, "--with_teacher", str(teacher_dir), "--dtype", "float32", out="alone") == 0
    assert select(ANY) == 0
    assert (tmp_path / "alone" / SCORES).read_bytes() == (tmp_path / "out" / SCORES).read_bytes()


# By disagreement ----


@pytest.fixture
def disagree(config: Path, student_dir: Path, tmp_path: Path) -> Callable[..., int]:
    """The stage's own teacher and student."""

    def call(*words: str, out: str = "out", keep: str = "0.5") -> int:
        given = ["--by", "disagreement", "--keep", keep, "--out", str(tmp_path / out)]
        return main(["data", "select", str(config), *given, *words])

    return call


def test_disagreement_is_the_divergence_of_the_stock_models(
    disagree, tmp_path: Path, shapes_dir: Path, teacher_dir: Path, student_dir: Path, capsys
) -> None:
    """Jensen-Shannon over the columns of the one vocabulary: both heads have padding rows of their own."""
    assert disagree() == 0
    assert "| instructions.json | 30 | 0 | 15 |" in capsys.readouterr().out
    found = lines(tmp_path / "out" / SCORES)
    data = shapes_dir / "instructions.json"
    columns = max(load_stock(str(student_dir)).processor.tokenizer.get_vocab().values()) + 1
    for number in (0, 7):
        (z_s, targets_N), (z_t, _) = (stock_logits(d, data, number) for d in (student_dir, teacher_dir))
        p, q = (z[:, :columns].softmax(1) for z in (z_s, z_t))
        m = (p + q) / 2
        by_hand = ((p * (p / m).log()).sum(1) + (q * (q / m).log()).sum(1)).mean() / 2
        assert found[number]["score"] == pytest.approx(float(by_hand), rel=1e-4)
        assert found[number]["tokens"] == len(targets_N)
        assert found[number]["other"] == int((p.argmax(1) != q.argmax(1)).sum())
    scores = [line["score"] for line in found]
    (listed,) = read_lists(tmp_path / "out" / CHOSEN)
    assert list(listed.records) == sorted(sorted(range(30), key=lambda i: -scores[i])[:15])
    assert disagree("--micro_batch_size=1", "--global_batch_size=1", out="one") == 0
    assert [line["score"] for line in lines(tmp_path / "one" / SCORES)] == pytest.approx(scores, abs=1e-6)


def test_a_comparison_that_broke_off_goes_on_and_another_share_needs_no_model(
    disagree, tmp_path: Path, monkeypatch
) -> None:
    assert disagree() == 0
    out, whole = tmp_path / "out", tmp_path / "whole"
    shutil.copytree(out, whole)
    path = out / "scores" / "disagreement.rank0.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:11]) + '{"number": 29, "id": "tr')
    (out / CHOSEN).unlink()
    assert disagree() == 0
    assert (out / SCORES).read_bytes() == (whole / SCORES).read_bytes()
    assert read_lists(out / CHOSEN) == read_lists(whole / CHOSEN)
    monkeypatch.setattr(comparing, "load_stock", None)
    assert disagree(keep="0.2") == 0
    assert len(read_lists(out / CHOSEN)[0].records) == 6


def test_what_a_comparison_cannot_tell_is_refused(
    disagree, select, tmp_path: Path, teacher_dir: Path, student_dir: Path, capsys
) -> None:
    def refused(say: str, *words: str, by: Callable[..., int] = disagree, **more) -> None:
        assert by(*words, **more) == 2
        assert say in capsys.readouterr().err

    same = ["--with_student", str(teacher_dir)]
    refused("teacher and student predict the same for every record", *same, out="same")
    assert "| 100% |" in (tmp_path / "same" / TABLE).read_text()
    assert not (tmp_path / "same" / CHOSEN).exists()
    new = "--student={vision_tower: a, language_model: b}"
    refused("--by disagreement needs a trained student, but this stage creates a new one", new, out="new")
    refused("--reference needs --by difference", "--reference", str(student_dir), out="a")
    refused("--with_student needs --by disagreement", *same, by=select, out="b")
    refused("--any_reference needs --by difference", ANY, out="c")
    other = make_tiny_llava(tmp_path / "foreign", hidden=32, seed=4)
    tree = json.loads((other / "tokenizer.json").read_text())
    vocab = tree["model"]["vocab"]
    vocab["zz"] = vocab.pop("\u00ff")
    (other / "tokenizer.json").write_text(json.dumps(tree))
    refused("response_cross compares answers as text", "--with_student", str(other), out="other")
