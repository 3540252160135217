"""What a server said of a record, checked token by token, as rows of a cache of the largest logits.

A log-probability is its logit less the log of the row's sum: one number for the whole row. A softmax does not
see what is added to a whole row, so every loss between probabilities has the same value and gradient from
log-probabilities as from logits, as long as `rest` has been moved by the same number. It has: it is the log
of 1 less the probabilities kept.

Shape legend: M places with a stored prediction, K stored columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from llava_kd.data.text.encoder import Encoded

_TOLERATED = 1e-3  # of a sum of probabilities, above 1: servers compute in float32, models in bfloat16
_LEAST_REST = 1e-9  # below what float32 log-probabilities can tell


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The record as it is read here, and what is to be kept of it: the `k` largest of `columns`."""

    encoded: Encoded
    positions_M: Tensor
    k: int
    columns: int
    tokenizer: PreTrainedTokenizerFast
    image_token_id: int


def rows(answer: Mapping[str, object], wanted: Wanted) -> dict[str, Tensor]:
    """Tensors of the record, named as in `TeacherRows`. ValueError for whatever does not fit."""
    ids, said = _lists(answer)
    places = wanted.positions_M.tolist()
    last = max(places, default=-1) + 1
    # What follows changes nothing in a causal model: so may what the template writes after the last answer,
    # and what was cut off here.
    refuse_other_tokens(
        wanted.encoded.ids[: last + 1].tolist(), ids[: last + 1], wanted.tokenizer, wanted.image_token_id
    )
    if len(said) != len(ids):
        raise ValueError(
            f"gave {len(said)} prompt_logprobs for {len(ids)} prompt_token_ids: they cannot be aligned"
        )
    found = [_largest(said[place + 1], ids[place + 1], place + 1, wanted) for place in places]
    top_MK = torch.tensor([values for _, values in found], dtype=torch.float64).reshape(-1, wanted.k)
    columns_MK = torch.tensor([columns for columns, _ in found], dtype=torch.int32).reshape(-1, wanted.k)
    return {
        "top_logits_MK": top_MK.float(),
        "top_columns_MK": columns_MK,
        "rest_M": rest(top_MK, wanted.columns).float(),
    }


def rest(top_MK: Tensor, columns: int) -> Tensor:
    """Log of what the others' probabilities sum to, [M].

    1 less the sum of what was kept; and never more than all the others as likely as the least one kept,
    which tells more where the rounding of what was kept hides the difference.
    """
    sum_M = top_MK.logsumexp(1).clamp_max(math.log1p(-_LEAST_REST))
    at_most_M = top_MK.amin(1) + math.log(columns - top_MK.shape[1])
    return torch.minimum((-sum_M.expm1()).log(), at_most_M)


def _lists(answer: Mapping[str, object]) -> tuple[list, list]:
    ids, said = answer.get("prompt_token_ids"), answer.get("prompt_logprobs")
    if not isinstance(said, list):
        raise ValueError(
            "gave no prompt_logprobs: use a server that returns the log-probabilities of a prompt, such "
            "as vLLM"
        )
    if not isinstance(ids, list):
        raise ValueError(
            "gave no prompt_token_ids, which are needed to check the tokens: use a server with "
            "return_token_ids, such as vLLM 0.10.2 or newer"
        )
    return ids, said


def refuse_other_tokens(
    here: Sequence[int], there: Sequence[object], tokenizer: PreTrainedTokenizerFast, image_token_id: int
) -> None:
    """ValueError where a server read other tokens `there` than are read here: which is the first."""
    if list(here) == list(there):
        return
    at = next((i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), None)
    at = min(len(here), len(there)) if at is None else at
    shown = ["nothing" if at >= len(side) else _shown(side[at], tokenizer) for side in (there, here)]
    ours, its = (list(side).count(image_token_id) for side in (here, there))
    images = ""
    if ours != its and ours > 0:
        images = f" (up to there the server has {its} image tokens; {ours} are expected)"
    raise ValueError(f"read other tokens: token {at} is {shown[0]} on the server and {shown[1]} here{images}")


def _shown(token: object, tokenizer: PreTrainedTokenizerFast) -> str:
    if not isinstance(token, int):
        return repr(token)[:40]
    return f"{tokenizer.convert_ids_to_tokens(token)!r} (id {token})"


def _largest(said: object, own: int, place: int, wanted: Wanted) -> tuple[list[int], list[float]]:
    """Columns and log-probabilities of one place, the largest first; `own` is the prompt's token there."""
    if not isinstance(said, dict) or not said:
        raise ValueError(f"gave no log-probabilities at token {place}")
    try:
        found = [(int(token), float(of["logprob"]), _rank(of)) for token, of in said.items()]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"gave log-probabilities at token {place} that are not in vLLM's format") from None
    if not all(math.isfinite(value) for _, value, _ in found):
        raise ValueError(f"gave a log-probability at token {place} that is not a finite number")
    if own not in [token for token, *_ in found]:
        raise ValueError(
            f"gave log-probabilities at token {place} without the prompt's own token: they cannot be aligned"
        )
    # The token of the prompt comes along, however unlikely it is.
    found = sorted(found, key=lambda entry: (-entry[1], entry[2] or 0, entry[0]))[: wanted.k]
    given = sum(rank is None or rank <= wanted.k for *_, rank in found)
    if given < wanted.k:
        raise ValueError(
            f"gave {given} log-probabilities at token {place} instead of {wanted.k}: start the server with "
            f"--max-logprobs {wanted.k}"
        )
    if max(token for token, *_ in found) >= wanted.columns:
        raise ValueError(
            f"gave token {max(token for token, *_ in found)} among the {wanted.k} most likely at token "
            f"{place}, but the last token of the tokenizer here is {wanted.columns - 1}: use the tokenizer "
            "of the served model, or a smaller --topk"
        )
    total = sum(math.exp(min(value, 1.0)) for _, value, _ in found)
    if total > 1 + _TOLERATED:
        raise ValueError(
            f"gave values at token {place} that are not log-probabilities (the probabilities sum to "
            f"{total:.3g}): start the server with --logprobs-mode raw_logprobs"
        )
    return [token for token, *_ in found], [value for _, value, _ in found]


def _rank(of: Mapping[str, object]) -> int | None:
    rank = of.get("rank")
    return rank if isinstance(rank, int) else None
