"""Adapters: what they train, what they leave alone, and the stock model that comes out.

Shape legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file
from tiny_batches import inputs, record
from transformers import AutoModelForImageTextToText

pytest.importorskip("peft", reason="the lora extra is not installed")

import ranks

from llava_kd.assembly.parts.models import place
from llava_kd.assembly.planning.estimate import ModelSizes, memory
from llava_kd.assembly.settings import load
from llava_kd.batch import Batch
from llava_kd.cli import main
from llava_kd.models.files.checkpoint import load_stock, save_stock
from llava_kd.models.lora import add_adapters, chosen_layers, is_adapter, linear_layers, merge_adapters
from llava_kd.models.mllm import MLLM, PARTS
from llava_kd.models.quantize import check_quantization, quantize_linears
from llava_kd.training.checkpoint import Checkpoints

SETTINGS = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": None, "seed": 1}
LORA = "--student.lora={rank: 4, alpha: 64, dropout: 0.1}"
BATCH = Batch(student=inputs(record(1), record(2)), record_ids=("a", "b"))
IDS_BT = torch.tensor([[1, 2, 3, 5, 8, 13]])


@torch.no_grad()
def logits_BTV(stock) -> torch.Tensor:
    return stock.eval()(input_ids=IDS_BT).logits


def stir(stock) -> None:
    """Adapters that do something: fresh ones are zero."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in stock.named_parameters():
        if is_adapter(name):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2


def mllm_weights(stock) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in MLLM(stock).named_parameters()}


@pytest.mark.parametrize("targets", [None, ["q_proj", "mlp.down_proj"]], ids=["all", "some"])
def test_a_merged_model_is_stock_and_says_what_the_adapted_one_said(
    student_dir: Path, tmp_path: Path, targets: list[str] | None
) -> None:
    parts = load_stock(str(student_dir))
    plain_BTV = logits_BTV(parts.stock)
    add_adapters(parts.stock, **{**SETTINGS, "targets": targets})
    torch.testing.assert_close(logits_BTV(parts.stock), plain_BTV, rtol=0, atol=0)
    stir(parts.stock)
    adapted_BTV = logits_BTV(parts.stock)
    assert float((adapted_BTV - plain_BTV).abs().max()) > 0.1
    save_stock(parts, tmp_path / "model", trained=merge_adapters(parts.stock, mllm_weights(parts.stock)))
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits_BTV(merged), adapted_BTV, rtol=1e-5, atol=1e-5)
    expected = load_file(student_dir / "model.safetensors")
    got = load_file(tmp_path / "model" / "model.safetensors")
    assert {name: value.shape for name, value in got.items()} == {n: v.shape for n, v in expected.items()}
    moved = {name.split(".")[-2] for name in got if not torch.equal(got[name], expected[name])}
    assert moved == ({t.split(".")[-1] for t in targets} if targets else moved)
    assert moved <= {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_only_adapters_of_an_adapted_part_are_trained(student_dir: Path) -> None:
    stock = load_stock(str(student_dir)).stock
    layers = chosen_layers(stock, None)
    add_adapters(stock, **SETTINGS)
    mllm = MLLM(stock, trainable=("multi_modal_projector", "language_model"))
    trained = {name for name, parameter in mllm.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "language_model" in name} == {
        name for name, _ in mllm.named_parameters() if is_adapter(name)
    }
    assert {name for name in trained if "language_model" not in name} == {
        f"multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")
    }
    assert len([name for name in trained if "lora_A" in name]) == len(layers) == 14


def test_the_plan_counts_the_adapters_and_the_bits(stage, student_dir: Path) -> None:
    path = stage("run", distilled=False)
    config = load(path, [LORA])
    planned = ModelSizes.of_directory(str(student_dir), config)
    stock = load_stock(str(student_dir)).stock
    linear = sum(layer.weight.numel() for layer in linear_layers(stock).values())
    add_adapters(stock, **SETTINGS)
    mllm = MLLM(stock, trainable=config.trainable)
    assert planned.trained == sum(p.numel() for p in mllm.parameters() if p.requires_grad)
    assert sum(planned.parameters.values()) == sum(p.numel() for p in stock.parameters())
    few = load(path, [LORA, "--student.quantize=8bit"])
    saved = memory(config, 1, planned, None)["weights"] - memory(few, 1, planned, None)["weights"]
    assert saved == 3 * linear


