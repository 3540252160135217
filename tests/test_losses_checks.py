"""What the losses refuse, word by word and edge by edge; and which rows a chunk of the head loss reads.

Shape legend: N rows, V student vocabulary, U teacher vocabulary, D student width, E teacher width, I images.
"""

from __future__ import annotations

import math
import re
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from llava_kd.losses import checks
from llava_kd.losses.divergence import (
    KINDS,
    Divergence,
    Temperature,
    check_temperature,
    deviation,
    lacking,
    softened,
    squared,
    tail_share,
)
from llava_kd.losses.kernels import row_torch
from llava_kd.losses.kernels import rows as chunking
from llava_kd.losses.kernels.capping import cap_, through_cap_
from llava_kd.losses.kernels.rows import HeadRows, chunk_size

N, V, U, D, E = 5, 7, 9, 3, 4
ROWS = "must have an entry for each of the 5 student rows; got"


def refused(message: str) -> AbstractContextManager[object]:
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape)


def head(**changes: Any) -> int:
    told: dict[str, Any] = {
        "ce_weight_N": zeros(N),
        "student_bias_V": zeros(V),
        "teacher_NE": zeros(N, E),
        "teacher_head_UE": zeros(U, E),
        "teacher_bias_U": zeros(U),
        "kl_weight_N": zeros(N),
        "temperature": 1.0,
        "num_common": 6,
        "student_ND": zeros(N, D),
        "student_head_VD": zeros(V, D),
        "targets_N": zeros(N),
    } | changes
    places = [told.pop(name) for name in ("student_ND", "student_head_VD", "targets_N")]
    return checks.check_head_inputs(*places, **told)


NO_TEACHER = {"teacher_NE": None, "teacher_head_UE": None, "kl_weight_N": None}
ALONE = NO_TEACHER | {"teacher_bias_U": None, "num_common": None}
TOGETHER = "teacher_NE, teacher_head_UE and kl_weight_N go together; give all three or none"
NEED = "teacher_bias_U and num_common need a teacher; give teacher_NE, or leave them out"
WIDTH = "rows [N, width] and head [vocabulary, width] must agree in width; got"
FINITE = "temperature must be positive and finite; got"
CAP = "the cap of a head's logits must be positive and finite; got"


def test_the_common_columns_of_a_head_loss_that_may_be() -> None:
    assert head() == 6
    assert head(num_common=1) == 1
    assert head(num_common=7) == 7
    assert head(**ALONE) == 0
    assert head(**ALONE, student_bias_V=None) == 0
    assert head(teacher_head_UE=zeros(V, E), teacher_bias_U=None, num_common=None) == 7
    assert head(teacher_head_UE=zeros(2, E), teacher_bias_U=zeros(2), num_common=2) == 2
    assert head(student_cap=0.5, teacher_cap=30.0, temperature="std") == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (NO_TEACHER | {"num_common": None}, NEED),
        (NO_TEACHER | {"teacher_bias_U": None}, NEED),
        ({"teacher_NE": None}, TOGETHER),
        ({"teacher_head_UE": None}, TOGETHER),
        ({"kl_weight_N": None}, TOGETHER),
        (NO_TEACHER | {"teacher_NE": zeros(N, E)}, TOGETHER),
        (NO_TEACHER | {"teacher_head_UE": zeros(U, E)}, TOGETHER),
        (NO_TEACHER | {"kl_weight_N": zeros(N)}, TOGETHER),
        ({"teacher_NE": zeros(N + 1, E)}, "student and teacher must have the same rows; got 5 and 6"),
        (
            {"num_common": None},
            "student and teacher heads have 7 and 9 rows; pass num_common, the number of leading columns "
            "that mean the same token in both",
        ),
        ({"num_common": 0}, "num_common must lie in 1..7; got 0"),
        ({"num_common": 8}, "num_common must lie in 1..7; got 8"),
        (
            {"teacher_head_UE": zeros(6, E), "teacher_bias_U": None, "num_common": 7},
            "num_common must lie in 1..6; got 7",
        ),
        ({"student_cap": 0.0}, f"{CAP} 0.0"),
        ({"teacher_cap": -1.0}, f"{CAP} -1.0"),
        ({"teacher_cap": math.inf}, f"{CAP} inf"),
        ({"temperature": 0.0}, f"{FINITE} 0.0"),
        ({"temperature": math.inf}, f"{FINITE} inf"),
        ({"temperature": "Std"}, "temperature must be a number or 'std'; got 'Std'"),
        ({"student_ND": zeros(N, 2)}, f"student {WIDTH} [5, 2] and [7, 3]"),
        ({"student_ND": zeros(N, D, 1)}, f"student {WIDTH} [5, 3, 1] and [7, 3]"),
        ({"student_head_VD": zeros(V, D, 1)}, f"student {WIDTH} [5, 3] and [7, 3, 1]"),
        ({"teacher_head_UE": zeros(U, 5)}, f"teacher {WIDTH} [5, 4] and [9, 5]"),
        ({"student_bias_V": zeros(6)}, "student bias must have an entry per head row, 7; got [6]"),
        ({"teacher_bias_U": zeros(U, 1)}, "teacher bias must have an entry per head row, 9; got [9, 1]"),
        ({"targets_N": zeros(4)}, f"targets_N {ROWS} [4]"),
        ({"ce_weight_N": zeros(N, 1)}, f"ce_weight_N {ROWS} [5, 1]"),
        ({"kl_weight_N": zeros(6)}, f"kl_weight_N {ROWS} [6]"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, str) else None,
)
def test_a_head_loss_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with refused(message):
        head(**changes)


