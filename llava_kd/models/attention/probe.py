"""Whether a language model reads each record as if it were alone: tried once on a few tokens.

Our rows are padded on the right without a mask and may hold several records. That no token sees a later one
or another record rests on what a model does with arguments that it may drop, and on its having no state of
its own. Both show in its output: a record is read alone, in a padded batch and in a packed row, and compared.

Shape legend: B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llava_kd.batch import IGNORE_INDEX, Inputs
from llava_kd.models.attention import packed as packed_attention

_HALF = (torch.float16, torch.bfloat16)
_LONG, _SHORT = 7, 3
_TOLERANCE, _TOLERANCE_CUDA, _TOLERANCE_HALF = 1e-4, 1e-2, 0.1


def choose_kernel(
    model: PreTrainedModel,
    *,
    device: torch.device,
    dtype: torch.dtype,
    is_packed: bool,
    whose: str = "this run",
) -> str:
    """Let a language model that computes in `dtype` take the best kernel that keeps records apart; its name.

    Raises ValueError if none does: in padded rows, or where `is_packed` in rows of several records.
    """
    packed_attention.leave_out_cudnn(device)
    own = str(model.config._attn_implementation)
    fault = ""
    for kernel in packed_attention.usable(packed_attention.circumstances(model, device=device, dtype=dtype)):
        model.set_attn_implementation(own)
        name = packed_attention.use(model, kernel)
        try:
            fault = _fault(model, device=device, dtype=dtype, is_packed=is_packed)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            fault = f"it cannot be run: {' '.join(str(error).split())}; take another model"
        if not fault:
            return name
    raise ValueError(f"the {model.config.model_type!r} language model of {whose} cannot be used so: {fault}")


def _fault(model: PreTrainedModel, *, device: torch.device, dtype: torch.dtype, is_packed: bool) -> str:
    """What is wrong, and what to do; nothing where nothing is."""
    bound = _TOLERANCE_HALF if dtype in _HALF else _TOLERANCE if device.type == "cpu" else _TOLERANCE_CUDA
    long, short = sample_ids(model, range(_LONG)), sample_ids(model, range(_LONG, _LONG + _SHORT))
    other_end = [*long[:-1], short[0]]

    def read(*rows: Sequence[Sequence[int]]) -> Tensor:
        inputs = rows_of(rows, device)
        embedded_BTD = model.get_input_embeddings()(inputs.input_ids_BT)
        return packed_attention.read_rows(model, inputs, embedded_BTD).float()

    def differ(one_TD: Tensor, other_TD: Tensor) -> bool:
        error_T = (one_TD - other_TD).norm(dim=-1) / other_TD.norm(dim=-1)
        # In half precision an expert more or less may change a single token.
        error = error_T.median() if dtype in _HALF else error_T.max()
        return not float(error) <= bound

    with undisturbed(model, device=device, dtype=dtype):
        alone = read([long])[0], read([short])[0]
        padded_BTD, changed_BTD = read([long], [short]), read([other_end], [short])
        if differ(changed_BTD[0, : _LONG - 1], padded_BTD[0, : _LONG - 1]):
            return "a token's output changes with the tokens after it; take a causal one"
        if differ(padded_BTD[0], alone[0]) or differ(padded_BTD[1, :_SHORT], alone[1]):
            return "a record gives other outputs in a padded batch than alone; take another model"
        if not is_packed:
            return ""
        packed_BTD = read([long, short], [short])
        parts = packed_BTD[0, :_LONG], packed_BTD[0, _LONG:], packed_BTD[1, :_SHORT]
        if any(differ(part, of) for part, of in zip(parts, (*alone, alone[1]), strict=True)):
            return (
                "`data.packing` puts several records into a row, and in this model they change each other's "
                "outputs (through a recurrent state, or a mask that ignores positions); set data.packing to "
                "null"
            )
    return ""


@contextmanager
def undisturbed(model: PreTrainedModel, *, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """To look at what a model computes: without dropout or gradient, and all is as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    devices = [device] if device.type == "cuda" else []
    model.eval()
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=devices),
            torch.autocast(device.type, dtype, enabled=dtype in _HALF, cache_enabled=False),
        ):
            yield
    finally:
        for module in training:
            module.training = True


def sample_ids(model: PreTrainedModel, numbers: range) -> list[int]:
    table = model.get_input_embeddings().weight
    assert isinstance(table, Tensor)
    rows = table.shape[0]
    return [(11 + 37 * number) % rows for number in numbers]


def rows_of(rows: Sequence[Sequence[Sequence[int]]], device: torch.device) -> Inputs:
    """Rows of records of text, by their ids, padded on the right."""
    length = max(sum(map(len, row)) for row in rows)
    ids, positions, segments = [], [], []
    for row in rows:
        padding = length - sum(map(len, row))
        ids.append([i for record in row for i in record] + [0] * padding)
        positions.append([p for record in row for p in range(len(record))] + list(range(padding)))
        numbers = [number for number, record in enumerate(row, start=1) for _ in record]
        segments.append(numbers + [0] * padding)
    ids_BT = torch.tensor(ids)
    return Inputs(
        input_ids_BT=ids_BT,
        labels_BT=torch.full_like(ids_BT, IGNORE_INDEX),
        position_ids_BT=torch.tensor(positions),
        segment_ids_BT=torch.tensor(segments),
        visual_BT=torch.zeros_like(ids_BT, dtype=torch.bool),
        pixels_ICHW=torch.zeros(0, 3, 1, 1),
        image_is_valid_I=torch.zeros(0, dtype=torch.bool),
        is_packed=any(len(row) > 1 for row in rows),
    ).to(device)
