"""A folder that is no model of transformers' is told by what it is, wherever a model is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llava import make_tiny_llava

from llava_kd.evaluation.generation.model_directory import model_directory
from llava_kd.models.files.checkpoint import compose, load_stock
from llava_kd.models.other_kinds import refuse_other_kinds


def files(*names: str, text: str = "{}") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        return folder

    return make


def llava_with(**config: object) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        make_tiny_llava(folder, layers=1)
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        return folder

    return make


def mlx(folder: Path) -> Path:
    make_tiny_llava(folder, layers=1)
    weights = folder / "model.safetensors"
    save_file(load_file(weights), weights, metadata={"format": "mlx"})
    return folder


def adapted(folder: Path) -> Path:
    """As a merge leaves it that saves into the folder of the adapter."""
    make_tiny_llava(folder, layers=1)
    return files("adapter_config.json", "adapter_model.safetensors")(folder)


def pointers(folder: Path) -> Path:
    make_tiny_llava(folder, layers=1)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    return folder


KINDS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "gguf": (files("model-q4.gguf"), "is a GGUF model of llama.cpp"),
    "gguf with a config": (files("config.json", "m-00001-of-00002.gguf"), "is a GGUF model"),
    "a gguf file": (lambda folder: files("m.gguf")(folder) / "m.gguf", r"is a file of a GGUF model"),
    "onnx": (files("config.json", "onnx/model.onnx"), "is a model of ONNX"),
    "openvino": (files("config.json", "openvino_model.xml"), "is a model of OpenVINO"),
    "adapter": (files("adapter_config.json", "adapter_model.safetensors"), "is an adapter of peft"),
    "adapter beside whole weights": (adapted, "holds whole weights and an adapter of peft beside them"),
    "diffusers": (files("model_index.json", "unet/config.json"), "is a pipeline of diffusers"),
    "awq": (llava_with(quantization_config={"quant_method": "awq"}), r"is quantised \(awq\)"),
    "gptq inside": (
        llava_with(text_config={"model_type": "qwen2", "quantization_config": {"quant_method": "gptq"}}),
        r"is quantised \(gptq\)",
    ),
    "mlx, quantised": (llava_with(quantization={"group_size": 64, "bits": 4}), "is a model of MLX"),
    "mlx": (mlx, "is a model of MLX"),
    "meta": (files("params.json", "consolidated.00.pth"), "in its maker's own form"),
    "tensorflow": (files("config.json", "tf_model.h5"), "is a model of TensorFlow"),
    "flax": (files("config.json", "flax_model.msgpack"), "is a model of Flax"),
    "deepspeed": (files("zero_to_fp32.py", "latest"), "is a training checkpoint of DeepSpeed"),
    "our checkpoint": (files("trainer.json", "state.safetensors"), "is a checkpoint of a run"),
    "a run": (files("config.yaml", "model/config.json"), "is the folder of a run; give the model/ in it"),
    "git lfs": (pointers, "model.safetensors is a pointer of Git LFS"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_another_kind_of_model_says_what_it_is(kind: str, tmp_path: Path) -> None:
    make, words = KINDS[kind]
    path = make(tmp_path / "model")
    for read in (load_stock, model_directory):
        with pytest.raises(ValueError, match=words):
            read(str(path))
    with pytest.raises(ValueError, match=words):
        compose(vision_tower=str(path), language_model="org/model")


def test_models_of_transformers_are_left_alone(tmp_path: Path) -> None:
    directory = make_tiny_llava(tmp_path / "m", layers=1)
    files("model.gguf", "onnx/model.onnx")(directory)  # beside whole weights
    refuse_other_kinds(str(directory), "the model")
    refuse_other_kinds("org/name", "the model")
    assert load_stock(str(directory)).stock.dtype == torch.float32
