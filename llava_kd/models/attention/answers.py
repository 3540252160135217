"""How much the text of a record, its answers or its questions, attends to each visual token of its images.

Beside each watched layer, for the places alone at which a response token is predicted, or for those of
all text that is no answer (the template's too; what stands before an image sees none of it): the weights
that eager attention would give, softmax over every earlier token of the record, of which those of the
image's columns are averaged over heads and summed over the places. Nothing is kept for a backward: teachers
show it.

Shape legend: B rows, T tokens, H heads, G key heads, K head width, I images, P such places of a record
(fewer are filled up), N tokens of an image, Q places of a part of P.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from llava_kd.batch import Inputs
from llava_kd.models.attention.visual import attention_of, tokens_seen

LookedAtBy = Literal["answers", "questions"]
_PLACES_AT_A_TIME = 128  # [heads, places, tokens] in fp32: 50 MB for 32 heads and 3,000 tokens


class AnswerAttention:
    """Takes it from `layers` in one forward; handed to the language model by a keyword."""

    def __init__(self, layers: Sequence[int], inputs: Inputs, by: LookedAtBy = "answers") -> None:
        self._layers = layers
        self._segments_BT = inputs.segment_ids_BT
        self._found: dict[int, Tensor] = {}
        self._num_images = inputs.num_images
        if inputs.num_images:
            places, length = inputs.places, inputs.input_ids_BT.shape[1]
            if by == "answers":
                index_IP, self._is_there_IP = inputs.answers_of_images()
                place_IP = places.response_N[index_IP]
            else:
                place_IP, self._is_there_IP = inputs.questions_of_images()
            visual_IN = places.visual_N.view(inputs.num_images, -1)
            # Rows stay on the device: as numbers the host would wait for them.
            self._rows_I1 = visual_IN[:, :1] // length
            self._visual_IN = visual_IN % length
            self._text_IP = place_IP % length

    @torch.no_grad()
    def see(
        self, layer: int, query_BHTK: Tensor, key_BGTK: Tensor, scaling: float | None, window: int | None
    ) -> None:
        """The first look at a layer counts."""
        if layer not in self._layers or layer in self._found:
            return
        if self._num_images == 0:
            self._found[layer] = query_BHTK.new_zeros(0, 1, dtype=torch.float32)
            return
        scale = query_BHTK.shape[-1] ** -0.5 if scaling is None else scaling
        images = zip(self._rows_I1, self._visual_IN, self._text_IP, self._is_there_IP, strict=True)
        found = []
        for row_1, visual_N, text_P, is_there_P in images:
            segments_T, query_HTK, key_GTK = (
                tensor.index_select(0, row_1)[0] for tensor in (self._segments_BT, query_BHTK, key_BGTK)
            )
            total_N = torch.zeros(len(visual_N), device=query_BHTK.device)
            parts = zip(text_P.split(_PLACES_AT_A_TIME), is_there_P.split(_PLACES_AT_A_TIME), strict=True)
            for place_Q, is_there_Q in parts if len(text_P) else ():
                seen_QT = tokens_seen(segments_T, place_Q, window)
                weights_HQT = attention_of(query_HTK[:, place_Q], key_GTK, seen_QT, scale)
                total_N = total_N + (weights_HQT[..., visual_N].mean(0) * is_there_Q.unsqueeze(1)).sum(0)
            found.append(total_N)
        self._found[layer] = torch.stack(found)

    def take(self) -> Tensor:
        """[I, N], a mean over the layers. ValueError if the model did not pass the keyword down to them."""
        if sorted(self._found) != sorted(self._layers):
            raise ValueError(
                "`objective.visual_kl.share` needs the attention of this language model, but its layers "
                f"{sorted(set(self._layers) - set(self._found))} report none; set share to 1 and weighed to "
                "false"
            )
        return torch.stack([self._found[layer] for layer in self._layers]).mean(0)
