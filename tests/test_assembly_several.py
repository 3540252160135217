"""A stage with several teachers: copies, packing, resume, what is said of them, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from test_assembly_token_policy import metrics, refused
from tiny_llava import make_tiny_llava

from llava_kd.cli import main
from llava_kd.losses.targets.mixture import histograms, log_fusion_weights
from llava_kd.models.files.checkpoint import load_processor

KL = {"cross_entropy": {"weight": 1.0}, "response_kl": {"weight": 1.0}}
SAME = ("loss", "cross_entropy", "response_kl", "grad_norm")


@pytest.fixture(scope="session")
def other_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another width, other rows of the head, the same tokenizer."""
    return make_tiny_llava(tmp_path_factory.mktemp("other") / "model", hidden=32, vocab_size=288)


def fused(stage, others: list[Path], name: str = "run", weights: str = "uniform", **changes: object) -> Path:
    """The YAML of a stage; `several` in the changes is more of that setting."""
    more = changes.pop("several", {})
    assert isinstance(more, dict)
    config = stage(name, **{"objective": KL, **changes})
    tree = yaml.safe_load(config.read_text())
    tree["teacher"]["several"] = {"checkpoints": [str(o) for o in others], "weights": weights, **more}
    config.write_text(yaml.safe_dump(tree))
    return config


def alike(one: list[dict], other: list[dict]) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        for name in SAME:
            assert b[name] == pytest.approx(a[name], rel=2e-5), (a["step"], name)


