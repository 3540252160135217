"""Stock LLaVA directories in and out, and a new student composed of a tower and a language model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.image_processing_utils import BaseImageProcessor

from llava_kd.models.vision_tower import (
    TOWER_CLASSES,
    num_cls_tokens,
    text_config,
    tokens_per_image,
    vision_config,
)

IMAGE_TOKEN = "<image>"


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A stock model and the processor that feeds it."""

    stock: LlavaForConditionalGeneration
    processor: LlavaProcessor

    @property
    def tokens_per_image(self) -> int:
        return tokens_per_image(self.stock.config)


def _existing(name: str, what: str) -> str:
    """`name` if it is a directory or could be a hub id; ValueError for a path that is not there."""
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{what} {name} has no config.json: it is not a model directory")
        return name
    looks_like_a_path = path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1
    if looks_like_a_path or (path.parent.is_dir() and str(path.parent) != "."):
        raise ValueError(f"{what} {name} does not exist; give a model directory or a hub id such as org/name")
    return name


@contextmanager
def _readable(what: str, name: str) -> Iterator[None]:
    """Files of `name` that are missing or broken become a ValueError of one line."""
    try:
        yield
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{what} {name} cannot be read: {' '.join(str(error).split())}") from error


def _config(name: str) -> PreTrainedConfig:
    with _readable("the config of", name):
        return AutoConfig.from_pretrained(name)


def _pretrained(kind: type, name: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model of class `kind`; ValueError if a weight is missing, which would be drawn at random."""
    with _readable("the weights of", name):
        model, info = kind.from_pretrained(name, dtype=dtype, output_loading_info=True)
    assert isinstance(model, PreTrainedModel)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{name} lacks {len(missing)} weights of a {type(model).__name__}: {missing[:3]} ..."
        )
    return model


def load_stock(name: str, *, dtype: torch.dtype = torch.float32) -> Parts:
    """Read a stock LLaVA directory or hub id.

    Raises ValueError if it is missing, is another kind of model, or lacks its processor.
    """
    name = _existing(name, "the LLaVA checkpoint")
    config = _config(name)
    if not isinstance(config, LlavaConfig):
        raise ValueError(f"{name} is a {config.model_type!r} model; a LLaVA checkpoint must be 'llava'")
    stock = _pretrained(LlavaForConditionalGeneration, name, dtype)
    assert isinstance(stock, LlavaForConditionalGeneration)
    with _readable("the processor of", name):
        processor = LlavaProcessor.from_pretrained(name)
    if processor.patch_size is None:
        raise ValueError(f"the processor of {name} has no patch_size; add it to processor_config.json")
    return Parts(stock=stock, processor=processor)


def compose(
    *,
    vision_tower: str,
    language_model: str,
    vision_feature_layer: int = -2,
    vision_feature_select_strategy: Literal["default", "full"] = "full",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Parts:
    """A new student: pretrained tower and language model, and a random two-layer GELU projector.

    The tokenizer gets an image token only if it has none, and the embeddings grow only if it has no row.
    """
    tower = _load_tower(_existing(vision_tower, "the vision tower"), dtype)
    name = _existing(language_model, "the language model")
    if type(text := _config(name)) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"the language model {name} is a {text.model_type!r} model, not a causal language model"
        )
    with _readable("the tokenizer of", name):
        tokenizer = AutoTokenizer.from_pretrained(name)
    causal = _pretrained(AutoModelForCausalLM, name, dtype)
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if len(tokenizer) > causal.config.get_text_config().vocab_size:
        causal.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=causal.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=vision_feature_select_strategy,
        projector_hidden_act="gelu",
        tie_word_embeddings=causal.config.tie_word_embeddings,
    )
    config.image_seq_length = tokens_per_image(config)
    stock = _assemble(config, tower, causal, seed=seed, dtype=dtype)
    with _readable("the image processor of", vision_tower):
        image_processor = AutoImageProcessor.from_pretrained(vision_tower)
    return Parts(stock=stock, processor=make_processor(config, tokenizer, image_processor))


def make_processor(
    config: LlavaConfig, tokenizer: PreTrainedTokenizerBase, image_processor: BaseImageProcessor
) -> LlavaProcessor:
    """The stock processor whose placeholder count equals the tower's token count."""
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=vision_config(config).patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=num_cls_tokens(config),
        chat_template=tokenizer.chat_template,
    )


def _load_tower(name: str, dtype: torch.dtype) -> PreTrainedModel:
    model_type = _config(name).model_type
    if model_type not in TOWER_CLASSES:
        raise ValueError(
            f"vision tower {name} is a {model_type!r} model; stock LLaVA needs one of {sorted(TOWER_CLASSES)}"
        )
    return _pretrained(TOWER_CLASSES[model_type], name, dtype)


def _assemble(
    config: LlavaConfig, tower: PreTrainedModel, causal: PreTrainedModel, *, seed: int, dtype: torch.dtype
) -> LlavaForConditionalGeneration:
    """Put pretrained parts into an empty stock model; only the projector is drawn, from `seed`."""
    with torch.device("meta"):
        stock = LlavaForConditionalGeneration(config)
    stock.model.vision_tower = tower
    stock.model.language_model = causal.get_decoder()
    stock.set_output_embeddings(causal.get_output_embeddings())
    projector = stock.model.multi_modal_projector.to_empty(device="cpu").to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for linear in (projector.linear_1, projector.linear_2):
        nn.init.normal_(linear.weight, std=text_config(config).initializer_range, generator=generator)
        nn.init.zeros_(linear.bias)
    stock.tie_weights()
    stock.generation_config = causal.generation_config
    return stock


def save_stock(
    parts: Parts,
    directory: str | Path,
    *,
    trained: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a stock LLaVA directory, complete or not at all; an existing one is replaced at the end.

    `trained` holds weights by their name in an `MLLM`, such as a sharded engine gathers; they replace those
    of `parts`. `dtype` casts what is written; None keeps it.
    """
    directory = Path(directory)
    scratch = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    state = _stock_state(parts.stock, trained or {})
    if dtype is not None:
        state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
    parts.stock.save_pretrained(scratch, state_dict=state)
    if dtype is not None:
        _record_dtype(scratch / "config.json", dtype)
    parts.processor.save_pretrained(scratch)
    for path in scratch.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    if directory.exists():
        retired = directory.with_name(f".{directory.name}.retired")
        shutil.rmtree(retired, ignore_errors=True)
        directory.rename(retired)
        scratch.rename(directory)
        shutil.rmtree(retired)
    else:
        scratch.rename(directory)


def _stock_state(stock: LlavaForConditionalGeneration, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stock state dictionary with `trained` put in; tied heads follow their embeddings."""
    state = stock.state_dict()
    for name, tensor in trained.items():
        stock_name = name if name.startswith("lm_head.") else f"model.{name}"
        if stock_name not in state:
            raise ValueError(f"the model has no weight {stock_name!r}; it has {sorted(state)[:5]} ...")
        state[stock_name] = tensor
    if stock.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
    return state


def _record_dtype(config_path: Path, dtype: torch.dtype) -> None:
    """Say in every part of `config.json` in which type the weights beside it are."""
    config = json.loads(config_path.read_text())
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if "dtype" in part:
            part["dtype"] = str(dtype).removeprefix("torch.")
    config_path.write_text(json.dumps(config, indent=2) + "\n")
