"""How the visual tokens of an image attend to each other, shown by chosen decoder layers beside their output.

All layers keep their kernel. A watched one computes in addition, for the rows of the visual tokens alone, the
weights that eager attention would: softmax over every earlier token of the record, then the columns of the
same image, averaged over heads. Only queries and keys are kept for the backward.

Shape legend: B rows, T tokens, H heads, G key heads, K head width, L layers, I images, N tokens of an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel

from llava_kd.batch import Inputs
from llava_kd.models.attention.packed import read_rows
from llava_kd.models.attention.probe import rows_of, sample_ids, undisturbed

_SETTING = "objective.attention"
_TOKENS, _IMAGE = 7, slice(2, 6)
_TOLERANCE, _TOLERANCE_HALF = 1e-3, 0.05


def middle_layers(num_layers: int, first: float, last: float, *, setting: str = _SETTING) -> range:
    """Layers from the share `first` of the depth to below the share `last`. ValueError if there is none.

    `setting`, here and below: of the term that asks, for messages.
    """
    layers = range(math.ceil(first * num_layers - 1e-9), math.ceil(last * num_layers - 1e-9))
    if not layers:
        raise ValueError(
            f"no layer of {num_layers} lies between {first:g} and {last:g} of the depth; widen the range "
            f"with {setting}.first and last"
        )
    return layers


def watchable(language_model: nn.Module, *, setting: str = _SETTING) -> None:
    """Register the model's kernel again under its name, with a look at queries and keys.

    To be called after the kernel was chosen. Raises ValueError for a model without one of the registered.
    """
    assert isinstance(language_model, PreTrainedModel)
    name, kernels = language_model.config._attn_implementation, AttentionInterface()
    if name is None or name not in kernels:
        raise ValueError(
            f"`{setting}` reads attention maps next to a registered kernel such as sdpa; this "
            f"{language_model.config.model_type!r} model uses {name!r}: take another model or drop the term"
        )
    if not isinstance(kernels[name], _Watched):
        AttentionInterface.register(name, _Watched(kernels[name]))


def check_maps(
    language_model: PreTrainedModel, layers: range, dtype: torch.dtype, *, setting: str = _SETTING
) -> None:
    """ValueError where the maps are not those of the model's own eager attention, tried once on a few tokens.

    Such a model adds something of its own to what its queries and keys give. `dtype`: what it computes in.
    """
    kind, kernel = language_model.config.model_type, language_model.config._attn_implementation
    assert kernel is not None
    table = language_model.get_input_embeddings().weight
    assert isinstance(table, Tensor)
    device = table.device
    inputs = rows_of([[sample_ids(language_model, range(_TOKENS))]], device)
    visual_BT = torch.zeros_like(inputs.visual_BT)
    visual_BT[:, _IMAGE] = True
    image = {"visual_BT": visual_BT, "image_is_valid_I": torch.ones(1, dtype=torch.bool, device=device)}
    inputs = replace(inputs, pixels_ICHW=inputs.pixels_ICHW.new_zeros(1, 3, 1, 1), **image)
    maps = VisualMaps(layers, inputs)
    with undisturbed(language_model, device=device, dtype=dtype):
        embedded_BTD = language_model.get_input_embeddings()(inputs.input_ids_BT)
        read_rows(language_model, inputs, embedded_BTD, visual_maps=[maps])
        maps_LINN = maps.take()
        language_model.set_attn_implementation("eager")
        try:
            output = language_model(inputs_embeds=embedded_BTD, use_cache=False, output_attentions=True)
        finally:
            language_model.set_attn_implementation(kernel)
    attentions = output.attentions or ()
    if len(attentions) <= layers[-1] or any(attentions[layer] is None for layer in layers):
        raise ValueError(
            f"`{setting}` cannot be checked: this {kind!r} model does not show its own attention; "
            "take another model or drop the term"
        )
    eager_LNN = torch.stack([attentions[layer][0].float().mean(0)[_IMAGE, _IMAGE] for layer in layers])
    difference = float((maps_LINN[:, 0] - eager_LNN).abs().max())
    if not difference <= (_TOLERANCE if dtype == torch.float32 else _TOLERANCE_HALF):
        raise ValueError(
            f"`{setting}` would read other maps than this {kind!r} model attends by: it adds "
            f"something of its own to its queries and keys (off by {difference:.2g}); take another model or "
            "drop the term"
        )


class Watcher(Protocol):
    """Is shown queries and keys of a layer, with the scale of their products and the sliding window."""

    def see(
        self,
        layer: int,
        query_BHTK: Tensor,
        key_BGTK: Tensor,
        scaling: float | None,
        window: int | None,
        /,
    ) -> None: ...


class _Watched:
    """A kernel that shows its queries and keys to each of `visual_maps`, where a forward has some."""

    def __init__(self, kernel: Callable[..., tuple[Tensor, Tensor | None]]) -> None:
        self._kernel = kernel

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        *rest: Any,
        visual_maps: Sequence[Watcher] | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        for watcher in visual_maps or ():
            assert isinstance(module.layer_idx, int)
            scaling, window = options.get("scaling"), options.get("sliding_window")
            watcher.see(module.layer_idx, query, key, scaling, window)
        return self._kernel(module, query, key, *rest, **options)


class VisualMaps:
    """Takes the maps of `layers` in one forward; handed to the language model by a keyword."""

    def __init__(self, layers: Sequence[int], inputs: Inputs) -> None:
        self._layers = layers
        self._maps: dict[int, Tensor] | None = {}
        self._places: list[tuple[Tensor, Tensor]] = []
        self._segments_BT = inputs.segment_ids_BT
        if inputs.num_images:
            flat_IN = inputs.places.visual_N.view(inputs.num_images, -1)
            length = inputs.input_ids_BT.shape[1]
            # Rows stay on the device: as numbers the host would wait for them.
            self._places = list(
                zip((flat_IN[:, :1] // length).unbind(), (flat_IN % length).unbind(), strict=True)
            )

    def see(
        self, layer: int, query_BHTK: Tensor, key_BGTK: Tensor, scaling: float | None, window: int | None
    ) -> None:
        """Activation checkpointing calls this a second time: what it then computes is not kept."""
        if layer not in self._layers:
            return
        scaling = query_BHTK.shape[-1] ** -0.5 if scaling is None else scaling
        maps = []
        for row_1, place_N in self._places:
            segments_T, query_HTK, key_GTK = (
                tensor.index_select(0, row_1)[0] for tensor in (self._segments_BT, query_BHTK, key_BGTK)
            )
            wanted = (
                query_HTK[:, place_N],
                key_GTK,
                tokens_seen(segments_T, place_N, window),
                place_N,
                scaling,
            )
            maps.append(checkpoint(_map, *wanted, use_reentrant=False, preserve_rng_state=False))
        if self._maps is not None and layer not in self._maps:
            empty_INN = query_BHTK.new_zeros(0, 1, 1, dtype=torch.float32)
            self._maps[layer] = torch.stack(maps) if maps else empty_INN

    def take(self) -> Tensor:
        """[L, I, N, N], once. Raises ValueError if the model did not pass the keyword down to its layers."""
        maps, self._maps = self._maps, None
        if maps is None or sorted(maps) != sorted(self._layers):
            raise ValueError(
                "`objective.attention` needs the attention of this language model, but its layers "
                f"{sorted(set(self._layers) - set(maps or ()))} report none; drop the term"
            )
        return torch.stack([maps[layer] for layer in sorted(maps)])


def tokens_seen(segments_T: Tensor, place_N: Tensor, window: int | None) -> Tensor:
    """[N, T]: which tokens a query at each place sees; those before it in its record, within the window."""
    distance_NT = place_N.unsqueeze(1) - torch.arange(len(segments_T), device=place_N.device)
    seen_NT = (distance_NT >= 0) & (segments_T == segments_T[place_N].unsqueeze(1))
    return seen_NT if window is None else seen_NT & (distance_NT < window)


def _map(query_HNK: Tensor, key_GTK: Tensor, seen_NT: Tensor, place_N: Tensor, scaling: float) -> Tensor:
    """[N, N] of one image, fp32."""
    return attention_of(query_HNK, key_GTK, seen_NT, scaling)[..., place_N].mean(0)


def attention_of(query_HNK: Tensor, key_GTK: Tensor, seen_NT: Tensor, scaling: float) -> Tensor:
    """[H, N, T] of some queries of a row, fp32."""
    grouped_GXNK = query_HNK.unflatten(0, (key_GTK.shape[0], -1))
    scores_HNT = (grouped_GXNK @ key_GTK.to(query_HNK.dtype).unsqueeze(1).mT).flatten(0, 1).float() * scaling
    return scores_HNT.masked_fill(~seen_NT, -torch.inf).softmax(-1)
