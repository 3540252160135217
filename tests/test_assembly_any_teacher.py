"""A LLaVA student of a teacher of another kind: live, cached, in packed rows; what is refused by name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import yaml
from test_models_any_teacher import FAMILIES
from tiny_teachers import TEACHERS, paligemma, qwen2_vl, scale_and_cap, write_teacher
from transformers import Gemma3ForConditionalGeneration, LlavaNextForConditionalGeneration

from llava_kd.cli import main

TERMS = ("loss", "cross_entropy", "response_kl", "grad_norm", "teacher_cross_entropy")
OBJECTIVE = {"cross_entropy": {"weight": 1.0}, "response_kl": {"weight": 1.0}}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("teachers")


@pytest.fixture
def teacher(request: pytest.FixtureRequest, directory: Path) -> Path:
    path = directory / getattr(request, "param", "qwen2_vl")
    return path if path.exists() else write_teacher(path, TEACHERS[path.name])


@pytest.fixture
def taught(stage: Callable[..., Path], teacher: Path) -> Callable[..., Path]:
    """Writes the YAML of a stage with this teacher."""

    def write(name: str, **changes: object) -> Path:
        path = stage(name, max_steps=2, **changes)
        settings = yaml.safe_load(path.read_text())
        settings["teacher"] = {"checkpoint": str(teacher), "dtype": "float32"}
        settings["objective"] = dict(OBJECTIVE)
        path.write_text(yaml.safe_dump(settings))
        return path

    return write


def losses(config: Path, name: str, *words: str) -> list[dict]:
    output = config.parent / name
    assert main(["train", str(config), f"--output_dir={output}", *words]) == 0
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def same(live: Sequence[dict], other: Sequence[dict], terms: Sequence[str] = TERMS) -> None:
    assert len(live) == len(other) > 0
    for a, b in zip(live, other, strict=True):
        for term in terms:
            assert b[term] == pytest.approx(a[term], rel=1e-4, abs=1e-6), (a["step"], term)


@pytest.mark.parametrize("teacher", FAMILIES, indirect=True)
def test_two_steps_live_and_from_a_cache_are_the_same(taught, tmp_path: Path) -> None:
    config = taught("run")
    live = losses(config, "live")
    assert all(step["response_kl"] > 0.01 for step in live)
    assert main(["cache-teacher", str(config), f"--out={tmp_path / 'cache'}"]) == 0
    same(live, losses(config, "cached", f"--teacher.cache={tmp_path / 'cache'}"))


@pytest.mark.parametrize("teacher", ["gemma3"], indirect=True)
def test_visual_terms_reach_a_teacher_of_one_grid_live_and_cached(taught, tmp_path: Path) -> None:
    config = taught("run")
    words = ["--objective.visual_kl={weight: 1.0}", "--objective.relation={weight: 0.5}"]
    assert main(["train", str(config), *words]) != 0  # 2 x 2 tokens against 4 x 4
    words.append("--data.visual_alignment=resample")
    live = losses(config, "live", *words)
    assert all(step["visual_kl"] > 0.01 and step["relation"] > 0 for step in live)
    assert main(["cache-teacher", str(config), f"--out={tmp_path / 'cache'}", *words]) == 0
    cached = losses(config, "cached", f"--teacher.cache={tmp_path / 'cache'}", *words)
    same(live, cached, (*TERMS, "visual_kl", "relation"))


@pytest.mark.parametrize("teacher", ["llava_next"], indirect=True)
def test_the_largest_logits_serve_as_a_cache(taught, tmp_path: Path) -> None:
    config = taught("run")
    words = ["--mode=topk", "--topk=255"]  # of 260: what is left out is little
    assert main(["cache-teacher", str(config), f"--out={tmp_path / 'cache'}", *words]) == 0
    found = losses(config, "cached", f"--teacher.cache={tmp_path / 'cache'}")
    for a, b in zip(losses(config, "live"), found, strict=True):
        assert b["response_kl"] == pytest.approx(a["response_kl"], rel=0.02)


def test_the_largest_logits_of_more_tokens_are_refused(taught, tmp_path: Path, capsys) -> None:
    config = taught("run")
    words = ["--mode=topk", "--topk=200"]
    assert main(["cache-teacher", str(config), f"--out={tmp_path / 'cache'}", *words]) == 0
    assert main(["train", str(config), f"--teacher.cache={tmp_path / 'cache'}"]) != 0
    said = " ".join(capsys.readouterr().err.split())
    assert "stores logits over 264 tokens, but only 260 are the same in student and teacher" in said


def test_packed_rows_of_the_student_are_rows_of_one_record_for_the_teacher(taught) -> None:
    config = taught("run")
    words = ["--global_batch_size=30", "--micro_batch_size=30", "--max_steps=1"]
    rows = losses(config, "rows", *words)
    packed = losses(config, "packed", "--data.packing={max_tokens: 600}", *words)
    assert packed[0]["response_kl"] == pytest.approx(rows[0]["response_kl"], rel=1e-4)


def test_workers_make_the_same_batches(taught) -> None:
    config = taught("run")
    same(losses(config, "here"), losses(config, "there", "--data.num_workers=1"))


@pytest.mark.parametrize("placement", ["fsdp", "cpu_offload"])
def test_a_teacher_that_is_placed_otherwise_says_the_same(taught, placement: str) -> None:
    config = taught("run")
    same(losses(config, "whole"), losses(config, "placed", f"--teacher.placement={placement}"))


def test_check_shows_class_template_and_tokens(taught, capsys) -> None:
    assert main(["check", str(taught("run"))]) == 0
    shown = capsys.readouterr().out
    assert "Qwen2VLForConditionalGeneration, read by its Qwen2VLProcessor" in shown
    assert "its own, of its Qwen2VLProcessor: its prompt is '<|im_start|>user\\n<|vision_start|>" in shown
    assert re.search(r"visual tokens    student 16, teacher 18 for 336 x 336, \d+ for 640 x 480", shown)
    assert main(["train", str(taught("run")), "--dry_run"]) == 0


REFUSED = {
    "visual_kl": ("--objective.visual_kl={weight: 1.0}", "`objective.visual_kl` compares visual tokens"),
    "relation": ("--objective.relation={weight: 1.0}", "`objective.relation` compares visual tokens"),
    "attention": (
        "--objective.attention={weight: 1.0}",
        "`objective.attention` reads inner states of the teacher",
    ),
    "template": ("--teacher.template=chatml", "`teacher.template` is chatml"),
    "projector": ("--student.projector=teacher", "student.projector"),
    "nvjpeg": ("--data.decode=nvjpeg", "`data.decode` is nvjpeg"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_it_cannot_serve_is_refused_by_name(taught, what: str, capsys) -> None:
    word, message = REFUSED[what]
    config = taught("run")
    assert main(["train", str(config), word]) != 0
    assert message in " ".join(capsys.readouterr().err.split())


def refusal(taught, capsys, teacher: Path) -> str:
    assert main(["train", str(taught("run")), f"--teacher.checkpoint={teacher}"]) != 0
    return " ".join(capsys.readouterr().err.split())


def test_paligemma_is_refused_by_name(taught, tmp_path: Path, capsys) -> None:
    path = write_teacher(tmp_path / "p", paligemma)
    assert "is a 'paligemma' model, which cannot be a teacher here" in refusal(taught, capsys, path)


def test_a_processor_that_takes_no_talk_is_refused(taught, teacher: Path, tmp_path: Path, capsys) -> None:
    path = Path(shutil.copytree(teacher, tmp_path / "copy"))
    (path / "chat_template.jinja").unlink()
    assert "Qwen2VLProcessor has no chat template" in refusal(taught, capsys, path)


def test_a_directory_without_its_processor_or_weights_is_refused(
    taught, teacher: Path, tmp_path: Path, capsys
) -> None:
    path = Path(shutil.copytree(teacher, tmp_path / "copy"))
    (path / "model.safetensors").unlink()
    assert "the weights of" in refusal(taught, capsys, path)
    shutil.copy(teacher / "model.safetensors", path)
    for name in ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"):
        (path / name).unlink(missing_ok=True)
    assert "the processor of" in refusal(taught, capsys, path)


def test_another_tokenizer_is_refused_by_name(taught, tmp_path: Path, capsys) -> None:
    def other(seed: int):
        model, processor = qwen2_vl(seed)
        tree = json.loads(processor.tokenizer.backend_tokenizer.to_str())
        words = tree["model"]["vocab"]
        words["a"], words["b"] = words["b"], words["a"]
        backend = type(processor.tokenizer.backend_tokenizer)
        processor.tokenizer._tokenizer = backend.from_str(json.dumps(tree))
        return model, processor

    path = write_teacher(tmp_path / "other", other)
    assert "tokenizers must have the same content" in refusal(taught, capsys, path)


def test_a_template_that_changes_an_answer_makes_the_record_bad(
    taught, teacher: Path, tmp_path: Path, capsys
) -> None:
    path = Path(shutil.copytree(teacher, tmp_path / "copy"))
    template = path / "chat_template.jinja"
    template.write_text(template.read_text().replace("part['text']", "part['text']|replace('o', '0')"))
    assert "changes its words, so the tokens of its answers cannot be located" in refusal(
        taught, capsys, path
    )


def test_a_template_that_drops_a_turn_is_refused(taught, teacher: Path, tmp_path: Path, capsys) -> None:
    path = Path(shutil.copytree(teacher, tmp_path / "copy"))
    (path / "chat_template.jinja").write_text("{{ messages[0]['content'][0]['type'] }}")
    assert "does not write each turn once and in order" in refusal(taught, capsys, path)


@pytest.mark.parametrize("teacher", ["gemma3"], indirect=True)
def test_scaled_and_capped_logits_teach_alike_live_and_from_a_cache(
    taught, tmp_path: Path, monkeypatch, capsys
) -> None:
    config = taught("run")
    words = ["--objective.visual_kl={weight: 1.0}", "--objective.relation={weight: 0.5}"]
    words.append("--data.visual_alignment=resample")
    plain = losses(config, "plain", *words, "--max_steps=1")
    scale_and_cap(monkeypatch, Gemma3ForConditionalGeneration)
    live = losses(config, "live", *words)
    assert "its logits are multiplied by 0.4 and capped at 2; the student" in capsys.readouterr().err
    for term in ("response_kl", "visual_kl", "relation", "teacher_cross_entropy"):
        assert live[0][term] != pytest.approx(plain[0][term], rel=5e-4), term
    assert main(["cache-teacher", str(config), f"--out={tmp_path / 'cache'}", *words]) == 0
    cached = losses(config, "cached", f"--teacher.cache={tmp_path / 'cache'}", *words)
    same(live, cached, (*TERMS, "visual_kl", "relation"))


@pytest.mark.parametrize("teacher", ["llava_next"], indirect=True)
def test_the_largest_of_scaled_and_capped_logits_serve_as_a_cache(
    taught, tmp_path: Path, monkeypatch
) -> None:
    config = taught("run")
    scale_and_cap(monkeypatch, LlavaNextForConditionalGeneration)
    words = ["--mode=topk", "--topk=259"]  # all but one: nothing is left out but a sum of one
    assert main(["cache-teacher", str(config), f"--out={tmp_path / 'cache'}", *words]) == 0
    found = losses(config, "cached", f"--teacher.cache={tmp_path / 'cache'}")
    same(losses(config, "live"), found, TERMS[:3])


def test_a_bad_picture_costs_its_record_alone(taught, shapes_dir: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(shapes_dir, tmp_path / "data"))
    listed = json.loads((data / "instructions.json").read_text())
    talk = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
    texts = [{"id": "t", "conversations": talk}]
    (data / "instructions.json").write_text(json.dumps(listed[:6] + texts))
    first = data / listed[0]["image"]
    first.write_bytes(b"no picture")
    config = taught("run")
    place = [f"--data.path={data / 'instructions.json'}", f"--data.images={data}", "--data.max_bad_rate=0.5"]
    steps = losses(config, "bad", *place, "--global_batch_size=7", "--micro_batch_size=7", "--max_steps=1")
    assert torch.isfinite(torch.tensor(steps[0]["loss"]))
    bad = (config.parent / "bad" / "bad_records.jsonl").read_text()
    assert str(listed[0]["id"]) in bad