def test_targets_matter_where_they_have_a_weight() -> None:
    weight_N = torch.tensor([1.0, 0.0, 0.5])
    checks.check_targets(torch.tensor([0, -100, 6]), weight_N, V)
    for targets, row, what in (
        ([0, 9, -1], 2, "-1 with weight 0.5"),
        ([0, 9, 7], 2, "7 with weight 0.5"),
        ([8, 9, 7], 0, "8 with weight 1.0"),
    ):
        with refused(f"targets must lie in 0..6 where ce_weight_N is not zero; row {row} has {what}"):
            checks.check_targets(torch.tensor(targets), weight_N, V)


def test_kept_logits_fit_rows_and_columns() -> None:
    def top(k: int, common: int, **changes: Any) -> None:
        told = {"logits_NK": zeros(N, k), "columns_NK": zeros(N, k), "rest_N": zeros(N)} | changes
        checks.check_top_k(zeros(N, D), zeros(V, D), **told, num_common=common)

    top(1, 2)
    top(5, 6)
    top(6, 7)
    for common in (0, 8):
        with refused(f"num_common must lie in 1..7; got {common}"):
            top(1, common)
    for k, common, changes, got in (
        (6, 6, {}, "[5, 6], [5, 6] and [5]"),
        (0, 6, {}, "[5, 0], [5, 0] and [5]"),
        (1, 1, {}, "[5, 1], [5, 1] and [5]"),
        (2, 6, {"columns_NK": zeros(N, 3)}, "[5, 2], [5, 3] and [5]"),
        (2, 6, {"rest_N": zeros(4)}, "[5, 2], [5, 2] and [4]"),
        (2, 6, {"logits_NK": zeros(4, 2)}, "[4, 2], [5, 2] and [5]"),
        (2, 6, {"logits_NK": zeros(N)}, "[5], [5, 2] and [5]"),
    ):
        with refused(
            f"top k: logits and columns must be [5, k] with k in 1..{common - 1}, and the rest [5]; got {got}"
        ):
            top(k, common, **changes)


