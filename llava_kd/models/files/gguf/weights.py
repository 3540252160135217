"""Weights of a stock directory, read one at a time: a model is never in memory as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import LlavaConfig

from llava_kd.models.lora import is_adapter
from llava_kd.models.projectors.kinds import llava_class
from llava_kd.models.reading import readable


class StockWeights:
    """The weights of a LLaVA directory by the names below, whichever version of transformers wrote them.

    `language_model.layers.0...`, `vision_tower.encoder...`, `multi_modal_projector...`, `lm_head.weight`.
    Every weight that the configuration asks for is there, in its shape: ValueError otherwise.
    """

    def __init__(self, directory: Path, config: LlavaConfig) -> None:
        self._places = _places(directory)
        self.shapes = _wanted(config)
        for name, shape in self.shapes.items():
            if name not in self._places:
                raise ValueError(
                    f"{directory} has no weight {name}, which its config.json asks for; export a whole model"
                )
            found = self._shape(name)
            if found != shape:
                raise ValueError(
                    f"{name} of {directory} must be of shape {shape}, by config.json; it is {found}"
                )
        spare = {"lm_head.weight"} if config.tie_word_embeddings else set()
        unknown = [n for n in self._places if n not in self.shapes and n not in spare and not _is_spare(n)]
        if unknown:
            raise ValueError(
                f"{directory} has the weight {unknown[0]} ({len(unknown)} such), which its config.json does "
                "not know; export a model as training or `llava-kd convert` wrote it"
            )

    def __getitem__(self, name: str) -> Tensor:
        path, stored = self._places[name]
        with safe_open(path, framework="pt") as stream:  # opened anew: what was read before is unmapped
            return stream.get_tensor(stored)

    def dtype(self) -> torch.dtype:
        """Of the projector, which every student has trained."""
        return self["multi_modal_projector.linear_1.weight"].dtype

    def _shape(self, name: str) -> tuple[int, ...]:
        path, stored = self._places[name]
        with safe_open(path, framework="pt") as stream:
            return tuple(stream.get_slice(stored).get_shape())


def _places(directory: Path) -> Mapping[str, tuple[Path, str]]:
    paths = sorted(directory.glob("model*.safetensors"))
    if not paths:
        raise ValueError(
            f"{directory} has no model*.safetensors; write the model again with `llava-kd export --format hf`"
        )
    places = {}
    for path in paths:
        with readable("the weights of", str(path)), safe_open(path, framework="pt") as stream:
            names = list(stream.keys())
        for stored in names:
            if is_adapter(stored) or ".base_layer." in stored:
                raise ValueError(
                    f"{path} holds adapters beside the weights ({stored}); merge them first: the model/ that "
                    "a run writes is merged"
                )
            places[canonical(stored)] = (path, stored)
    return places


def canonical(name: str) -> str:
    """A weight's name without what versions of transformers, and an export of ours, put before its part."""
    name = name.removeprefix("model.")
    for longer, part in (
        ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", "language_model."),
        ("vision_tower.vision_model.", "vision_tower."),
    ):
        if name.startswith(longer):
            return part + name.removeprefix(longer)
    return name


def _wanted(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model of this configuration; a tied head is its embedding, and not listed."""
    with torch.device("meta"):
        model = llava_class(config)(config)
    wanted = {canonical(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    return {name: shape for name, shape in wanted.items() if not _is_spare(name)}


def _is_spare(name: str) -> bool:
    """SigLIP's pooling head, which no token of a LLaVA passes, and a buffer of older versions."""
    return name.startswith("vision_tower.head.") or name.endswith("position_ids")
