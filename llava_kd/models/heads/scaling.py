"""What a model's own `forward` does to its logits beside the head: a factor, a cap.

With h the decoder's final states, W the head and b its bias,

    logits = c tanh(z / c),  z = (f h) W^T + f_after b

of which a family has the factor (Cohere `logit_scale`, Granite `logits_scaling`, MiniCPM3 before the head),
the cap (Gemma 2 to 4 `final_logit_softcapping`, arXiv 2408.00118), or neither. One class applies a setting
that another passes over: Gemma3ForCausalLM caps, Gemma3ForConditionalGeneration does not, and a LLaVA does
neither, whatever the configuration of its language model says. So it is not read from there: the class's own
`forward` is run with known numbers in the place of what decoder and head would give. No weight is read; a
model without memory will do.

Shape legend: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

_TOKENS = 3
_HUGE = 1e8  # a logit that no cap lets through
_TOLERANCE = 1e-5  # of the largest: what fp32 leaves of known numbers
SETTINGS = ("softcap", "logit", "multiplier")  # in the names of what may do more


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """`before` multiplies what the head reads, `after` what it gives; then comes the cap, if any."""

    before: float = 1.0
    after: float = 1.0
    cap: float | None = None

    @property
    def factor(self) -> float:
        """Of a head without a bias."""
        return self.before * self.after

    def bias(self, bias_V: Tensor | None) -> Tensor | None:
        """A head's bias, as it stands in logits."""
        return bias_V if bias_V is None or self.after == 1 else bias_V * self.after

    def __str__(self) -> str:
        done = [] if self.factor == 1 else [f"multiplied by {self.factor:.6g}"]
        return (
            " and ".join([*done, *([] if self.cap is None else [f"capped at {self.cap:g}"])]) or "as they are"
        )

    @property
    def is_plain(self) -> bool:
        return self == Scaling()


class _Said(BaseModelOutputWithPast):
    """What a decoder gives; of all that is not there, None."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def scaling_of(stock: PreTrainedModel) -> Scaling:
    """Of a model with a linear head. ValueError where it does more to logits than a factor and a cap do."""
    return _Probe(stock).scaling()


def says_of_logits(stock: PreTrainedModel) -> dict[str, object]:
    """Settings of its language model that may do something to logits, for a message."""
    text = stock.config.get_text_config().to_dict()
    return {k: v for k, v in text.items() if any(word in k for word in SETTINGS) and v is not None}


class _Probe:
    def __init__(self, stock: PreTrainedModel) -> None:
        self._stock = stock
        head = stock.get_output_embeddings()
        if not isinstance(head, nn.Linear) or stock.base_model is stock:
            raise ValueError(f"a {type(stock).__name__} must have a linear head over a decoder; got {head}")
        self._head = head
        self._read: list[Tensor] = []

    def scaling(self) -> Scaling:
        width = self._head.out_features
        alternating_V = torch.ones(width, dtype=torch.float64)
        alternating_V[1::2] = -1
        slope_V = self._through(alternating_V) * alternating_V
        most_V = self._through(alternating_V * _HUGE) * alternating_V
        one, most = float(slope_V[0]), float(most_V[0])
        before = self._before()
        if not one > 0 or not most > 0:
            raise self._refusal("they have another sign")
        if abs(most / (one * _HUGE) - 1) < 1e-3:
            found = Scaling(before=before, after=_exact(one))
        else:
            cap = _exact(most)
            after = _exact(float(torch.atanh(torch.tensor(one / cap, dtype=torch.float64))) * cap)
            found = Scaling(before=before, after=after, cap=cap)
        reach = 100.0 if found.cap is None else 3 * found.cap / found.after
        ramp_V = torch.linspace(-reach, reach, width, dtype=torch.float64)
        expected_V = ramp_V * found.after
        if found.cap is not None:
            expected_V = found.cap * torch.tanh(expected_V / found.cap)
        difference = float((self._through(ramp_V) - expected_V).abs().max())
        if not difference <= _TOLERANCE * float(expected_V.abs().max()):
            raise self._refusal(f"{found} they would be others by {difference:.3g}")
        return found

    def _before(self) -> float:
        """What the decoder's states were multiplied by, before the head read them."""
        given_TD, read_TD = self._states()[0], self._read[-1].double().reshape(-1, self._head.in_features)
        ratio_TD = read_TD / given_TD[-len(read_TD) :]
        ratio = float(ratio_TD.mean())
        if not float((ratio_TD - ratio).abs().max()) <= _TOLERANCE * abs(ratio):
            raise self._refusal("its head reads something other than its final states")
        return _exact(ratio)

    def _states(self) -> Tensor:
        return torch.linspace(1, 2, _TOKENS * self._head.in_features, dtype=torch.float64).view(
            1, _TOKENS, -1
        )

    @torch.no_grad()
    def _through(self, logits_V: Tensor) -> Tensor:
        """[V]: what comes out where the head gives these."""
        states_BTD = self._states()

        def decode(*_: object, **__: object) -> _Said:
            return _Said(last_hidden_state=states_BTD)

        def say(read: Tensor) -> Tensor:
            self._read.append(read)
            return logits_V.expand(*read.shape[:-1], -1).clone()

        with ExitStack() as held:
            held.enter_context(_instead(self._stock.base_model, decode))
            held.enter_context(_instead(self._head, say))
            ids_BT = torch.ones(1, _TOKENS, dtype=torch.long)
            given = {"input_ids": ids_BT, "attention_mask": ids_BT, "use_cache": False, "return_dict": True}
            try:
                said = self._stock.forward(**given).logits
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise self._refusal(f"it cannot be tried ({' '.join(str(error).split())})") from error
        if not isinstance(said, Tensor) or said.shape[-1] != len(logits_V):
            raise self._refusal(f"it has {None if said is None else list(said.shape)} of them")
        return said.double().reshape(-1, len(logits_V))[-1]

    def _refusal(self, why: str) -> ValueError:
        return ValueError(
            f"a {type(self._stock).__name__} does more to its logits than a factor and a cap, which is all "
            f"that the losses read: {why}; look at {says_of_logits(self._stock)}. Take another model"
        )


def _exact(value: float) -> float:
    """The number that was meant, where fp32 has rounded it."""
    nearest = float(f"{value:.6g}")
    return nearest if abs(nearest / value - 1) < 3e-7 else value


@contextmanager
def _instead(module: nn.Module, forward: object) -> Iterator[None]:
    """Another forward, for a while."""
    own = module.__dict__.get("forward", inspect.Parameter.empty)
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is inspect.Parameter.empty:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own
