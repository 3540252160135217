"""What a teacher says of the labels: enumeration, the chunked form, and the largest logits alone.

Shape legend: N rows, V vocabulary, D width, K kept columns.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from llava_kd.losses.kernels import gemm
from llava_kd.losses.label import label_rows, label_rows_by_chunk, top_k_label_rows
from llava_kd.losses.reference_top_k import TopK

N, V, D, COMMON = 23, 60, 8, 50


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    hidden_ND, head_VD = (torch.randn(n, D, generator=generator).to(dtype) for n in (N, V))
    bias_V = torch.randn(V, generator=generator).to(dtype)
    logits_NV = hidden_ND.double() @ head_VD.double().T + bias_V.double()
    labels_N = torch.randint(COMMON, (N,), generator=generator)
    labels_N[::3] = logits_NV[::3, :COMMON].argmax(1)  # right at every third
    labels_N[1], labels_N[2] = COMMON + 3, -100
    return {"hidden_ND": hidden_ND, "head_VD": head_VD, "labels_N": labels_N, "bias_V": bias_V}


@pytest.mark.parametrize("chunk_rows", [None, 1, 7, N])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_forms_are_what_counting_gives(dtype: torch.dtype, chunk_rows: int | None) -> None:
    given = inputs(dtype)
    logits = (given["hidden_ND"].double() @ given["head_VD"].double().T + given["bias_V"].double()).tolist()
    plain = label_rows(**given, num_common=COMMON)
    chunked = label_rows_by_chunk(**given, num_common=COMMON, chunk_rows=chunk_rows)
    for n, label in enumerate(given["labels_N"].tolist()):
        row = logits[n][:COMMON]
        is_common = 0 <= label < COMMON
        probability = math.exp(row[label]) / sum(map(math.exp, row)) if is_common else 0.0
        for found in (plain, chunked):
            assert float(found.probability_N[n]) == pytest.approx(probability, rel=1e-4, abs=1e-12)
            assert bool(found.is_first_N[n]) == (is_common and row[label] == max(row))
            before = sum(other > row[label] for other in row) if is_common else COMMON
            assert int(found.before_N[n]) == before
    assert 8 <= int(plain.is_first_N.sum()) < N
    assert (chunked.probability_N.dtype, chunked.is_first_N.dtype) == (torch.float32, torch.bool)


def test_no_row_gives_no_row() -> None:
    given = {name: t[:0] if name[-1] == "N" or name == "hidden_ND" else t for name, t in inputs().items()}
    for form in (label_rows, label_rows_by_chunk):
        found = form(**given, num_common=COMMON)
        assert found.probability_N.shape == found.is_first_N.shape == (0,)


def test_equal_largest_logits_are_both_first_and_what_is_no_number_is_seen() -> None:
    given = inputs()
    given["hidden_ND"][4] = 0
    given["bias_V"] = torch.zeros(V)
    given["hidden_ND"][5] = math.nan
    for form in (label_rows, label_rows_by_chunk):
        found = form(**given, num_common=COMMON)
        assert bool(found.is_first_N[4])
        assert bool(found.is_first_N[5])
        assert bool(found.probability_N[5].isnan())


@pytest.mark.parametrize("kept", [1, 4, COMMON - 1])
def test_the_largest_logits_are_exact_where_they_hold_the_label(kept: int) -> None:
    given = inputs()
    exact = label_rows(**given, num_common=COMMON)
    logits_NV = (given["hidden_ND"] @ given["head_VD"].T + given["bias_V"])[:, :COMMON]
    top = logits_NV.topk(kept, dim=1)
    rest_N = logits_NV.scatter(1, top.indices, -torch.inf).logsumexp(1)
    found = top_k_label_rows(
        TopK(logits_NK=top.values, columns_NK=top.indices.int(), rest_N=rest_N), given["labels_N"]
    )
    assert torch.equal(found.is_first_N, exact.is_first_N), "the first choice is always kept"
    is_kept_N = (top.indices == given["labels_N"].unsqueeze(1)).any(1)
    assert is_kept_N.any()
    assert torch.equal(found.before_N, torch.where(is_kept_N, exact.before_N, kept))
    expected_N = torch.where(is_kept_N, exact.probability_N, 0.0)
    torch.testing.assert_close(found.probability_N, expected_N, rtol=1e-5, atol=1e-7)


def test_chunks_are_as_large_as_they_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    write = gemm.write_logits
    monkeypatch.setattr(gemm, "write_logits", lambda h, w, out: (seen.append(len(h)), write(h, w, out)))
    label_rows_by_chunk(**inputs(), chunk_rows=10)
    assert seen == [10, 10, 3]
