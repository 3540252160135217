"""Attention of rows that hold several records, without a mask as large as the row squared.

transformers looks for packed records in the positions, which waits for the device, and makes a [T, T] mask of
them, which no fast kernel takes. The kernels here are told where the records begin (`Places`) and compute
nothing between them. Called by anything but `MLLM`, such as generation, they are the stock `sdpa`.

Shape legend: B rows, T tokens, H heads, G heads of keys and values, K width of a head, S tokens of a record,
N tokens of all rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.import_utils import is_flash_attn_2_available

from llava_kd.batch import Inputs, Places

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None
try:
    from torch.nn.attention.varlen import _select_backend  # heeds leave_out_cudnn
except ImportError:
    _select_backend = None
try:
    from torch.nn.attention.varlen import _should_use_cudnn
except ImportError:
    _should_use_cudnn = None

FLASH = "flash_attention_2"
VARLEN = "llava_kd_varlen"
BY_RECORD = "llava_kd_by_record"
MASKED_SDPA = "sdpa"
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """What the choice of a kernel depends on: device, computing type, model, and what is installed."""

    device_type: str
    compute_capability: int
    dtype: torch.dtype
    head_width: int
    attention_dropout: float
    takes_any_kernel: bool
    takes_flash: bool
    has_flash: bool
    has_varlen: bool

    @property
    def suits_flash(self) -> bool:
        """What the fast kernels ask of the device and the numbers."""
        is_recent = self.device_type == "cuda" and self.compute_capability >= 8
        return is_recent and self.dtype in _HALF and self.head_width % 8 == 0 and self.head_width <= 256


class _Options(TypedDict, total=False):
    """What language models pass to their attention, as far as it matters here."""

    scaling: float | None
    sliding_window: int | None
    dropout: float
    softcap: float | None
    s_aux: Tensor | None
    position_bias: Tensor | None


_NOT_HERE = ("softcap", "s_aux", "position_bias")


# The first whose condition holds is taken. Around FLASH transformers reads the positions at each forward, for
# which the host waits; VARLEN is the same kernel and waits for nothing.
KERNELS: dict[str, Callable[[Circumstances], bool]] = {
    VARLEN: lambda c: c.has_varlen and c.takes_any_kernel and c.suits_flash and not c.attention_dropout,
    FLASH: lambda c: c.has_flash and c.takes_flash and c.suits_flash,
    BY_RECORD: lambda c: c.takes_any_kernel,
    MASKED_SDPA: lambda c: True,
}


def circumstances(model: PreTrainedModel, *, device: torch.device, dtype: torch.dtype) -> Circumstances:
    """Of a language model that computes in `dtype` on `device`, with what is installed here."""
    text = model.config.get_text_config()
    settings = text.to_dict()
    layers = set(settings.get("layer_types") or ["full_attention"])
    is_plain = (
        layers <= {"full_attention", "sliding_attention"} and model.config._attn_implementation == MASKED_SDPA
    )
    # Some types have other names for these, which the config knows as attributes alone.
    width = settings.get("head_dim") or text.hidden_size // text.num_attention_heads
    capability = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    return Circumstances(
        device_type=device.type,
        compute_capability=capability,
        dtype=dtype,
        head_width=width,
        attention_dropout=settings.get("attention_dropout") or 0.0,
        takes_any_kernel=model._supports_attention_backend and model._supports_flash_attn and is_plain,
        takes_flash=model._supports_flash_attn and is_plain,
        has_flash=is_flash_attn_2_available(),
        has_varlen=varlen_attn is not None
        and {"scale", "window_size"} <= _parameters(varlen_attn)
        and not _insists_on_cudnn(device),
    )


def leave_out_cudnn(device: torch.device) -> None:
    """Keep PyTorch from cuDNN's attention, in the whole process, where the device is a GPU.

    Since torch 2.11 it is the first choice on a Hopper. It builds a plan for every new shape, which may take
    a second, and keeps them all; rows are of other lengths in every batch, and in every token of an answer.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def _insists_on_cudnn(device: torch.device) -> bool:
    """Whether this PyTorch's kernel for records of varying lengths takes cuDNN though it was left out."""
    if device.type != "cuda" or _select_backend is not None or _should_use_cudnn is None:
        return False
    return _should_use_cudnn(device.index or 0)


def usable(found: Circumstances) -> list[str]:
    """Names of the kernels for packed rows, the best first; `MASKED_SDPA` is always among them."""
    return [name for name, is_usable in KERNELS.items() if is_usable(found)]


def choose(found: Circumstances) -> str:
    """Name of the best kernel for packed rows."""
    return usable(found)[0]


def use(model: PreTrainedModel, kernel: str) -> str:
    """Let a language model compute its attention by `kernel`; what it then does. `MASKED_SDPA`: as it did."""
    if kernel != MASKED_SDPA:
        for name, function in ((VARLEN, _varlen), (BY_RECORD, _by_record)):
            if name not in AttentionInterface():
                AttentionInterface.register(name, function)
                AttentionMaskInterface.register(name, sdpa_mask)
        model.set_attn_implementation(kernel)
    return str(model.config._attn_implementation)