def test_kept_logits_serve_their_temperature_and_divergence() -> None:
    checks.check_softening_of_top_k(2.0, Divergence("reverse"), None, N)
    checks.check_softening_of_top_k("std", Divergence("jsd"), zeros(N), N)
    with refused(
        "the divergence 'adaptive' needs all of a teacher's columns, of which the largest logits hide the "
        "tail; choose another divergence, or give the teacher's hidden states"
    ):
        checks.check_softening_of_top_k(1.0, Divergence("adaptive"), None, N)
    with refused(f"{FINITE} 0.0"):
        checks.check_softening_of_top_k(0.0, Divergence(), None, N)
    cases: list[tuple[Temperature, torch.Tensor | None, str]] = [
        (2.0, zeros(N), "2.0 and some"),
        ("std", None, "'std' and none"),
    ]
    for temperature, std_N, has in cases:
        with refused(
            "top k: standard deviations of the teacher's logits are given at temperature 'std' and at no "
            f"other; got temperature {has}"
        ):
            checks.check_softening_of_top_k(temperature, Divergence(), std_N, N)
    with refused(f"std_N {ROWS} [4]"):
        checks.check_softening_of_top_k("std", Divergence(), zeros(4), N)


def test_relations_compare_the_same_tokens_of_the_same_images() -> None:
    student, teacher, heads = zeros(2, 3, D), zeros(2, 3, E), (zeros(V, D), zeros(U, E))
    checks.check_relation_inputs(student, teacher, *heads)
    checks.check_relation_inputs(student, teacher, None, None)
    same = (
        "a relation compares the same tokens of the same images: [images, tokens, width] must agree in the "
        "first two sizes; got student"
    )
    for ours, theirs in ((zeros(2, 4, D), teacher), (student, zeros(3, 3, E)), (zeros(2, 3), teacher)):
        with refused(f"{same} {list(ours.shape)}, teacher {list(theirs.shape)}"):
            checks.check_relation_inputs(ours, theirs, None, None)
    with refused(f"{same} [2, 3, 3], teacher [2, 3]"):
        checks.check_relation_inputs(student, zeros(2, 3), None, None)
    for pair in ((heads[0], None), (None, heads[1])):
        with refused("give both heads to compare logits, or neither to compare the features themselves"):
            checks.check_relation_inputs(student, teacher, *pair)
    for pair, said in (
        ((zeros(V, 2), heads[1]), "student features and head must agree in width; got [2, 3, 3] and [7, 2]"),
        ((heads[0], zeros(U, 3)), "teacher features and head must agree in width; got [2, 3, 4] and [9, 3]"),
        ((zeros(3), heads[1]), "student features and head must agree in width; got [2, 3, 3] and [3]"),
    ):
        with refused(said):
            checks.check_relation_inputs(student, teacher, *pair)


def test_dbild_compares_pairs_of_common_columns() -> None:
    def dbild(**changes: Any) -> int:
        told: dict[str, Any] = {"temperature": 1.0, "candidates": 4, "num_common": None} | changes
        rows_N = told.pop("rows", N)
        sides = told.pop("sides", (zeros(N, D), zeros(V, D), zeros(rows_N, E), zeros(U, E)))
        return checks.check_dbild_inputs(*sides, **told)

    assert dbild() == 7
    assert dbild(num_common=2, caps=(1.0, 2.0)) == 2
    assert dbild(num_common=7, temperature=0.1) == 7
    for changes, message in (
        ({"num_common": 1}, "num_common must lie in 2..7; got 1"),
        ({"num_common": 8}, "num_common must lie in 2..7; got 8"),
        ({"candidates": 3}, "candidates must be at least 4, for pairs to compare; got 3"),
        ({"temperature": 0.0}, f"{FINITE} 0.0"),
        ({"temperature": math.inf}, f"{FINITE} inf"),
        ({"rows": 4}, "student and teacher must have the same rows; got 5 and 4"),
        ({"caps": (0.0, None)}, f"{CAP} 0.0"),
        ({"caps": (None, math.nan)}, f"{CAP} nan"),
        (
            {"sides": (zeros(N, 2), zeros(V, D), zeros(N, E), zeros(U, E))},
            f"student {WIDTH} [5, 2] and [7, 3]",
        ),
        (
            {"sides": (zeros(N, D), zeros(V, D), zeros(N, E), zeros(U, 3))},
            f"teacher {WIDTH} [5, 4] and [9, 3]",
        ),
    ):
        with refused(message):
            dbild(**changes)


