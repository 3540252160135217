"""Image-text-to-text models of transformers that are no LLaVA: read with their own processors, for a teacher.

Shape legend: V vocabulary, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from llava_kd.models.files.checkpoint import Parts, is_older_layout
from llava_kd.models.foreign.grids import foreign_grid
from llava_kd.models.reading import (
    check_vocabulary,
    existing,
    read_config,
    read_json,
    read_pretrained,
    readable,
)
from llava_kd.models.towers.visual_grid import VisualGrid

_WHAT = "the teacher"
# Their answers see what follows them, so a whole talk in one pass would show each token the next.
_SEES_AHEAD = {
    "paligemma": "its prompt, and every answer in it, is attended to in both directions",
    "colpali": "it embeds documents",
}


@dataclass(frozen=True, kw_only=True)
class ForeignParts:
    """Such a model and its own processor."""

    stock: PreTrainedModel
    processor: ProcessorMixin
    name: str

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return tokenizer_in(self.processor)

    @property
    def head(self) -> nn.Linear:
        return head_of(self.stock)

    @cached_property
    def grid(self) -> VisualGrid | None:
        """Of the visual tokens of every picture; None where it is not known, or not always the same."""
        return foreign_grid(self.stock.config, self.processor)

    @property
    def visual_grid(self) -> VisualGrid:
        """ValueError where it is not known."""
        if self.grid is None:
            raise ValueError(
                f"{type(self.stock).__name__} makes visual tokens of its own, in an unknown grid"
            )
        return self.grid


AnyParts = Parts | ForeignParts


def as_llava(teacher: AnyParts, what: str) -> Parts:
    """ValueError, which names `what` needs one, for a teacher that is no LLaVA."""
    if isinstance(teacher, ForeignParts):
        raise ValueError(
            f"{what} needs a LLaVA as teacher; {teacher.name} is a {type(teacher.stock).__name__}"
        )
    return teacher


def is_foreign(name: str) -> bool:
    """Whether a directory or hub id is a model of transformers that is no LLaVA. ValueError for no model."""
    existing(name, _WHAT)
    if Path(name).is_dir() and is_older_layout(read_json(Path(name) / "config.json")):
        return False  # whoever reads it as a LLaVA says how it becomes one
    return not isinstance(read_config(name), LlavaConfig)


def foreign_config(name: str) -> PreTrainedConfig:
    """ValueError for a model that reads no pictures with its text, or whose answers see ahead."""
    config = read_config(existing(name, _WHAT))
    kind = config.model_type
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ValueError(
            f"{name} is a {kind!r} model; a teacher must be a LLaVA checkpoint ('llava') or another "
            "image-text-to-text model of transformers"
        )
    if kind in _SEES_AHEAD:
        raise ValueError(
            f"{name} is a {kind!r} model, which cannot be a teacher here: {_SEES_AHEAD[kind]}; take another "
            "teacher"
        )
    return config


def load_foreign(name: str, *, dtype: torch.dtype = torch.float32) -> ForeignParts:
    """ValueError where weights or processor are missing, or the logits are more than a linear head's."""
    foreign_config(name)
    processor = load_foreign_processor(name)
    stock = read_pretrained(AutoModelForImageTextToText, name, dtype)
    parts = ForeignParts(stock=stock.eval(), processor=processor, name=name)
    _ = parts.head
    return parts


def load_foreign_processor(name: str) -> ProcessorMixin:
    with readable("the processor of", name):
        processor = AutoProcessor.from_pretrained(name)
    if not isinstance(processor, ProcessorMixin) or getattr(processor, "image_processor", None) is None:
        raise ValueError(
            f"{name} comes without a processor of pictures and text ({type(processor).__name__} alone); put "
            "its processor_config.json or preprocessor_config.json into its directory"
        )
    check_vocabulary(tokenizer_in(processor), name)
    return processor


def foreign_without_weights(name: str) -> PreTrainedModel:
    """Its modules, on the device `meta`."""
    config = foreign_config(name)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def load_foreign_head(name: str, head_VD: Tensor, bias_V: Tensor | None) -> ForeignParts:
    """The model with this head; every other weight is without memory. ValueError for another shape."""
    stock = foreign_without_weights(name)
    own = head_of(stock)
    if own.weight.shape != head_VD.shape:
        raise ValueError(
            f"the head must have the shape of {name}'s, {list(own.weight.shape)}; got {list(head_VD.shape)}"
        )
    head = nn.Linear(head_VD.shape[1], head_VD.shape[0], bias=bias_V is not None, device="meta")
    head.weight = nn.Parameter(head_VD, requires_grad=False)
    if bias_V is not None:
        head.bias = nn.Parameter(bias_V, requires_grad=False)
    stock.set_output_embeddings(head)
    return ForeignParts(stock=stock, processor=load_foreign_processor(name), name=name)


def tokenizer_in(processor: ProcessorMixin) -> PreTrainedTokenizerFast:
    return cast(PreTrainedTokenizerFast, getattr(processor, "tokenizer", None))


def head_of(stock: PreTrainedModel) -> nn.Linear:
    """ValueError for a model without a linear head of its own."""
    head = stock.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"a teacher must have a linear head; a {type(stock).__name__} has {type(head).__name__}"
        )
    return head
