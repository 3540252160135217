"""A stage with a peer: what is trained, resumed, exported and said, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_assembly_token_policy import metrics, refused
from tiny_llava import make_tiny_llava, tiny_processor
from tiny_towers import make_language_model, make_tower
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava_kd.assembly.parts.teaching.peer import mirrored
from llava_kd.assembly.settings import load
from llava_kd.cli import main
from llava_kd.models.files.checkpoint import load_stock

TERMS = {"cross_entropy": {"weight": 1.0}, "response_kl": {"weight": 1.0}, "visual_kl": {"weight": 1.0}}
HFD = {"student_taps": ["multi_modal_projector"], "teacher_taps": ["language_model.layers.0"]}
SAME = ("loss", "cross_entropy", "response_kl", "peer/cross_entropy", "peer/response_kl", "grad_norm")

Write = Callable[..., Path]


@pytest.fixture(scope="session")
def peer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wider and deeper than the student, with another tower of the same grid."""
    directory = tmp_path_factory.mktemp("peer") / "start"
    return make_tiny_llava(directory, hidden=48, layers=3, tower_hidden=48, vocab_size=280, seed=7)


@pytest.fixture
def paired(stage, peer_dir: Path) -> Write:
    """The YAML of a stage with a peer."""

    def write(name: str = "run", peer: Path = peer_dir, **changes: object) -> Path:
        config = stage(name, distilled=False, **changes)
        tree = yaml.safe_load(config.read_text())
        tree |= {"peer": {"checkpoint": str(peer)}, "objective": changes.get("objective", TERMS)}
        config.write_text(yaml.safe_dump(tree))
        return config

    return write


def state_of(run: Path) -> dict[str, torch.Tensor]:
    (last,) = sorted((run / "checkpoints").glob("step-*"))[-1:]
    return load_file(last / "state.safetensors")


def alike(one: list[dict], other: list[dict]) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        for name in SAME:
            assert b[name] == pytest.approx(a[name], rel=2e-5), (a["step"], name)


def test_both_students_are_written_and_stock_transformers_reads_them(
    paired, student_dir: Path, peer_dir: Path
) -> None:
    config = paired(max_steps=3)
    lines = metrics(config, "run", "--log.diagnostics_every=1")
    assert 0 < lines[0]["tokens/teacher_better"] < 1
    output = config.parent / "run"
    for name, before in (("model", student_dir), ("peer", peer_dir)):
        model = AutoModelForImageTextToText.from_pretrained(output / name)
        start = AutoModelForImageTextToText.from_pretrained(before).state_dict()
        changed = {n for n, t in model.state_dict().items() if not torch.equal(t, start[n].to(t.dtype))}
        assert changed
        assert all("vision_tower" not in n for n in changed)
        assert {n.split(".")[1] for n in changed} >= {"multi_modal_projector", "language_model"}
        AutoProcessor.from_pretrained(output / name)
        assert (output / name / "README.md").is_file()
    saved = state_of(output)
    for ours in [n for n in saved if "/mllm." in n]:
        if "layers" not in ours:
            assert ours.replace("/mllm.", "/teaching.mllm.") in saved
    assert lines[-1]["response_kl"] > 0
    assert lines[-1]["peer/response_kl"] > 0
    assert lines[-1]["peer_tflop_per_s"] > lines[-1]["student_tflop_per_s"] > 0  # it is wider and deeper
    run = json.loads((output / "run.json").read_text())
    assert "model.safetensors" in run["peer"]
    assert "frozen part of the peer" in run["fingerprints"]


def test_the_finished_peer_begins_another_stage_and_one_that_was_changed_does_not(
    paired, stage, capsys
) -> None:
    metrics(paired(max_steps=1), "run")
    peer = paired(max_steps=1).parent / "run" / "peer"
    after = stage("after", distilled=False, max_steps=1)
    assert metrics(after, "after", f"--student.checkpoint={peer}")
    (peer / "config.json").write_text((peer / "config.json").read_text() + "\n")
    assert "config.json changed" in refused(
        after, capsys, f"--student.checkpoint={peer}", f"--output_dir={after.parent / 'again'}"
    )
    both = paired("both", peer=peer, max_steps=1)
    assert "config.json changed" in refused(both, capsys)