def test_the_first_adapters_are_the_same_on_every_rank(student_dir: Path) -> None:
    first, second = (load_stock(str(student_dir)).stock for _ in range(2))
    state = torch.get_rng_state()
    add_adapters(first, **SETTINGS)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    add_adapters(second, **SETTINGS)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_model_of_few_bits_is_merged_into_the_values_that_they_stand_for(
    student_dir: Path, tmp_path: Path, bits: Literal["4bit", "8bit"]
) -> None:
    """On the CPU, which bitsandbytes computes on too; a run asks for a GPU."""
    pytest.importorskip("bitsandbytes", reason="the quantize extra is not installed")
    parts = load_stock(str(student_dir))
    stock = parts.stock
    quantize_linears(stock.model.language_model.layers, bits, compute_dtype=torch.float32)
    add_adapters(stock, **{**SETTINGS, "targets": ["q_proj", "up_proj"]})
    mllm = MLLM(stock, trainable=("multi_modal_projector", "language_model"))
    place(mllm, torch.device("cpu"), dict.fromkeys(PARTS, torch.float32))
    packed = stock.model.language_model.layers[0].mlp.down_proj.weight
    assert packed.dtype in (torch.uint8, torch.int8)
    stir(stock)
    mllm(BATCH.student, mllm.image_features(BATCH.student)).hidden_BTD.sum().backward()
    trained = [parameter for parameter in mllm.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)
    with torch.no_grad():  # in training mode: bitsandbytes packs weights anew for evaluation on a CPU
        few_BTV = stock.train()(input_ids=IDS_BT).logits
    save_stock(parts, tmp_path / "model", trained=merge_adapters(stock, mllm_weights(stock)))
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    # 8 bits also round the activations, which the merged model does not.
    tolerance = 1e-4 if bits == "4bit" else 0.15
    torch.testing.assert_close(logits_BTV(merged), few_BTV, rtol=0, atol=tolerance)


# A stage ----


