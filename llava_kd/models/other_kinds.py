"""Folders of models that are not transformers' own, told by their files, with where to go from there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from llava_kd.models.tower_source import nearest_neighbours
from llava_kd.relative import looked_from

_LFS = b"version https://git-lfs"
_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pth",
    ".pt",
    ".ckpt",
    ".gguf",
    ".onnx",
    ".npz",
    ".zip",
    ".tar",
    ".engine",
)


def _any(*patterns: str) -> Callable[[Path], bool]:
    return lambda folder: any(next(folder.glob(pattern), None) is not None for pattern in patterns)


_UNQUANTISED = "give the model in transformers' form that it was made from"
# Kinds whose files stand in the place of transformers' weights, told by any of these names.
_KINDS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        ("*.gguf",),
        "a GGUF model of llama.cpp, quantised or not",
        f"{_UNQUANTISED}, or a language model through `llava-kd convert`",
    ),
    (
        ("adapter_config.json",),
        "an adapter of peft without its base model",
        "merge it into that and save both",
    ),
    (("model_index.json",), "a pipeline of diffusers", "give one of transformers' models"),
    (("*openvino*.xml", "openvino/*.xml"), "a model of OpenVINO", _UNQUANTISED),
    (("*.onnx", "onnx/*.onnx"), "a model of ONNX", _UNQUANTISED),
    (("*.engine", "*.plan"), "an engine of TensorRT", _UNQUANTISED),
    (("*.mlpackage", "*.mlmodelc"), "a model of Core ML", _UNQUANTISED),
    (("*.tflite", "*.litertlm", "*.task"), "a model of LiteRT", _UNQUANTISED),
    (("weights.npz", "weights.*.npz"), "a model of MLX", _UNQUANTISED),
    (("*.nemo",), "a model of NeMo", "export it to transformers' form"),
    (
        ("consolidated*", "params.json"),
        "a model in its maker's own form",
        "give its version for transformers",
    ),
    (("tf_model*.h5", "saved_model.pb"), "a model of TensorFlow", "give its version for PyTorch"),
    (("flax_model*.msgpack",), "a model of Flax", "give its version for PyTorch"),
    (("trainer.json",), "a checkpoint of a run", "give the run's model/, which a finished run writes"),
    (
        ("*.distcp", "zero_to_fp32.py", "mp_rank_*"),
        "a training checkpoint of DeepSpeed or FSDP",
        "gather its weights into one model and save that",
    ),
    (("model/config.json",), "the folder of a run", "give the model/ in it"),
)


def refuse_other_kinds(name: str, what: str) -> None:
    """ValueError where `name` is a file, or a folder that transformers does not read as it is."""
    path = Path(name)
    if path.is_file():
        raise ValueError(
            f"{what} {name} is a file{_of_kind(path)}; give a folder with config.json and safetensors weights"
            if path.suffix in _WEIGHTS
            else f"{what} {name} is a file; give a model directory"
        )
    if not path.is_dir():
        return
    if (pointer := _pointer(path)) is not None:
        raise ValueError(
            f"{what} {name} was fetched without its large files: {pointer.name} is a pointer of Git LFS; run "
            "`git lfs pull` there"
        )
    if _any("model*.safetensors", "pytorch_model*.bin")(path):
        _refuse_adapter_beside(path, what)
    else:
        for patterns, kind, remedy in _KINDS:
            if _any(*patterns)(path):
                raise ValueError(f"{what} {name} is {kind}; {remedy}")
    config = _config(path)
    quantised = [tree.get("quantization_config") for tree in (config, config.get("text_config")) if tree]
    if how := next((tree for tree in quantised if isinstance(tree, dict)), None):
        raise ValueError(
            f"{what} {name} is quantised ({how.get('quant_method', 'unnamed')}), so it can be neither "
            f"trained nor scored in this form; {_UNQUANTISED} (teacher.quantize makes it small in memory)"
        )
    if "quantization" in config or _is_mlx(path):
        raise ValueError(f"{what} {name} is a model of MLX; {_UNQUANTISED}")


def _refuse_adapter_beside(folder: Path, what: str) -> None:
    """transformers puts it on the weights, merged or not, where peft is installed, and only then."""
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{what} {folder} holds whole weights and an adapter of peft beside them; if it is merged into "
            "them, take adapter_config.json and adapter_model.* out of the folder, else merge it first"
        )


def _of_kind(path: Path) -> str:
    return next((f" of {kind}" for patterns, kind, _ in _KINDS if any(path.match(p) for p in patterns)), "")


def _pointer(folder: Path) -> Path | None:
    for path in sorted(folder.glob("*")):
        if path.is_file() and path.stat().st_size < 1024:
            with path.open("rb") as stream:
                if stream.read(len(_LFS)) == _LFS:
                    return path
    return None


def _config(folder: Path) -> dict:
    """Empty where there is none, or none that can be read, which its reader says."""
    try:
        tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _is_mlx(folder: Path) -> bool:
    for path in sorted(folder.glob("model*.safetensors"))[:1]:
        try:
            with safe_open(path, framework="pt") as stream:
                return (stream.metadata() or {}).get("format") == "mlx"
        except (SafetensorError, OSError):  # its reader says what is wrong
            return False
    return False


def existing(name: str, what: str) -> str:
    """`name` if it is a directory or could be a hub id; ValueError for a path that is not there."""
    path = Path(name)
    refuse_other_kinds(name, what)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{what} {name} has no config.json: it is not a model directory")
        return name
    looks_like_a_path = path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1
    if looks_like_a_path or (path.parent.is_dir() and str(path.parent) != "."):
        raise ValueError(
            f"{what} {name} does not exist{nearest_neighbours(path)}{looked_from(path)}; give a model "
            "directory or a hub id such as org/name"
        )
    return name
