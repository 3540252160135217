"""A stage whose teacher has another tokenizer: what trains, what is said of it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_samples import side
from tiny_llava import make_tiny_llava, merged_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from llava_kd.assembly.check import check
from llava_kd.assembly.parts.cross.tokenizers import spellers_of
from llava_kd.assembly.settings import load
from llava_kd.assembly.train import train
from llava_kd.models.words.spelling import spelled

CROSS = {"cross_entropy": {"weight": 1.0}, "response_cross": {"weight": 1.0}, "relation": {"weight": 0.5}}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its head has rows of padding, as its tokenizer ends before them."""
    folder = tmp_path_factory.mktemp("foreign") / "teacher"
    return make_tiny_llava(folder, hidden=48, vocab_size=352, seed=3, tokenizer=merged_tokenizer())


def lines(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


@pytest.mark.parametrize("packing", [None, {"max_tokens": 600, "max_images": 8, "packs_per_step": 2}])
def test_a_teacher_of_another_tokenizer_teaches(
    packing: dict | None, stage, foreign: Path, tmp_path: Path
) -> None:
    """With its own template, in rows of one record and packed, with figures of the diagnosis."""
    path = stage("run", objective=CROSS, max_steps=3)
    told = [f"--teacher.checkpoint={foreign}", "--log.diagnostics_every=2"]
    if packing is not None:
        told.append(f"--data.packing={json.dumps(packing)}")
    config = load(path, told)
    assert train(config) is None
    found = lines(tmp_path / "run")
    assert len(found) == 3
    for row in found:
        assert 0 < row["response_cross"] < 1e3
        assert 0.5 < row["response_cross/matched_mass"] < 1
        assert row["teacher_cross_entropy"] > 0
    assert any("gradient/response_cross" in row for row in found)
    assert not (tmp_path / "run" / "bad_records.jsonl").exists()


@pytest.mark.parametrize(("form", "spread"), [("onto_teacher", 0.1), ("onto_student", 0.0)])
def test_a_vocabulary_carried_into_the_other_teaches_however_a_step_is_cut(
    form: str, spread: float, stage, foreign: Path, tmp_path: Path
) -> None:
    """In one batch, in two, and with the formulas as they are written."""
    asked = {"cross_entropy": {"weight": 1.0}, "response_cross": {"form": form, "spread": spread}}
    path = stage("run", objective=asked, max_steps=2)
    found = []
    for name, words in {
        "whole": [],
        "split": ["--micro_batch_size=1"],
        "plain": ["--objective.losses=reference"],
    }.items():
        told = [f"--teacher.checkpoint={foreign}", f"--output_dir={tmp_path / name}", *words]
        assert train(load(path, told)) is None
        found.append(lines(tmp_path / name))
    for one, *others in zip(*found, strict=True):
        mass = one["response_cross/projected_mass"]
        assert 0.98 < mass < 1  # of all but control tokens
        assert (one["response_cross/matched_mass"] == mass) == (form == "onto_student")
        for name in ("loss", "grad_norm", "response_cross", "response_cross/matched_mass"):
            assert [other[name] for other in others] == pytest.approx([one[name]] * 2, rel=2e-5), name


def test_a_check_says_what_is_carried_where(stage, foreign: Path) -> None:
    asked = ["--objective.response_cross.form=onto_student", f"--teacher.checkpoint={foreign}"]
    said = check(load(stage("run", objective=CROSS), asked), ranks=1, num_records=4, num_pictures=0)
    assert "teacher onto student: 258 tokens are projected onto the same token, " in said


def test_a_check_says_what_is_compared(stage, foreign: Path) -> None:
    config = load(stage("run", objective=CROSS), [f"--teacher.checkpoint={foreign}"])
    said = check(config, ranks=1, num_records=4, num_pictures=0)
    assert "two tokenizers: 258 tokens spell the same on both sides; 2 only the student has, " in said
    assert "shared tokens" not in said
    assert "sum over stretches of response text / response_stretches of the step" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--objective.response_kl={}"], r"remove response_kl and keep response_cross, or use a teacher of"),
        (
            ["--objective.hint={student_taps: [language_model.layers.0]}"],
            r"remove hint and keep response_cross",
        ),
        (["--objective.visual_kl={}"], r"remove visual_kl and keep response_cross"),
        (
            ["--objective.response_cross=null", "--objective.response_kl={}"],
            r"response_cross compares answers as text",
        ),
        (
            ["--token_policy={kl: 0.5, spans: [{pattern: number}]}"],
            r"`token_policy` changes single response tokens",
        ),
    ],
    ids=str,
)
def test_what_such_a_teacher_does_not_serve_is_refused_by_name(
    change: list[str], said: str, stage, foreign: Path
) -> None:
    config = load(stage("run", objective=CROSS), [f"--teacher.checkpoint={foreign}", *change])
    with pytest.raises(ValueError, match=said):
        check(config, ranks=1, num_records=4, num_pictures=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("--teacher.cache=kept", "`teacher.cache` stores .* set teacher.cache to null"),
        (
            "--teacher.several={checkpoints: [other], weights: uniform}",
            "`teacher.several` needs .* set teacher.several to null",
        ),
        ("--pictures.mixup={}", "`pictures` compares .* set pictures to null"),
    ],
)
def test_settings_that_go_with_one_vocabulary_are_refused(change: str, said: str, stage) -> None:
    config = load(stage("run", objective=CROSS), [change])
    reader = side(tokenizer=merged_tokenizer())
    with pytest.raises(ValueError, match=said):
        spellers_of(config, (reader, reader))


def test_a_tokenizer_whose_tokens_are_no_bytes_is_refused() -> None:
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "red": 1}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match=r"tokens that are bytes of the text, .* decodes by WordPiece"):
        spelled(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]"))


def test_with_one_tokenizer_it_is_response_kl(stage, tmp_path: Path) -> None:
    """Loss and figures of a run, term against term."""
    found = []
    for name in ("response_kl", "response_cross"):
        config = load(stage(name, objective={"cross_entropy": {}, name: {"weight": 0.7}}, max_steps=3))
        assert train(config) is None
        found.append(lines(tmp_path / name))
    for one, other in zip(*found, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["response_kl"] == pytest.approx(other["response_cross"], rel=1e-6)
        assert "response_cross/matched_mass" not in other
