"""The directory of a stock LLaVA model: a path, or an id of the hub."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HfHubHTTPError

from llava_kd.models.other_kinds import refuse_other_kinds
from llava_kd.models.projectors.kinds import CLASSES
from llava_kd.models.reading import existing
from llava_kd.models.tower_source import nearest_neighbours

_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_CONVERTIBLE = "llava_"  # what LLaVA-1.5's own code calls its models, but for those of transformers:
_OTHERS = ("llava_next", "llava_next_video", "llava_onevision")


def model_directory(name: str | Path) -> Path:
    """The directory, when it is a stock LLaVA one; a ValueError that says what is wrong otherwise."""
    refuse_other_kinds(str(name), "the model")
    directory = Path(name)
    if not directory.is_dir():
        directory = _from_hub(str(name))
    config = directory / "config.json"
    if not config.is_file():
        raise ValueError(f"{directory} has no config.json; give a directory that save_pretrained wrote")
    try:
        tree = json.loads(config.read_text(encoding="utf-8"))
        kind = str(tree.get("model_type"))
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{config} is not a model's configuration ({error}); copy the model again"
        ) from error
    if kind not in CLASSES:
        needed = (
            f"{directory} must hold a stock LLaVA model (model_type 'llava' in config.json), got {kind!r}"
        )
        if "mm_vision_tower" in tree or kind.startswith("tinyllava"):
            is_original = True
        else:
            is_original = kind.startswith(_CONVERTIBLE) and kind not in _OTHERS
        if is_original:
            raise ValueError(f"{needed}; run `llava-kd convert` on a TinyLLaVA or LLaVA-1.5 directory first")
        raise ValueError(f"{needed}, a family that is not supported")
    if not list(directory.glob("*.safetensors")):
        raise ValueError(f"{directory} has no .safetensors weights")
    return directory


def _from_hub(name: str) -> Path:
    try:
        existing(name, "the model")
    except ValueError:
        raise ValueError(f"no model directory {name}{nearest_neighbours(Path(name))}") from None
    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{name} is no directory here, and as an id of the hub it is neither in the cache "
            f"({HF_HUB_CACHE}) nor can it be fetched ({reason}); download it first, "
            f"`hf download {name} --local-dir DIR`, and give DIR"
        ) from error


def run_name(directory: Path) -> str:
    """What tells the model from others: every run calls its own `model`."""
    directory = directory.resolve()
    parent = directory.parent
    return f"{parent.parent.name}/{parent.name}" if directory.name == "model" else directory.name