def test_attention_maps_agree_in_all_but_their_layers() -> None:
    checks.check_attention_inputs(zeros(1, 2, 2, 2), zeros(3, 2, 2, 2))
    checks.check_attention_inputs(zeros(1, 0, 1, 1), zeros(1, 0, 1, 1))
    agree = "attention maps [layers, images, tokens, tokens] must agree in all but the layers; "
    square = "attention maps must be square and have at least one layer on each side; "
    few = "attention between the tokens of an image needs at least 2 of them; "
    for said, ours, theirs in (
        (agree, (1, 2, 2, 2), (1, 3, 2, 2)),
        (agree, (2, 2, 2), (1, 2, 2)),
        (square, (1, 2, 2, 3), (1, 2, 2, 3)),
        (square, (0, 2, 2, 2), (1, 2, 2, 2)),
        (square, (1, 2, 2, 2), (0, 2, 2, 2)),
        (few, (1, 1, 1, 1), (1, 1, 1, 1)),
    ):
        with refused(f"{said}got student {list(ours)}, teacher {list(theirs)}"):
            checks.check_attention_inputs(zeros(*ours), zeros(*theirs))


# Divergences and temperatures ----


def test_a_divergence_is_one_of_the_list_with_a_mix_between_the_ends() -> None:
    for kind in KINDS:
        assert Divergence(kind, 0.01).mix == 0.01
    with refused(f"divergence must be one of {list(KINDS)}; got 'Forward'"):
        Divergence("Forward")  # pyright: ignore[reportArgumentType]
    for mix in (0.0, 1.0, -1.0, 1.5):
        with refused(
            f"mix must lie strictly between 0 and 1; got {mix}. At the ends, `forward` and `reverse`"
        ):
            Divergence("jsd", mix)
    assert str(lacking(Divergence("jsd"))) == "this form of the losses lacks the divergence 'jsd'; add it"


def test_temperatures_divide_and_their_square_multiplies() -> None:
    check_temperature(1e-3)
    check_temperature("std")
    assert (squared(3.0), squared("std"), squared(1)) == (9.0, 1.0, 1.0)
    logits = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])
    assert torch.equal(softened(logits, 4.0), logits / 4)
    want = (logits[:1] - 3) / math.sqrt((4 + 1 + 9) / 2)
    torch.testing.assert_close(softened(logits, "std"), torch.cat([want, torch.zeros(1, 3)]))
    assert deviation(torch.tensor([[3.0]])).tolist() == [3.0]  # of one column, n - 1 counts as 1
    assert deviation(torch.tensor([[1.0, -1.0], [0.0, 0.0]])).tolist() == pytest.approx([math.sqrt(2), 1])


# Rows of a chunk ----


def head_rows(**changes: Any) -> HeadRows:
    told: dict[str, Any] = {
        "targets_N": torch.zeros(6, dtype=torch.long),
        "ce_weight_N": torch.tensor([1.0, 0.0, 2.0, 0.0, 3.0, 0.0]),
        "kl_weight_N": torch.tensor([0.0, 1.0, 2.0, 0.0, 0.0, 3.0]),
        "temperature": 1.0,
        "divergence": Divergence(),
        "num_common": 4,
        "chunk_rows": None,
        "active_rows": None,
    }
    return HeadRows(**(told | changes))


def chunks_of(rows: HeadRows, bytes_per_row: int = 1) -> list[tuple[list[int], bool]]:
    return [(index.tolist(), has_kl) for index, has_kl in rows.chunks(bytes_per_row=bytes_per_row)]


