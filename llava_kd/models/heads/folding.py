"""A factor of the logits put into the norm before the head: a stock LLaVA, which knows none, then has it too.

The final norm gives w x (Gemma's (1 + w) x), and a bias where it has one: w f, (1 + w) f - 1 and the bias
times f give f times the same states, whether the head is tied or not. The setting is then 1, so that the
language model alone, and whatever else reads its configuration, says the same as before.

Shape legend: B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from llava_kd.models.heads.scaling import Scaling, scaling_of

# What each setting is where it does nothing.
_NOTHING: Mapping[str, Callable[[PreTrainedConfig], object]] = {
    "logit_scale": lambda config: 1.0,
    "logits_scaling": lambda config: 1.0,
    "lm_head_multiplier": lambda config: 1.0,
    "dim_model_base": lambda config: config.hidden_size,  # MiniCPM3, whose logits_scaling is made of it
    "final_logit_softcapping": lambda config: None,
}
_TOLERANCE = 1e-3  # of the largest state; 16-bit weights are rounded once more


@torch.no_grad()
def fold_scaling(causal: PreTrainedModel, *, drops_cap: bool) -> Scaling:
    """Leave a causal language model nothing to do after its head; what it did.

    The factor moves into the final norm, in place; a cap is dropped where that is asked for. ValueError where
    there is a cap and nobody asked, and where a factor has no place.
    """
    scaling, kind = scaling_of(causal), type(causal).__name__
    if scaling.is_plain:
        return scaling
    if scaling.cap is not None and not drops_cap:
        raise ValueError(
            f"a {kind} caps its logits at {scaling.cap:g}, which stock LLaVA does not support: transformers "
            "would load the student without the cap, whatever it was trained with. To train it without, set "
            "drops_logit_cap next to language_model to true; or take another model"
        )
    text = causal.config.get_text_config()
    settings = text.to_dict()
    for name, nothing in _NOTHING.items():
        if settings.get(name) is not None:
            try:
                setattr(text, name, nothing(text))
            except AttributeError:  # made of another setting
                continue
            for module in (causal, causal.base_model):  # where it was kept when they were made
                if name in module.__dict__:
                    setattr(module, name, nothing(text))
    with torch.device("meta"):
        made = type(causal)(causal.config)
    if not (left := scaling_of(made)).is_plain:
        raise ValueError(
            f"the logits of a {kind} are {scaling}, and no known setting turns that off: after "
            f"{sorted(set(_NOTHING) & set(settings))} they are {left}; take another model"
        )
    if scaling.factor != 1:
        _scale_states(causal, scaling.factor)
    return scaling


def _scale_states(causal: PreTrainedModel, factor: float) -> None:
    decoder = causal.base_model
    norm = _last_module(decoder)
    before_BTD = _states(decoder)
    kept = {name: parameter.detach().clone() for name, parameter in norm.named_parameters()}
    for times in (lambda w: w.mul_(factor), lambda w: w.add_(1).mul_(factor).sub_(1)):
        for name, parameter in norm.named_parameters(recurse=False):
            parameter.copy_(kept[name])
            times(parameter.data) if name == "weight" else parameter.data.mul_(factor)
        difference = (_states(decoder) - factor * before_BTD).abs().max()
        if kept and float(difference) <= _tolerance(causal) * factor * float(before_BTD.abs().max()):
            return
    raise ValueError(
        f"the logits of a {type(causal).__name__} are multiplied by {factor:g}, which stock LLaVA does not "
        f"support, and its last module, a {type(norm).__name__}, cannot take the factor; take another model"
    )


def _tolerance(causal: PreTrainedModel) -> float:
    return _TOLERANCE if causal.dtype == torch.float32 else 20 * _TOLERANCE


def _last_module(decoder: nn.Module) -> nn.Module:
    """The child that gives the final states."""
    gave: list[tuple[nn.Module, object]] = []
    handles = [
        child.register_forward_hook(lambda module, _, output: gave.append((module, output)))
        for child in decoder.children()
    ]
    try:
        final = decoder(input_ids=_ids(decoder), use_cache=False).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    return next((module for module, output in reversed(gave) if output is final), decoder)


def _states(decoder: nn.Module) -> Tensor:
    return decoder(input_ids=_ids(decoder), use_cache=False).last_hidden_state.float()


def _ids(decoder: nn.Module) -> Tensor:
    return torch.tensor([[1, 2, 3, 5, 8]], device=next(decoder.parameters()).device)
