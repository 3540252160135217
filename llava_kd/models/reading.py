"""Model files of transformers read with errors that say which file, and no weight drawn in silence."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llava_kd.models.other_kinds import existing
from llava_kd.models.tower_source import nearest

__all__ = [
    "check_vocabulary",
    "existing",
    "read_config",
    "read_json",
    "read_pretrained",
    "read_tokenizer",
    "readable",
]

# Ids that an id which cannot be read is compared with, beside those that this machine has read before.
KNOWN_IDS = (
    *(
        "google/siglip-so400m-patch14-384",
        "google/siglip-base-patch16-224",
        "google/siglip2-base-patch16-224",
    ),
    *(
        "google/siglip2-so400m-patch14-384",
        "openai/clip-vit-base-patch32",
        "openai/clip-vit-large-patch14-336",
    ),
    *("facebook/dinov2-base", "facebook/dinov2-large", "facebook/dinov2-with-registers-base"),
    *("facebook/dinov3-vitb16-pretrain-lvd1689m", "facebook/dinov3-vitl16-pretrain-lvd1689m"),
    *(
        "Qwen/Qwen2.5-0.5B",
        "Qwen/Qwen2.5-1.5B",
        "Qwen/Qwen2.5-3B",
        "Qwen/Qwen2.5-7B",
        "Qwen/Qwen2.5-0.5B-Instruct",
    ),
    *("Qwen/Qwen1.5-0.5B", "Qwen/Qwen1.5-1.8B", "Qwen/Qwen1.5-4B", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B"),
    *(
        "meta-llama/Llama-3.2-1B",
        "meta-llama/Llama-3.2-3B",
        "microsoft/Phi-3-mini-4k-instruct",
        "google/gemma-2b",
    ),
    *(
        "google/gemma-3-1b-pt",
        "HuggingFaceTB/SmolLM2-135M",
        "HuggingFaceTB/SmolLM2-360M",
        "HuggingFaceTB/SmolLM3-3B",
    ),
    *("allenai/OLMo-2-0425-1B", "llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf"),
)


@contextmanager
def readable(what: str, name: str) -> Iterator[None]:
    """Files of `name` that are missing, broken or of another kind become a ValueError of one line."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{what} {name} cannot be read: it is broken, or holds more than tensors, which is never loaded"
        ) from error
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{what} {name} cannot be read: {' '.join(str(error).split())}") from error


def read_config(name: str) -> PreTrainedConfig:
    """Raises ValueError, with the nearest names for an id that is not known."""
    try:
        with readable("the config of", name):
            return AutoConfig.from_pretrained(name)
    except ValueError as error:
        if Path(name).is_dir():
            raise
        known = {*KNOWN_IDS, *_read_before()}
        hint = "" if name in known else nearest(name, known)
        if _is_out_of_reach(error):
            raise ValueError(
                f"{name} is no directory here, is not in the cache of the hub ({HF_HUB_CACHE}), and the hub "
                f"cannot be reached{hint}; on a machine that reaches it: `hf download {name} --local-dir "
                "DIR`, then give DIR"
            ) from error
        raise ValueError(f"{name} is no directory here, and as an id of the hub {error}{hint}") from error


def _is_out_of_reach(error: BaseException | None) -> bool:
    """Whether a chain of causes is about the network, or about its being switched off, and no answer came."""
    while error is not None:
        text = f"{type(error).__name__} {error}".lower()
        if any(word in text for word in ("couldn't connect", "connecterror", "offline mode", "offlinemode")):
            return True
        error = error.__cause__ or error.__context__
    return False


def _read_before() -> list[str]:
    """Ids of the models in the cache of the hub."""
    cached = Path(HF_HUB_CACHE).glob("models--*--*")
    return [path.name.removeprefix("models--").replace("--", "/", 1) for path in cached]


def read_pretrained(kind: type, name: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model of class `kind`.

    Raises ValueError if a weight is missing or has another shape, which would be drawn at random.
    """
    with readable("the weights of", name):
        model, info = kind.from_pretrained(
            name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    assert isinstance(model, PreTrainedModel)
    if misfits := sorted(info["mismatched_keys"]):
        weight, found, needed = misfits[0]
        raise ValueError(
            f"the parts of {name} do not fit together: {weight} is {tuple(found)} where its config needs "
            f"{tuple(needed)} ({len(misfits)} such weights)"
        )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{name} lacks {len(missing)} weights of a {type(model).__name__}: {missing[:3]} ..."
        )
    _say_untied(model)
    return model


def _say_untied(model: PreTrainedModel) -> None:
    """Where the files hold a head of its own, transformers reads it although the config says that it is tied.

    The config must not say so then, or the head is left out where the model is put together or saved.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.weight is model.get_input_embeddings().weight:
        return
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def read_json(path: Path) -> dict:
    """Raises ValueError, naming the file, for one that holds no JSON mapping."""
    with readable("the file", str(path)):
        tree = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(tree, dict):
            raise ValueError(f"it must hold a mapping; got {type(tree).__name__}")
        return tree


def read_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Raises ValueError for one that is missing or has no vocabulary."""
    try:
        with readable("the tokenizer of", name):
            tokenizer = AutoTokenizer.from_pretrained(name)
    except (ImportError, ValueError) as error:
        if (Path(name) / "tokenizer.model").is_file() and not (Path(name) / "tokenizer.json").is_file():
            raise ValueError(
                f"the tokenizer of {name} is a SentencePiece file alone (tokenizer.model), which needs other "
                f"packages: pip install sentencepiece protobuf ({' '.join(str(error).split())[:200]})"
            ) from error
        raise
    check_vocabulary(tokenizer, name)
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """ValueError for a tokenizer that knows no word, which transformers makes where files are missing."""
    ids = tokenizer.encode("What is it?", add_special_tokens=False)
    if all(token == tokenizer.unk_token_id for token in ids):
        raise ValueError(
            f"{name} comes without a tokenizer; put tokenizer.json and tokenizer_config.json into its "
            f"directory (transformers made one of {len(tokenizer)} tokens that reads no word)"
        )