@pytest.mark.parametrize("active_rows", [None, (3, 2)])
def test_rows_with_a_kl_weight_come_first_and_rows_without_any_weight_never(active_rows) -> None:
    rows = head_rows(active_rows=active_rows)
    assert chunks_of(rows) == [([1, 2, 5], True), ([0, 4], False)]
    assert bool(rows.stated_counts_hold())
    assert rows.stated_counts_hold().shape == ()
    alone = head_rows(kl_weight_N=None, active_rows=None if active_rows is None else (0, 3))
    assert chunks_of(alone) == [([0, 2, 4], False)]
    assert bool(alone.stated_counts_hold())
    assert [mask.dtype for mask in alone.masks()] == [torch.bool, torch.bool]
    in_twos = head_rows(chunk_rows=2, active_rows=active_rows)
    assert chunks_of(in_twos) == [([1, 2], True), ([5], True), ([0, 4], False)]


def test_wrong_counts_are_seen_and_read_rows_that_exist() -> None:
    for counts in ((2, 2), (3, 1), (4, 2), (3, 3)):
        rows = head_rows(active_rows=counts)
        assert not bool(rows.stated_counts_hold())
        assert all(0 <= i < 6 for index, _ in chunks_of(rows) for i in index)
    assert chunks_of(head_rows(active_rows=(4, 2)))[0] == ([1, 2, 5, 0], True)


def test_a_chunk_is_as_large_as_its_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 40
    rows = head_rows(
        targets_N=torch.zeros(count, dtype=torch.long),
        ce_weight_N=torch.zeros(count),
        kl_weight_N=torch.ones(count),
    )
    monkeypatch.setattr(chunking, "CPU_CHUNK_BYTES", 16 * 100)
    assert [len(index) for index, _ in chunks_of(rows, 100)] == [16, 16, 8]
    assert [len(index) for index, _ in chunks_of(rows, 50)] == [24, 16]
    cpu = torch.device("cpu")
    assert chunk_size(33, bytes_per_row=100, device=cpu) == 16
    assert chunk_size(17, bytes_per_row=100, device=cpu) == 16  # two chunks of 9, in tiles of 8
    assert chunk_size(16, bytes_per_row=100, device=cpu) == 16
    assert chunk_size(1, bytes_per_row=100, device=cpu) == 8
    assert chunk_size(40, bytes_per_row=10_000, device=cpu) == 8


# Caps ----


def test_a_cap_and_its_slope_are_those_of_the_tangent() -> None:
    logits = torch.tensor([[0.5, -3.0, 40.0]], dtype=torch.float64)
    kept = logits.clone().requires_grad_()
    want = 5 * torch.tanh(kept / 5)
    upstream = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    (slope,) = torch.autograd.grad(want, kept, upstream)
    capped = cap_(logits, 5.0)
    assert capped is logits
    torch.testing.assert_close(capped, want.detach())
    torch.testing.assert_close(through_cap_(upstream.clone(), capped, 5.0), slope)
    plain = torch.tensor([[1.0, math.inf]])
    assert cap_(plain, None) is plain
    assert plain.tolist() == [[1.0, math.inf]]
    assert through_cap_(plain, capped, None) is plain
    assert cap_(torch.tensor([[1.0, -math.inf]]), 2.0).isnan().tolist() == [[False, True]]


def test_a_head_that_is_reached_exactly_and_one_that_is_never_passed() -> None:
    p_t = torch.tensor([[0.25, 0.125] + [0.0625] * 10], dtype=torch.float64)
    s_NC = torch.full_like(p_t, 1 / 12).log()
    gap = (p_t - 1 / 12).abs()[0]
    want = float(gap[2:].sum() / gap.sum())
    for share in (tail_share, row_torch._tail_share):
        assert float(share(s_NC, p_t.log(), 0.375)) == pytest.approx(want, rel=1e-12)
        least = float(share(s_NC, p_t.log(), 1.0))  # rounding may leave the sum there; the least is outside
        assert least == pytest.approx(want, rel=1e-12)