def arguments(model: PreTrainedModel, inputs: Inputs) -> dict[str, object]:
    """What the model's forward takes so that each record sees itself alone, beside positions that restart."""
    kernel = model.config._attn_implementation
    places = inputs.places
    if kernel in (VARLEN, BY_RECORD):
        if not inputs.is_packed:
            num_rows, num_tokens = inputs.input_ids_BT.shape
            places = replace(places, lengths=(num_tokens,) * num_rows)  # right padding is seen by no record
        # A mask of four dimensions is handed on as it is: none is made, and nothing is looked for. This one
        # has no value: a model that reads it, or drops `records` on the way to its kernel, fails.
        unread_1100 = torch.empty((1, 1, 0, 0), dtype=torch.bool, device=places.boundaries_N.device)
        return {"attention_mask": unread_1100, "records": places}
    # A single row without boundaries would be taken for a packed one, and looked at in every layer.
    if kernel != FLASH or (not inputs.is_packed and inputs.input_ids_BT.shape[0] > 1):
        return {"attention_mask": None}
    longest = max(places.lengths)
    return {
        "attention_mask": None,
        "cu_seq_lens_q": places.boundaries_N,
        "cu_seq_lens_k": places.boundaries_N,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def read_rows(model: PreTrainedModel, inputs: Inputs, embedded_BTD: Tensor, **watching: object) -> Tensor:
    """[B, T, D] final hidden states of rows in which no token sees a later one, or another record."""
    position_ids_BT = None
    if inputs.is_packed:
        # Padding has no positions: they might be more than the model has, or than its RoPE is made for.
        position_ids_BT = inputs.position_ids_BT * (inputs.segment_ids_BT > 0)
    return model(
        inputs_embeds=embedded_BTD,
        position_ids=position_ids_BT,
        use_cache=False,
        **arguments(model, inputs),
        **watching,
    ).last_hidden_state


def _by_record(
    module: nn.Module,
    query_BHTK: Tensor,
    key_BGTK: Tensor,
    value_BGTK: Tensor,
    attention_mask: Tensor | None,
    *,
    records: Places | None = None,
    **options: Unpack[_Options],
) -> tuple[Tensor, None]:
    """One call of PyTorch's attention for each record, on any device and in any type."""
    rows = (query_BHTK, key_BGTK, value_BGTK)
    if records is None:
        if attention_mask is not None and attention_mask.numel() == 0:
            raise ValueError(
                f"{type(module).__name__} did not get the bounds of the records: this language model does "
                "not pass them on to its attention"
            )
        return sdpa_attention_forward(module, *rows, attention_mask, **options)
    scaling, window, dropout = _taken(options)
    num_rows, _, num_tokens, _ = query_BHTK.shape
    if len(records.lengths) == num_rows and (window is None or num_tokens <= window):
        return sdpa_attention_forward(module, *rows, None, dropout=dropout, scaling=scaling, is_causal=True)
    outputs = []
    for query_SHK, key_SGK, value_SGK in zip(*(_flat(t).split(records.lengths) for t in rows), strict=True):
        mask_SS = None
        if window is not None and len(query_SHK) > window:
            mask_SS = _window_mask(len(query_SHK), window, query_SHK.device)
        output_1HSK = scaled_dot_product_attention(
            *(t.transpose(0, 1)[None] for t in (query_SHK, key_SGK, value_SGK)),
            attn_mask=mask_SS,
            dropout_p=dropout,
            is_causal=mask_SS is None,
            scale=scaling,
            enable_gqa=query_SHK.shape[1] != key_SGK.shape[1],
        )
        outputs.append(output_1HSK[0].transpose(0, 1))
    return torch.cat(outputs).unflatten(0, (num_rows, num_tokens)), None


def _varlen(
    module: nn.Module,
    query_BHTK: Tensor,
    key_BGTK: Tensor,
    value_BGTK: Tensor,
    attention_mask: Tensor | None,
    *,
    records: Places | None = None,
    **options: Unpack[_Options],
) -> tuple[Tensor, None]:
    """One call of PyTorch's kernel for records of varying lengths; rows of one record go by `_by_record`."""
    rows = (query_BHTK, key_BGTK, value_BGTK)
    if records is None or len(records.lengths) == query_BHTK.shape[0]:
        return _by_record(module, *rows, attention_mask, records=records, **options)
    scaling, window, _ = _taken(options)
    assert varlen_attn is not None
    dtype = _computing_dtype(value_BGTK)  # rotary positions may have widened queries and keys
    query_NHK, key_NGK, value_NGK = (_flat(tensor).to(dtype) for tensor in rows)
    extra = {}
    if (groups := query_NHK.shape[1] // key_NGK.shape[1]) > 1:
        if "enable_gqa" in _parameters(varlen_attn):
            extra["enable_gqa"] = True
        else:
            key_NGK, value_NGK = (t.repeat_interleave(groups, dim=1) for t in (key_NGK, value_NGK))
    longest = max(records.lengths)
    output_NHK = varlen_attn(
        query_NHK, key_NGK, value_NGK, records.boundaries_N, records.boundaries_N, longest, longest,
        scale=scaling, window_size=(-1 if window is None else window - 1, 0), **extra,
    )  # fmt: skip
    assert isinstance(output_NHK, Tensor)
    return output_NHK.unflatten(0, (query_BHTK.shape[0], query_BHTK.shape[2])), None


def _taken(options: _Options) -> tuple[float | None, int | None, float]:
    """Scaling, sliding window and dropout. ValueError for what would be left out in silence."""
    if left_out := [name for name in _NOT_HERE if options.get(name) is not None]:
        raise ValueError(
            f"the attention of this language model needs {left_out}, which this kernel does not support"
        )
    return options.get("scaling"), options.get("sliding_window"), options.get("dropout", 0.0)


def _flat(tensor_BHTK: Tensor) -> Tensor:
    """[N, H, K]"""
    return tensor_BHTK.transpose(1, 2).flatten(0, 1)


def _computing_dtype(tensor: Tensor) -> torch.dtype:
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """[S, S]: each token sees itself and the `window - 1` before it."""
    places = torch.arange(length, device=device)
    distance = places[:, None] - places[None]
    return (distance >= 0) & (distance < window)


def _parameters(function: Callable) -> set[str]:
    return set(inspect.signature(function).parameters)
