"""Stock LLaVA directories in and out, and a new student composed of a tower and a language model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.image_processing_utils import BaseImageProcessor

from llava_kd.durable import replacing_folder
from llava_kd.models.files.served import served_generation, served_processor
from llava_kd.models.language_model import IMAGE_TOKEN, decoder_of, load_language_model
from llava_kd.models.projectors.conv_attention import check_grid
from llava_kd.models.projectors.kinds import llava_class
from llava_kd.models.reading import (
    check_vocabulary,
    existing,
    read_config,
    read_json,
    read_pretrained,
    readable,
)
from llava_kd.models.towers.families import FAMILIES, Family
from llava_kd.models.towers.loading import LoadedTower, load_tower
from llava_kd.models.towers.vision_tower import (
    input_size,
    num_prefix_tokens,
    text_config,
    tokens_per_image,
    vision_config,
)
from llava_kd.models.towers.visual_grid import VisualGrid, visual_grid
from llava_kd.tensor_files import share, writing


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A stock model and the processor that feeds it."""

    stock: LlavaForConditionalGeneration
    processor: LlavaProcessor

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return self.processor.tokenizer

    @property
    def head(self) -> nn.Linear:
        return self.stock.lm_head

    @property
    def tokens_per_image(self) -> int:
        return tokens_per_image(self.stock.config, input_size(self.processor.image_processor))

    @property
    def visual_grid(self) -> VisualGrid:
        return visual_grid(self.stock.config, input_size(self.processor.image_processor))


def load_stock(name: str, *, dtype: torch.dtype = torch.float32) -> Parts:
    """Read a stock LLaVA directory or hub id.

    Raises ValueError if it is missing, is another kind of model, or lacks its processor.
    """
    config = load_config(name)
    processor = load_processor(name)
    check_grid(config, visual_grid(config, input_size(processor.image_processor)), name)
    stock = read_pretrained(llava_class(config), name, dtype)
    assert isinstance(stock, LlavaForConditionalGeneration)
    return Parts(stock=stock, processor=processor)


def load_config(name: str) -> LlavaConfig:
    name = existing(name, "the LLaVA checkpoint")
    if Path(name).is_dir():
        tree = read_json(Path(name) / "config.json")
        if is_older_layout(tree):
            raise ValueError(
                f"{name} has the layout of TinyLLaVA or LLaVA-1.5 (model_type "
                f"{str(tree.get('model_type'))!r}), not that of transformers; run "
                "`llava-kd convert` on it first"
            )
    config = read_config(name)
    if not isinstance(config, LlavaConfig):
        raise ValueError(f"{name} is a {config.model_type!r} model; a LLaVA checkpoint must be 'llava'")
    return config


def is_older_layout(config: Mapping[str, object]) -> bool:
    """Of TinyLLaVA or LLaVA-1.5's own code, which transformers does not read."""
    return str(config.get("model_type")).startswith("tinyllava") or "mm_vision_tower" in config


def load_processor(name: str) -> LlavaProcessor:
    """Raises ValueError for one that is missing, reads no word, or does not fit the model beside it."""
    with readable("the processor of", name):
        processor = LlavaProcessor.from_pretrained(name)
    if processor.patch_size is None:
        raise ValueError(f"the processor of {name} has no patch_size; add it to processor_config.json")
    check_vocabulary(processor.tokenizer, name)
    check_placeholders(processor, load_config(name), name)
    return processor


def check_placeholders(processor: LlavaProcessor, config: LlavaConfig, name: str) -> None:
    """ValueError where the processor does not write the image token as often as an image has features."""
    height, width = input_size(processor.image_processor)
    features = tokens_per_image(config, (height, width))
    assert processor.patch_size is not None
    patch, strategy = processor.patch_size, processor.vision_feature_select_strategy
    written = (height // patch) * (width // patch) + processor.num_additional_image_tokens
    written -= strategy == "default"
    if written != features:
        wanted = {
            "patch_size": vision_config(config).patch_size,
            "num_additional_image_tokens": num_prefix_tokens(config),
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
        }
        raise ValueError(
            f"the processor of {name} writes {written} image tokens for an image that has {features} "
            f"features; set in processor_config.json {wanted}"
        )
    if processor.image_token_id != config.image_token_id:
        raise ValueError(
            f"the processor of {name} writes the image token {processor.image_token!r} of id "
            f"{processor.image_token_id}, but its model reads images at id {config.image_token_id}; set "
            "image_token_index in config.json, or the tokenizer's image token"
        )


def compose(
    *,
    vision_tower: str,
    language_model: str,
    vision_feature_layer: int = -2,
    vision_feature_select_strategy: Literal["default", "full"] = "full",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    families: Mapping[str, Family] = FAMILIES,
    drops_logit_cap: bool = False,
) -> Parts:
    """A new student: pretrained tower and language model, and a random two-layer GELU projector.

    The tower may be of any of the `families`. The tokenizer gets an image token only if it has none, and the
    embeddings grow only if it has no row. `drops_logit_cap`: as of `load_language_model`.
    """
    loaded = load_tower(
        vision_tower, feature_layer=vision_feature_layer, dtype=dtype, seed=seed, families=families
    )
    causal, tokenizer = load_language_model(language_model, dtype=dtype, drops_logit_cap=drops_logit_cap)
    return compose_loaded(
        loaded,
        causal,
        tokenizer,
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=vision_feature_select_strategy,
        seed=seed,
        dtype=dtype,
    )


def compose_loaded(
    loaded: LoadedTower,
    causal: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vision_feature_layer: int,
    vision_feature_select_strategy: Literal["default", "full"],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Parts:
    """`compose` for parts that are loaded already and whose tokenizer has an image token."""
    tower = loaded.model
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=causal.config,
        image_token_index=tokenizer.get_vocab()[IMAGE_TOKEN],
        vision_feature_layer=_layer_within(tower.config, vision_feature_layer),
        vision_feature_select_strategy=vision_feature_select_strategy,
        projector_hidden_act="gelu",
        tie_word_embeddings=causal.config.tie_word_embeddings,
    )
    config.image_seq_length = tokens_per_image(config, input_size(loaded.image_processor))
    stock = _assemble(config, tower, causal, seed=seed, dtype=dtype)
    return Parts(stock=stock, processor=make_processor(config, tokenizer, loaded.image_processor))


def _layer_within(tower: PreTrainedConfig, layer: int) -> int:
    """The layer; ValueError for one that the tower has not. A tower without a count has checked its own."""
    count = tower.to_dict().get("num_hidden_layers")
    if isinstance(count, int) and not -count - 1 <= layer <= count:
        raise ValueError(
            f"vision_feature_layer of this {tower.model_type!r} tower of {count} layers must be from "
            f"-{count + 1} to -1; got {layer}"
        )
    return layer


def make_processor(
    config: LlavaConfig, tokenizer: PreTrainedTokenizerBase, image_processor: BaseImageProcessor
) -> LlavaProcessor:
    """The stock processor whose placeholder count equals the tower's token count."""
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=vision_config(config).patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=num_prefix_tokens(config),
        chat_template=tokenizer.chat_template,
    )