def test_a_run_with_a_peer_goes_on_bit_for_bit(paired) -> None:
    terms = TERMS | {
        "visual_hint": {"kind": "cosine", **HFD},
        "visual_regions": {"weight": 0.5},
        "response_kl": {"trust": "better"},
    }
    config = paired(objective=terms, max_steps=4, checkpoint={"every": 2, "keep": 3})
    whole, output = metrics(config, "whole"), config.parent / "whole"
    before = state_of(output)
    shutil.rmtree(output / "checkpoints" / "step-00000004")
    shutil.rmtree(output / "peer")
    (output / "run.json").unlink()
    again = metrics(config, "whole")
    assert [line["loss"] for line in again] == [line["loss"] for line in whole]
    after = state_of(output)
    assert after.keys() == before.keys()
    assert any(name.startswith("parameter/teaching.terms.visual_hint") for name in after)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert (output / "peer" / "model.safetensors").is_file()


@pytest.mark.parametrize("trust", ["all", "better"])
def test_neither_packing_nor_splits_change_a_run(paired, trust: str) -> None:
    terms = TERMS | {
        "response_kl": {"trust": trust},
        "visual_hint": {"kind": "cosine", **HFD},
        "visual_regions": {"judged_by": "answer"},
    }
    config = paired(objective=terms, max_steps=2, global_batch_size=12, micro_batch_size=12)
    plain = metrics(config, "plain")
    alike(plain, metrics(config, "split", "--micro_batch_size=3"))
    packs = "--data.packing={max_tokens: 100000, max_images: 30, packs_per_step: 1}"
    packed = metrics(
        config, "packed", packs, "--global_batch_size=1", "--micro_batch_size=1", "--max_steps=1"
    )
    reference = metrics(config, "reference", "--objective.losses=reference")
    alike(plain, reference)
    assert packed[0]["peer/response_kl"] > 0


def test_a_peer_of_the_same_settings_begins_at_other_weights(paired, student_dir: Path) -> None:
    """It would have nothing to teach else; the next seed is its own."""
    settings = load(paired(seed=5))
    assert mirrored(settings).seed == 6
    assert mirrored(settings).student == settings.peer
    assert mirrored(mirrored(settings)).peer == settings.peer


def test_terms_that_tap_are_turned_round_for_the_peer(paired) -> None:
    settings = load(paired(objective=TERMS | {"visual_hint": HFD}))
    hint = mirrored(settings).objective.terms["visual_hint"]
    assert list(hint.student_taps) == HFD["teacher_taps"]  # pyright: ignore[reportAttributeAccessIssue]
    assert list(hint.teacher_taps) == HFD["student_taps"]  # pyright: ignore[reportAttributeAccessIssue]


def test_two_students_of_one_tower_run_it_once_and_other_grids_are_resampled_or_refused(
    paired, student_dir: Path, tmp_path: Path, capsys
) -> None:
    bf16 = "--engine.precision=bf16"
    metrics(paired("same", peer=student_dir, max_steps=1), "same", bf16)
    assert "the tower runs once for both students" in capsys.readouterr().err
    finer = make_tiny_llava(tmp_path / "larger", image_size=40, hidden=40, seed=9)
    config = paired("finer", peer=finer, max_steps=2)
    assert "visual_kl need equal visual grids" in refused(config, capsys)
    lines = metrics(config, "finer", "--data.visual_alignment=resample", bf16)
    assert lines[0]["peer/visual_kl"] > 0


def test_a_convnet_and_a_vit_of_one_language_model_begin_anew_together(paired, tmp_path: Path) -> None:
    towers = {name: make_tower(name, tmp_path / name) for name in ("siglip", "convnext")}
    parts = [{"vision_tower": t, "language_model": str(tmp_path / "llm")} for t in towers.values()]
    make_language_model("qwen2", tmp_path / "llm")
    config = paired(max_steps=2)
    tree = yaml.safe_load(config.read_text())
    tree |= {"student": parts[0], "peer": parts[1]}
    tree["data"]["visual_alignment"] = "resample"
    tree["objective"]["visual_hint"] = {"kind": "cosine", **HFD}
    config.write_text(yaml.safe_dump(tree))
    lines = metrics(config, "run")
    assert lines[0]["peer/cross_entropy"] != pytest.approx(lines[0]["cross_entropy"], rel=1e-4)
    assert main(["check", str(config)]) == 0
    found = [load_stock(str(config.parent / "run" / name)) for name in ("model", "peer")]
    assert [parts.tokens_per_image for parts in found] == [16, 4]