def trained_state(output: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(output / "checkpoints" / f"step-{step:08d}" / "state.safetensors")


def test_a_stage_trains_adapters_resumes_and_hands_over_a_merged_model(
    stage, student_dir: Path, capsys
) -> None:
    """With dropout: a run that goes on draws what the undisturbed one drew."""
    keep = {"checkpoint": {"every": 2, "keep": 9}, "max_steps": 4}
    whole, broken = stage("whole", **keep), stage("broken", **keep)
    assert main(["train", str(whole), LORA]) == main(["train", str(broken), LORA]) == 0
    whole, output = whole.with_suffix(""), broken.with_suffix("")
    state = trained_state(whole, 4)
    assert all(is_adapter(name) or "multi_modal_projector" in name for name in state)
    assert any(is_adapter(name) for name in state)

    (output / "run.json").unlink()
    shutil.rmtree(output / "model")
    shutil.rmtree(output / "checkpoints" / "step-00000004")
    capsys.readouterr()
    assert main(["train", str(broken), LORA]) == 0
    assert "resuming from step 2" in capsys.readouterr().err
    assert all(torch.equal(value, state[name]) for name, value in trained_state(output, 4).items())

    before = load_file(student_dir / "model.safetensors")
    after = load_file(whole / "model" / "model.safetensors")
    assert after.keys() == before.keys()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {n for n in after if "multi_modal_projector" in n or n.endswith("_proj.weight")} - {
        name for name in after if "vision_tower" in name
    }
    scaling = 64 / 4
    path = "language_model.layers.0.self_attn.q_proj"
    factors = [state[f"parameter/mllm.{path}.lora_{side}.default.weight"] for side in "AB"]
    name = next(n for n in after if n.endswith("layers.0.self_attn.q_proj.weight") and "language" in n)
    expected = before[name] + scaling * factors[1] @ factors[0]
    torch.testing.assert_close(after[name], expected)

    nxt = stage("next", max_steps=1)
    words = [f"--student.checkpoint={whole / 'model'}", "--student.lora={rank: 2}"]
    assert main(["train", str(nxt), *words]) == 0
    record = json.loads((nxt.with_suffix("") / "run.json").read_text())
    assert record["parent"]["run"] == str(whole)
    assert Checkpoints(nxt.with_suffix("") / "checkpoints", keep=2).steps() == [1]


def test_a_base_that_changed_under_its_adapters_is_refused(stage, tmp_path: Path, capsys) -> None:
    from safetensors.torch import save_file
    from tiny_llava import make_tiny_llava

    student = make_tiny_llava(tmp_path / "student", hidden=32, tied=True)
    config = stage("run", distilled=False, max_steps=1)
    words = [str(config), f"--student.checkpoint={student}", LORA]
    assert main(["train", *words]) == 0
    (config.with_suffix("") / "run.json").unlink()
    weights = load_file(student / "model.safetensors")
    name = next(name for name in weights if "language_model" in name and name.endswith("q_proj.weight"))
    weights[name][0] += 1e-3
    save_file(weights, student / "model.safetensors", metadata={"format": "pt"})
    assert main(["train", *words]) == 2
    assert "was trained with another frozen part of the student" in capsys.readouterr().err


ENGINES = {
    "ddp": ["--engine.kind=ddp"],
    "fsdp2": ["--engine.kind=fsdp2"],
    "fsdp2 in bf16": ["--engine.kind=fsdp2", "--engine.precision=bf16"],
    "zero3": ["--engine.kind=deepspeed", "--engine.zero_stage=3"],
}


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
def test_adapters_on_two_ranks_end_as_on_one(stage, tmp_path: Path, engine: str) -> None:
    config = stage("config", max_steps=3, engine="auto")
    lora = LORA.replace("0.1", "0.0")
    bf16 = [word for word in ENGINES[engine] if "precision" in word]
    ranks.train(config, tmp_path / "one", lora, *bf16)
    ranks.train(config, tmp_path / "two", lora, *ENGINES[engine], ranks=2)
    expected, got = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("one", "two"))
    assert got.keys() == expected.keys()
    tolerance = 2e-2 if bf16 else 1e-5
    for name, value in got.items():
        torch.testing.assert_close(
            value, expected[name], rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


# What is refused ----


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--student.lora={rank: 0}"], "`student.lora.rank` must be more than 0; got 0"),
        (["--student.lora={dropout: 1.0}"], "`student.lora.dropout` must be below 1"),
        (
            ["--student.lora={targets: [q_prj]}"],
            "names 'q_prj', which is no linear layer of the decoder (did",
        ),
        (["--student.lora={targets: [q_prj]}"], "did you mean q_proj"),
        (["--student.lora={targets: []}"], "`student.lora.targets` is empty"),
        ([LORA, "--trainable=[multi_modal_projector]"], "add language_model to `trainable`"),
        (["--student.quantize=4bit"], "set student.lora as well"),
        ([LORA, "--student.quantize=4bit"], "runs on CUDA devices; this run is on cpu"),
        (
            [LORA, "--student.quantize=4bit", "--engine.kind=fsdp2"],
            "cannot shard quantized weights; use auto, single or ddp",
        ),
        (["--teacher.quantize=8bit"], "`teacher.quantize` is 8bit, which runs on CUDA devices"),
        (["--teacher.quantize=8bit", "--teacher.placement=fsdp"], "set teacher.placement to replicated"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(stage, capsys, words: list[str], said: str) -> None:
    if any("quantize" in word for word in words):
        pytest.importorskip("bitsandbytes", reason="the quantize extra is not installed")
    assert main(["train", str(stage("run")), *words]) == 2
    text = capsys.readouterr().err
    assert said in text
    assert text.splitlines()[-1].startswith("llava-kd train: ")


def test_missing_packages_are_named_with_how_to_get_them(student_dir: Path, monkeypatch) -> None:
    for package in ("peft", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, package, None)
    stock = load_stock(str(student_dir)).stock
    with pytest.raises(ValueError, match=r"pip install 'llava_kd\[lora\]'"):
        add_adapters(stock, **SETTINGS)
    with pytest.raises(ValueError, match=r"pip install 'llava_kd\[quantize\]'"):
        check_quantization("student.quantize", "4bit", torch.device("cuda"))
