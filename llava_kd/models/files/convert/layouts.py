"""Which layout a directory has, by what its writers leave in it; what cannot be read is refused by its name.

Read: `parts`, the three folders of TinyLLaVA_Factory and LLaVA-KD; `flat`, the single state that
TinyLLaVA_Factory's fine-tuning writes and publishes; `llava`, LLaVA-1.5's state with `model.mm_projector`
beside a language model's own names (and TinyLLaVA's older code, which kept that layout).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from llava_kd.models.files.convert.weights import weight_files
from llava_kd.models.reading import read_json

Layout = Literal["parts", "flat", "llava"]
PART_FOLDERS = ("language_model", "vision_tower", "connector")
_KNOWN = "a TinyLLaVA, LLaVA-KD or LLaVA-1.5 directory"


def read_layout(source: Path) -> tuple[Layout, dict]:
    """The layout and the config. Raises ValueError that says what the directory is and what to do next."""
    _refuse_without_config(source)
    tree = read_json(source / "config.json")
    kind = str(tree.get("model_type"))
    folders = [name for name in PART_FOLDERS if (source / name).is_dir()]
    is_tiny = kind == "tinyllava" or bool(folders)
    if "quantization_config" in tree or "quantization_config" in (tree.get("text_config") or {}):
        raise ValueError(f"{source} is quantised; convert the checkpoint that it was made from")
    if not folders:
        _refuse_pieces(source)
    if folders:
        return "parts", tree
    if kind == "llava" and "vision_config" in tree:
        raise ValueError(f"{source} is a stock LLaVA directory already: there is nothing to convert")
    if not is_tiny and not _is_llava(tree, kind):
        if "model_type" not in tree:
            raise ValueError(
                f"{source}/config.json has no model_type, such as llava_llama: an incomplete download?"
            )
        raise ValueError(f"{source} is a {kind!r} model; `llava-kd convert` reads {_KNOWN}")
    if not weight_files(source):
        raise ValueError(f"{source} has no weights (model.safetensors or pytorch_model.bin)")
    if is_tiny:
        return "flat", tree
    _refuse_other_llava(source, tree)
    return "llava", tree


def _is_llava(tree: Mapping[str, object], kind: str) -> bool:
    return "mm_vision_tower" in tree or kind.startswith(("llava_", "tiny_llava"))


def _refuse_without_config(source: Path) -> None:
    if source.is_file():
        raise ValueError(f"{source} is a file; give the directory of the checkpoint: {_KNOWN}")
    if (source / "config.json").is_file():
        return
    if list(source.glob("*.gguf")):
        raise ValueError(
            f"{source} holds a GGUF file, which is llama.cpp's form of a model; convert what it was made from"
        )
    _refuse_pieces(source)
    raise ValueError(f"{source} has no config.json: give {_KNOWN}")


def _refuse_pieces(source: Path) -> None:
    """What LLaVA's code writes beside whole checkpoints: adapters, projectors, and DeepSpeed's shards."""
    if (source / "adapter_config.json").is_file() or list(source.glob("adapter_model.*")):
        raise ValueError(
            f"{source} holds LoRA adapters (adapter_model), not a whole model; merge them into their base "
            "first, as LLaVA's scripts/merge_lora_weights.py does, and convert the result"
        )
    if weight_files(source):
        return
    if pieces := [*source.glob("mm_projector*.bin"), *source.glob("mm_projector/*.bin")]:
        raise ValueError(
            f"{source} holds the projector of a first stage alone ({pieces[0].name}), not a whole model; "
            "convert the checkpoint of the next stage"
        )
    if (source / "zero_to_fp32.py").is_file() or list(source.glob("global_step*")):
        raise ValueError(
            f"{source} holds the shards of DeepSpeed, not weights; gather them first with "
            "`python zero_to_fp32.py . pytorch_model.bin` in it"
        )


def _refuse_other_llava(source: Path, tree: Mapping[str, object]) -> None:
    """LLaVA's code with another way of looking at a picture than stock LLaVA's."""
    aspect = tree.get("image_aspect_ratio")
    if str(aspect).startswith("anyres"):
        raise ValueError(
            f"{source} is a LLaVA-NeXT (1.6) checkpoint: image_aspect_ratio {aspect!r} cuts a picture into "
            "tiles, which stock LLaVA does not; take a LLaVA-1.5 one"
        )
    if tree.get("s2"):
        raise ValueError(
            f"{source} reads pictures at several scales (s2), which stock LLaVA does not; take one without"
        )
