"""Any image-text-to-text model as a teacher uses it: its own inputs in, final hidden states and head out.

Shape legend: B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llava_kd.batch import Inputs
from llava_kd.models.foreign.loading import head_of
from llava_kd.models.heads.scaling import says_of_logits, scaling_of
from llava_kd.models.mllm import Prediction


class ForeignModel:
    """The model below the head, so that logits are never formed. Not a Module: no student's tree holds it."""

    def __init__(self, stock: PreTrainedModel) -> None:
        self.stock = stock.eval().requires_grad_(False)
        self.head = head_of(stock)
        self.scaling = scaling_of(stock)

    @property
    def cap(self) -> float | None:
        """Of its logits."""
        return self.scaling.cap

    @property
    def decoder(self) -> nn.Module:
        """Its language model. ValueError for one without `layers`, as none of those tried is."""
        decoder = self.stock.get_decoder()
        if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
            raise ValueError(
                f"the language model of a {type(self.stock).__name__} has no list of layers that could be "
                "placed separately; set teacher.placement to replicated and teacher.quantize to null"
            )
        return decoder

    @property
    def layers(self) -> nn.ModuleList:
        layers = self.decoder.layers
        assert isinstance(layers, nn.ModuleList)
        return layers

    def __call__(self, inputs: Inputs) -> Prediction:
        """ValueError for inputs that another processor than the model's own has made."""
        if inputs.own is None:
            raise ValueError(
                f"a {type(self.stock).__name__} needs the inputs that its own processor makes of a record; "
                "these inputs were made for a LLaVA"
            )
        hidden_BTD = self.hidden(
            inputs.input_ids_BT, (inputs.segment_ids_BT > 0).to(inputs.input_ids_BT.dtype), inputs.own
        )
        return Prediction(
            hidden_BTD=hidden_BTD,
            projected_IND=hidden_BTD.new_zeros(0, 1, hidden_BTD.shape[2]),
            head_VD=self.head.weight,
            bias_V=self.scaling.bias(self.head.bias),
            cap=self.cap,
        )

    def hidden(self, input_ids_BT: Tensor, attention_mask_BT: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        """Final states that the head reads, [B, T, D], times what its logits are multiplied by."""
        dtype = self.stock.dtype
        own = {name: t.to(dtype) if t.is_floating_point() else t for name, t in own.items()}
        output = self.stock.base_model(
            input_ids=input_ids_BT, attention_mask=attention_mask_BT, use_cache=False, return_dict=True, **own
        )
        states_BTD = output.last_hidden_state
        return states_BTD if self.scaling.factor == 1.0 else states_BTD * self.scaling.factor


@torch.no_grad()
def refuse_other_logits(model: ForeignModel) -> None:
    """ValueError where the model's own logits are other than its states, head, factor and cap make them.

    A few tokens are read once; what goes into the head and what comes out at the end is compared.
    """
    stock = model.stock
    vocabulary = model.head.weight.shape[0]
    ids_BT = torch.tensor([[number % vocabulary for number in (1, 2, 3, 5, 8)]], device=stock.device)
    mask_BT = torch.ones_like(ids_BT)
    theirs_BTV = stock(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits.float()
    states_BTD = model.hidden(ids_BT, mask_BT, {})
    bias_V = model.scaling.bias(model.head.bias)
    ours_BTV = nn.functional.linear(states_BTD, model.head.weight, bias_V).float()
    if model.cap is not None:
        ours_BTV = model.cap * torch.tanh(ours_BTV / model.cap)
    largest = float((ours_BTV - theirs_BTV).abs().max())
    bound = (1e-4 if stock.dtype == torch.float32 else 0.05) * max(1.0, float(theirs_BTV.abs().max()))
    if not largest <= bound:
        raise ValueError(
            f"a {type(stock).__name__} computes logits from more than its final states and its head, which "
            f"are all that the losses read: logits differ by {largest:.3g}; look at {says_of_logits(stock)}. "
            "Take another teacher"
        )
