"""How much a teacher needs the picture for a token: both scores and the weights, against sums by hand.

Shape legend: N rows, V columns, D width.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from llava_kd.losses.targets.dependency import of_logits, scores, weights
from llava_kd.losses.targets.mixture import Voice

LN3 = math.log(3)


def weigh(score: list[float], records: list[int], *, top: float, mass: float, counted=None) -> list[float]:
    is_counted_N = torch.tensor([True] * len(score) if counted is None else counted)
    found_N = weights(
        torch.tensor(score), torch.tensor(records), is_counted_N, max(records) + 1, top=top, mass=mass
    )
    return found_N.tolist()


def test_the_scores_are_those_of_the_formulas_by_hand() -> None:
    seen_NV = torch.tensor([[0.0, LN3], [0.0, LN3], [0.0, LN3]])  # 1/4 and 3/4
    unseen_NV = torch.tensor([[0.0, 0.0], [0.0, 0.0], [5.0, 5.0 + LN3]])  # a half each; the same
    found = of_logits(seen_NV, unseen_NV, torch.tensor([1, 0, 1]))
    vds = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert found.vds_N.tolist() == pytest.approx([vds, vds, 0.0], abs=1e-6)
    # The label gains, loses (which counts as 0), stays.
    assert found.va_N.tolist() == pytest.approx([math.log(1.5), 0.0, 0.0], abs=1e-6)
    assert of_logits(seen_NV, unseen_NV, torch.tensor([2, 0, -100])).va_N.isnan().tolist() == [
        True,
        False,
        True,
    ]


@pytest.mark.parametrize("chunk_rows", [1, 2, None])
def test_a_chunk_at_a_time_gives_the_same(chunk_rows: int | None) -> None:
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    head_VD, bias_V, labels_N = made(7, 3), made(7), torch.tensor([0, 3, 6, 2, 1])
    seen, unseen = (Voice(made(5, 3), head_VD, bias_V) for _ in range(2))
    logits_NV, text_NV = (one.hidden_NE @ head_VD.T + bias_V for one in (seen, unseen))
    whole = of_logits(logits_NV, text_NV, labels_N)
    found = scores(seen, unseen, labels_N, chunk_rows=chunk_rows)
    torch.testing.assert_close(found.vds_N, whole.vds_N)
    torch.testing.assert_close(found.va_N, whole.va_N)
    assert (found.va_N > 0).any()
    assert (found.va_N == 0).any()


def test_without_rows_there_are_no_weights() -> None:
    empty_ND, head_VD = torch.zeros(0, 3), torch.zeros(7, 3)
    none_N = torch.zeros(0, dtype=torch.long)
    found = scores(Voice(empty_ND, head_VD), Voice(empty_ND, head_VD), none_N)
    assert found.vds_N.shape == found.va_N.shape == (0,)
    assert weights(found.va_N, none_N, none_N.bool(), 4, top=0.2, mass=0.5).shape == (0,)


def test_the_top_takes_its_mass_and_the_rest_what_is_left() -> None:
    # Five rows: one takes half of 5, four share the other half.
    assert weigh([0.1, 0.9, 0.2, 0.3, 0.1], [0] * 5, top=0.2, mass=0.5) == pytest.approx(
        [0.625, 2.5, 0.625, 0.625, 0.625]
    )
    # Each record by itself, whatever the other's scores are; 0.3 of 4 is two rows.
    found = weigh([9.0, 8.0, 7.0, 6.0, 0.1, 0.4, 0.3, 0.2], [0] * 4 + [1] * 4, top=0.3, mass=1.0)
    assert found == pytest.approx([2, 2, 0, 0, 0, 2, 2, 0])


def test_equal_scores_fall_to_the_first_rows() -> None:
    assert weigh([1.0, 1.0, 1.0, 1.0], [0] * 4, top=0.25, mass=1.0) == pytest.approx([4, 0, 0, 0])


def test_a_teacher_that_does_not_look_weighs_all_alike() -> None:
    assert weigh([0.0] * 6, [0, 0, 1, 1, 1, 2], top=0.2, mass=1.0) == [1.0] * 6


def test_fewer_that_need_the_picture_than_the_top_share_take_no_more_each() -> None:
    # k = 2 of 4 take 4/2 each; only one is above 0, the others share 2 of 4.
    assert weigh([0.0, 0.5, 0.0, 0.0], [0] * 4, top=0.5, mass=1.0) == pytest.approx([2 / 3, 2, 2 / 3, 2 / 3])


@pytest.mark.parametrize(("rows", "expected"), [(1, [1.0]), (2, [1.0, 1.0]), (3, [1.5, 0.75, 0.75])])
def test_short_answers_are_never_weighed_down(rows: int, expected: list[float]) -> None:
    assert weigh([0.9, 0.5, 0.1][:rows], [0] * rows, top=0.2, mass=0.5) == pytest.approx(expected)
    # ceil(0.3 * 2) is one row, whose 0.4 of 2 would be less than 1.
    assert weigh([0.9, 0.5], [0, 0], top=0.3, mass=0.4) == pytest.approx([1.0, 1.0])


def test_what_is_not_counted_weighs_one_and_leaves_the_others_their_sum() -> None:
    counted = [True, False, True, True, True, True, False]
    found = weigh([0.1, 99.0, 0.9, 0.2, 0.3, 0.1, 5.0], [0] * 6 + [1], top=0.2, mass=0.5, counted=counted)
    assert found == pytest.approx([0.625, 1, 2.5, 0.625, 0.625, 0.625, 1])


@pytest.mark.parametrize("top", [0.1, 0.2, 0.3, 1.0])
@pytest.mark.parametrize("mass", [1.0, 0.5, 0.3])
def test_the_weights_of_every_record_sum_to_its_rows(top: float, mass: float) -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = [1, 2, 3, 4, 5, 7, 10, 50]
    record_N = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    score_N = torch.randn(len(record_N), generator=generator).clamp_min(0)
    found_N = weights(
        score_N, record_N, torch.ones(len(record_N)).bool(), len(record_N), top=top, mass=max(top, mass)
    )
    assert bool((found_N >= 0).all())
    sums = torch.zeros(len(lengths)).index_add(0, record_N, found_N)
    assert sums.tolist() == pytest.approx(lengths, rel=1e-6)


def test_a_score_that_is_no_number_is_not_hidden() -> None:
    assert math.isnan(weigh([0.1, float("nan")], [0, 0], top=0.5, mass=1.0)[1])