def _assemble(
    config: LlavaConfig, tower: PreTrainedModel, causal: PreTrainedModel, *, seed: int, dtype: torch.dtype
) -> LlavaForConditionalGeneration:
    """Put pretrained parts into an empty stock model; only the projector is drawn, from `seed`."""
    with torch.device("meta"):
        stock = LlavaForConditionalGeneration(config)
    stock.model.vision_tower = tower
    stock.model.language_model = decoder_of(causal)
    stock.set_output_embeddings(causal.get_output_embeddings())
    projector = stock.model.multi_modal_projector.to_empty(device="cpu").to(dtype)
    generator = torch.Generator().manual_seed(seed)
    std = text_config(config).to_dict().get("initializer_range", 0.02)
    for linear in (projector.linear_1, projector.linear_2):
        nn.init.normal_(linear.weight, std=std, generator=generator)
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
    complete: Callable[[Path], None] | None = None,
) -> None:
    """Write a stock LLaVA directory, complete or not at all; an existing one is replaced at the end.

    `trained` holds weights by their name in an `MLLM`, such as a sharded engine gathers; they replace those
    of `parts`. `dtype` casts what is written; None keeps it. `complete` adds to the directory while it still
    has another name. Raises OSError where it cannot be written.
    """
    directory = Path(directory)
    with replacing_folder(directory) as scratch, writing(directory):
        _write(parts, scratch, trained or {}, dtype)
        if complete is not None:
            complete(scratch)


def _write(parts: Parts, scratch: Path, trained: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    state = _stock_state(parts.stock, trained)
    if dtype is not None:
        state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
    processor = served_processor(parts.processor)
    generation = served_generation(parts.stock.generation_config, processor)
    _save_stock_model(parts.stock, scratch, state, generation)
    processor.save_pretrained(scratch)
    for path in scratch.glob("*config.json"):
        tree = json.loads(path.read_text(encoding="utf-8"))
        _forget_origin(tree)
        if dtype is not None and path.name == "config.json":
            _record_dtype(tree, dtype)
        path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    share(*scratch.glob("*.safetensors"))


def _save_stock_model(
    stock: LlavaForConditionalGeneration,
    scratch: Path,
    state: Mapping[str, Tensor],
    generation: GenerationConfig,
) -> None:
    """Write the model with `generation` in place of its own settings, which transformers may refuse to write.

    Published language models (Vicuna, Llama 2) have a temperature without sampling: it can be read only.
    """
    before = stock.generation_config
    stock.generation_config = generation
    try:
        stock.save_pretrained(scratch, state_dict=dict(state))
    finally:
        stock.generation_config = before


def _stock_state(stock: LlavaForConditionalGeneration, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stock state dictionary with `trained` put in; a tied head is its embedding, which is written once."""
    state = stock.state_dict()
    for name, tensor in trained.items():
        stock_name = name if name.startswith("lm_head.") else f"model.{name}"
        if stock_name not in state:
            raise ValueError(f"the model has no weight {stock_name!r}; it has {sorted(state)[:5]} ...")
        state[stock_name] = tensor
    if stock.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def _record_dtype(config: dict, dtype: torch.dtype) -> None:
    """Say in every part of `config.json` in which type the weights beside it are."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if "dtype" in part:
            part["dtype"] = str(dtype).removeprefix("torch.")


def _forget_origin(tree: object) -> None:
    """Blank the path that a config and its parts were read from: it is one of this machine alone."""
    for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        _forget_origin(value)
    if isinstance(tree, dict):
        tree.update({key: "" for key in ("_name_or_path", "name_or_path") if key in tree})