def test_a_copied_teacher_beside_itself_trains_as_it_alone(
    stage, teacher_dir: Path, other_dir: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(teacher_dir, tmp_path / "copied")
    config = fused(stage, [copied], max_steps=3)
    alone = metrics(config, "alone", "--teacher.several=null")
    for weights in ("uniform", "agreement"):
        alike(alone, metrics(config, weights, f"--teacher.several.weights={weights}"))
    others = metrics(fused(stage, [other_dir], "others", max_steps=3), "others")
    assert others[0]["response_kl"] != pytest.approx(alone[0]["response_kl"], rel=1e-2)
    assert others[0]["teacher_weight/2"] == pytest.approx(0.5)


def test_neither_packing_nor_splits_change_a_run(stage, other_dir: Path) -> None:
    config = fused(
        stage, [other_dir], weights="agreement", max_steps=2, global_batch_size=30, micro_batch_size=15
    )
    plain = metrics(config, "plain")
    assert 0.001 < plain[0]["teacher_weight/1"] < 0.999
    alike(plain, metrics(config, "split", "--micro_batch_size=3"))
    packs = "--data.packing={max_tokens: 100000, max_images: 30, packs_per_step: 1}"
    alike(plain, metrics(config, "packed", packs, "--global_batch_size=1", "--micro_batch_size=1"))
    alike(plain, metrics(config, "reference", "--objective.losses=reference"))


def test_a_run_goes_on_with_the_same_teachers_alone(stage, other_dir: Path, tmp_path: Path, capsys) -> None:
    place = shutil.copytree(other_dir, tmp_path / "place")
    config = fused(stage, [place], weights="agreement", max_steps=4, checkpoint={"every": 2, "keep": 2})
    whole, output = metrics(config, "whole"), config.parent / "whole"

    def cut() -> None:
        """As a crash after the third step leaves it."""
        shutil.rmtree(output / "model", ignore_errors=True)
        (output / "run.json").unlink(missing_ok=True)
        for path in (output / "checkpoints").iterdir():
            if path.name.endswith("4"):
                shutil.rmtree(path)

    cut()
    alike(whole, metrics(config, "whole"))
    assert "resuming from step 2" in capsys.readouterr().err
    cut()
    make_tiny_llava(place, hidden=32, vocab_size=288, seed=5)
    assert "teacher 2" in refused(config, capsys, f"--output_dir={output}")


def test_weights_of_histograms_are_those_of_the_first_tokens(
    stage, other_dir: Path, teacher_dir: Path, shapes_dir: Path, tmp_path: Path, capsys
) -> None:
    own = json.loads((shapes_dir / "instructions.json").read_text())
    far = [
        {"id": str(i), "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "zzz"}]}
        for i in range(40)
    ]
    (tmp_path / "far.json").write_text(json.dumps(far))
    records = [str(tmp_path / "far.json"), str(shapes_dir / "instructions.json")]
    config = fused(
        stage, [other_dir], weights="histograms", max_steps=1, several={"records": records, "beta": 2.0}
    )
    line = metrics(config, "run")[0]
    tokenizer = load_processor(str(teacher_dir)).tokenizer

    def first_tokens(entries: list[dict]) -> Counter:
        answers = [t["value"].strip() for e in entries for t in e["conversations"] if t["from"] == "gpt"]
        return Counter(tokenizer.encode(a, add_special_tokens=False)[0] for a in answers)

    counted = [first_tokens(entries) for entries in (own, far, own)]
    types = sorted(set().union(*counted))
    own_K, *theirs = histograms([[c[k] for k in types] for c in counted])
    expected = log_fusion_weights(own_K, torch.stack(theirs), beta=2.0).exp().tolist()
    assert [line["teacher_weight/1"], line["teacher_weight/2"]] == pytest.approx(expected, rel=1e-5)
    assert line["teacher_weight/2"] > 0.9
    assert f"{other_dir} {expected[1]:.3f}" in capsys.readouterr().err


def test_a_dry_run_counts_every_teacher(stage, other_dir: Path, capsys) -> None:
    config = fused(stage, [other_dir])
    assert main(["train", str(config), "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "  also  " in said
    assert str(other_dir) in said


def test_a_cache_is_not_written_of_several(stage, other_dir: Path, tmp_path: Path, capsys) -> None:
    config = fused(stage, [other_dir])
    assert main(["cache-teacher", str(config), f"--out={tmp_path / 'cache'}"]) != 0
    assert "a cache stores the predictions of one teacher" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("weights", "several", "words", "message"),
    [
        ("uniform", {}, ["--teacher.cache=x"], "`teacher.cache` (x) stores the predictions of one teacher"),
        (
            "uniform",
            {"shares": [0.5, 0.5]},
            [],
            "`teacher.several.shares` needs `teacher.several.weights`",
        ),
        ("uniform", {"records": ["a", "b"]}, [], "`teacher.several.records` needs `teacher.several.weights`"),
        (
            "given",
            {"shares": [0.5]},
            [],
            "must have one entry for each of the 2 teachers, teacher.checkpoint first",
        ),
        ("given", {}, [], "got 0"),
        ("given", {"shares": [0.5, 0.6]}, [], "must sum to 1"),
        ("given", {"shares": [1.0, 0.0]}, [], "teacher.several.shares"),
        ("given", {"shares": [float("nan"), 0.5]}, [], "teacher.several.shares"),
        ("histograms", {"records": ["a"]}, [], "`teacher.several.records` must have one entry for each"),
        ("histograms", {"records": ["no.json", "no.json"]}, [], "no.json"),
        ("uniform", {"beta": -1.0}, [], "teacher.several.beta"),
        ("best", {}, [], "best"),
        ("uniform", {"checkpoints": []}, [], "teacher.several.checkpoints"),
        ("uniform", {"checkpoints": ["/nowhere"]}, [], "/nowhere"),
        ("uniform", {}, ["--objective.visual_kl={weight: 1.0}"], "cannot serve visual_kl; only response_kl"),
        ("uniform", {}, ["--pictures={mixup: {}}"], "`pictures.mixup` works with one teacher"),
        ("uniform", {}, ["--objective.relation={weight: 1.0}"], "cannot serve relation"),
        ("uniform", {}, ["--objective.response_kl.trust=first"], "cannot serve response_kl.trust"),
        ("uniform", {}, ["--objective.response_kl.temperature=std"], "response_kl.temperature std"),
    ],
)
def test_what_does_not_fit_is_refused(
    stage, other_dir: Path, capsys, weights: str, several: dict, words: list[str], message: str
) -> None:
    config = fused(stage, [other_dir], weights=weights, several=several)
    assert message in refused(config, capsys, *words)


def test_one_directory_twice_is_refused_however_it_is_written(stage, teacher_dir: Path, capsys) -> None:
    for twice in (teacher_dir, teacher_dir / ".." / teacher_dir.name):
        config = fused(stage, [twice], "twice")
        assert "is there twice: remove one" in refused(config, capsys)


def test_teachers_of_other_vocabularies_or_eyes_are_refused(
    stage, other_dir: Path, tmp_path: Path, capsys
) -> None:
    words = shutil.copytree(other_dir, tmp_path / "words")
    tree = json.loads((words / "tokenizer.json").read_text())
    vocabulary = tree["model"]["vocab"]
    a, b = list(vocabulary)[20:22]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (words / "tokenizer.json").write_text(json.dumps(tree))
    assert "must have the same vocabulary" in refused(fused(stage, [words]), capsys)
    eyes = shutil.copytree(other_dir, tmp_path / "eyes")
    (path,) = (p for p in (eyes / "preprocessor_config.json", eyes / "processor_config.json") if p.is_file())
    text = path.read_text()
    assert "image_mean" in text
    tree = json.loads(text)
    tree.get("image_processor", tree)["image_mean"] = [0.1, 0.2, 0.3]
    path.write_text(json.dumps(tree))
    assert "must read the same tokens and pixels" in refused(fused(stage, [eyes]), capsys)


def test_records_without_an_answer_are_refused(stage, other_dir: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "mute.json").write_text("[]")
    records = [str(tmp_path / "mute.json")] * 2
    config = fused(stage, [other_dir], weights="histograms", several={"records": records})
    assert "mute.json" in refused(config, capsys)
