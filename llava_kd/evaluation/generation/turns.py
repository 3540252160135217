"""Conversations that are answered turn by turn, without reading again what was read.

Shape legend: B rows answered together, T columns of the cache, L tokens of a row so far, R tokens that every
row reads anew, N new tokens, V visual tokens of a row, D width of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llava_kd.evaluation.generation.generate import Generator


class Turns:
    """A conversation a row; what the model has read of them stays in its cache from one answer to the next.

    The cache is left-padded without a gap, as that of a prompt that is read whole: every row reads the same
    number of last tokens anew, and keeps what it has of those before them. A model with a layer that does not
    keep every token (a sliding window, a state) reads its prompts whole.
    """

    def __init__(self, generator: Generator, pixels: Sequence[Tensor]) -> None:
        """`pixels`: of each conversation, its images [images, C, H, W] in the order of their places."""
        self._generator = generator
        self._features = _features(generator, pixels)
        self._cache: DynamicCache = generator.new_cache()
        self._keeps = all(type(layer) is DynamicLayer for layer in self._cache.layers)
        self._place: dict[int, int] = {}  # row of the cache that holds a conversation
        self._read = [torch.zeros(0, dtype=torch.long) for _ in pixels]
        self._first = [0] * len(pixels)  # its first column

    @torch.no_grad()
    def written(
        self, which: Sequence[int], prompts: Sequence[tuple[Tensor, Tensor]], names: Sequence[str]
    ) -> Tensor:
        """Answers ids_BN, as `Generator.written`, of the conversations `which`; the others are forgotten.

        Of each all tokens so far [L], and which of them are an image's; `names` decide what is drawn.
        """
        lengths_B = torch.tensor([len(ids_L) for ids_L, _ in prompts])
        known_B = torch.tensor([self._known(k, ids_L) for k, (ids_L, _) in zip(which, prompts, strict=True)])
        num_read = max(1, int((lengths_B - known_B).max()))
        kept_B = (lengths_B - num_read).clamp_min(0)
        num_kept = int(kept_B.max())
        self._move(which, kept_B, num_kept)
        total = num_kept + num_read
        mask_BT = (torch.arange(total).unsqueeze(0) >= (total - lengths_B).unsqueeze(1)).long()
        ids_BR = torch.nn.utils.rnn.pad_sequence(
            [ids_L[-num_read:] for ids_L, _ in prompts], batch_first=True, padding_side="left"
        )
        given = {"inputs_embeds": self._embedded(which, prompts, ids_BR)}
        ids_BN = self._generator.continued(given, mask_BT, self._cache, names)
        for k, (ids_L, _), new_N in zip(which, prompts, ids_BN.cpu(), strict=True):
            # The last token was chosen and not read. What fills a row up behind its end was read.
            self._read[k] = torch.cat([ids_L, new_N[:-1]])
            self._first[k] = total - len(ids_L)
        return ids_BN

    def _known(self, k: int, ids_L: Tensor) -> int:
        """How many tokens a conversation begins with as they were read."""
        if not self._keeps or k not in self._place:
            return 0
        length = min(len(self._read[k]), len(ids_L))
        differs_L = (self._read[k][:length] != ids_L[:length]).nonzero()
        return int(differs_L[0]) if len(differs_L) else length

    def _move(self, which: Sequence[int], kept_B: Tensor, num_kept: int) -> None:
        """Leave in the cache the first `kept_B` tokens of these conversations, right-aligned."""
        place_B = torch.tensor([self._place.get(k, 0) for k in which])
        first_B = torch.tensor([self._first[k] for k in which])
        self._place = {k: row for row, k in enumerate(which)}
        if num_kept == 0:
            self._cache = self._generator.new_cache()
            return
        column_BT = (first_B + kept_B - num_kept).unsqueeze(1) + torch.arange(num_kept)
        device = self._generator.model.device
        place_B1, column_BT = place_B.unsqueeze(1).to(device), column_BT.clamp_min(0).to(device)
        for layer in cast(list[DynamicLayer], self._cache.layers):
            if layer.keys is None or layer.values is None:  # one that shares another's
                continue
            layer.keys = layer.keys.transpose(1, 2)[place_B1, column_BT].transpose(1, 2)
            layer.values = layer.values.transpose(1, 2)[place_B1, column_BT].transpose(1, 2)

    def _embedded(
        self, which: Sequence[int], prompts: Sequence[tuple[Tensor, Tensor]], ids_BR: Tensor
    ) -> Tensor:
        """Of the tokens that are read anew: what the images are projected to in their places."""
        model, num_read = self._generator.model, ids_BR.shape[1]
        embedded_BRD = model.get_input_embeddings()(ids_BR.to(model.device))
        for row_RD, k, (_, visual_L) in zip(embedded_BRD, which, prompts, strict=True):
            places_R = visual_L[-num_read:].nonzero().squeeze(1)
            if len(places_R) > 0:
                before = int(visual_L[:-num_read].sum())
                shown_VD = self._features[k][before : before + len(places_R)]
                places_R = places_R + num_read - len(visual_L[-num_read:])
                row_RD[places_R.to(model.device)] = shown_VD.to(row_RD.dtype)
        return embedded_BRD


@torch.no_grad()
def _features(generator: Generator, pixels: Sequence[Tensor]) -> list[Tensor]:
    """Of each conversation its visual tokens [V, D] as the language model reads them: the tower runs once."""
    model, numbers = generator.model, [len(pixels_ICHW) for pixels_ICHW in pixels]
    if sum(numbers) == 0:
        return [torch.zeros(0, 0)] * len(pixels)
    pixels_ICHW = torch.cat(list(pixels)).to(model.device, model.dtype)
    shown = cast(BaseModelOutputWithPooling, model.get_image_features(pixel_values=pixels_ICHW))
    features_IND = torch.stack(list(cast(Sequence[Tensor], shown.pooler_output)))
    return [row_IND.flatten(0, 1) for row_IND in features_IND.split(numbers)]