def test_each_part_of_either_student_has_its_rate_and_adapters_are_merged(paired) -> None:
    config = paired(max_steps=2)
    tree = yaml.safe_load(config.read_text())
    tree["peer"]["lora"] = {"rank": 2, "alpha": 4}
    config.write_text(yaml.safe_dump(tree))
    still = "--optim.lr_by_part={multi_modal_projector: 1.0e-12}"
    metrics(config, "run", still)
    output = config.parent / "run"
    start = AutoModelForImageTextToText.from_pretrained(tree["peer"]["checkpoint"]).state_dict()
    found = AutoModelForImageTextToText.from_pretrained(output / "peer").state_dict()
    assert found.keys() == start.keys()
    moved = {n for n, t in found.items() if not torch.allclose(t, start[n], atol=1e-7)}
    assert any("language_model" in n for n in moved)
    assert not any("multi_modal_projector" in n for n in moved)


def test_a_dry_run_and_a_check_show_the_peer(paired, capsys) -> None:
    config = paired(max_steps=3)
    assert main(["train", str(config), "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "\npeer             " in said
    assert main(["check", str(config)]) == 0
    said = capsys.readouterr().out
    assert "visual tokens    student 16, peer 16" in said
    assert "template         of the peer" in said


def test_another_frozen_part_is_refused_on_resume(paired, peer_dir: Path, tmp_path: Path, capsys) -> None:
    place = shutil.copytree(peer_dir, tmp_path / "place")
    config = paired(peer=place, max_steps=2)
    metrics(config, "run")
    make_tiny_llava(place, hidden=48, layers=3, tower_hidden=48, vocab_size=280, seed=8)
    assert "frozen part of the peer" in refused(
        config, capsys, "--max_steps=3", f"--output_dir={config.parent / 'run'}"
    )


def test_a_peer_of_another_vocabulary_is_refused_by_its_tokens(paired, tmp_path: Path, capsys) -> None:
    other = make_tiny_llava(tmp_path / "other", vocab_size=300)
    processor = tiny_processor(extra_tokens=("hello",))
    processor.save_pretrained(other)
    settings = json.loads((other / "config.json").read_text())
    settings["image_token_index"] = processor.tokenizer.convert_tokens_to_ids("<image>")
    (other / "config.json").write_text(json.dumps(settings))
    message = refused(paired(peer=other), capsys)
    assert "tokenizers must have the same content" in message
    assert "hello" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--teacher={checkpoint: DIR}"], "`teacher` is set"),
        (["--teacher={checkpoint: DIR, cache: x}"], "`teacher.cache` is set"),
        (
            ["--teacher={checkpoint: DIR, several: {checkpoints: [x], weights: uniform}}"],
            "`teacher.several` is set",
        ),
        (["--token_policy={spans: [{regex: a}]}"], "`token_policy` is set"),
        (["--pictures={mixup: {}}"], "`pictures` is set"),
        (["--objective.learned_weights={}"], "`objective.learned_weights` is set"),
        (["--engine.kind=deepspeed"], "`peer` was never tested with `engine.kind` deepspeed"),
        (
            ["--peer={vision_tower: a, language_model: b, projector: teacher}"],
            "`peer.projector` is teacher",
        ),
        (["--objective.attention={}"], "`objective.attention` reads attention"),
        (["--objective.visual_switch={}"], "`objective.visual_switch` reads attention, a second pass"),
        (["--objective.visual_kl={share: 0.5}"], "`objective.visual_kl` reads attention"),
        (["--objective={cross_entropy: {}}"], "`peer` is set but no term of `objective` uses it"),
        (["--peer={}"], "`peer` needs either `checkpoint`, or both"),
        (["--peer.checkpoint=a/run/model"], "`peer.checkpoint` a/run/model does not exist"),
        (
            ["--peer.lora={rank: 2}", "--trainable=[multi_modal_projector]"],
            "`peer.lora` adapts the language model",
        ),
    ],
)
def test_what_does_not_fit_a_peer_is_named(
    paired, capsys, words: list[str], message: str, teacher_dir
) -> None:
    words = [word.replace("DIR", str(teacher_dir)) for word in words]
    assert message in refused(paired(), capsys, *words)
