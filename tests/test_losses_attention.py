"""The visual-attention loss: an oracle in loops, and its identities.

Shape legend: L layers, I images, N tokens of an image.
"""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

from llava_kd.losses.reference import attention_rows, sliding_means


def maps(layers: int, images: int, tokens: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Causal attention over the tokens and over others that are not shown, so rows sum to less than one."""
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(layers, images, tokens, tokens + 3, generator=generator, dtype=torch.float64)
    later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    scores[..., 3:] = scores[..., 3:].masked_fill(later, -torch.inf)
    return scores.softmax(-1)[..., 3:].to(dtype)


def oracle(student_NN: list[list[float]], teacher_NN: list[list[float]], *, drop_sinks: bool) -> float:
    """One layer of one image, entry by entry."""
    size = range(len(student_NN))
    limits = []
    for side in (student_NN, teacher_NN):
        flat = [value for row in side for value in row]
        limits.append(statistics.mean(flat) + statistics.stdev(flat) if drop_sinks else math.inf)
    pooled: list[list[float]] = [[], []]
    for key in size:
        kept = [
            query
            for query in size
            if teacher_NN[query][key] != 0
            and student_NN[query][key] <= limits[0]
            and teacher_NN[query][key] <= limits[1]
        ]
        for number, side in enumerate((student_NN, teacher_NN)):
            pooled[number].append(sum(side[query][key] for query in kept) / max(len(kept), 1))
    dot = sum(a * b for a, b in zip(*pooled, strict=True))
    return 1 - dot / math.sqrt(sum(a * a for a in pooled[0]) * sum(b * b for b in pooled[1]))


@pytest.mark.parametrize("drop_sinks", [True, False])
def test_a_row_is_what_its_definition_says(drop_sinks: bool) -> None:
    student_LINN, teacher_LINN = maps(2, 3, 6, seed=1), maps(4, 3, 6, seed=2)
    rows_I = attention_rows(student_LINN, teacher_LINN, drop_sinks=drop_sinks)
    for image in range(3):
        groups = [teacher_LINN[first : first + 3, image].mean(0) for first in range(2)]
        expected = sum(
            oracle(student_LINN[layer, image].tolist(), groups[layer].tolist(), drop_sinks=drop_sinks)
            for layer in range(2)
        )
        assert float(rows_I[image]) == pytest.approx(expected, rel=1e-9)


def test_groups_slide_and_both_ends_are_used() -> None:
    maps_LINN = torch.arange(5.0).view(5, 1, 1, 1)
    assert sliding_means(maps_LINN, 3).flatten().tolist() == [1.0, 2.0, 3.0]  # n = 3, m = 5, k = 3
    assert sliding_means(maps_LINN, 5).flatten().tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert sliding_means(maps_LINN, 1).flatten().tolist() == [2.0]


def test_a_deeper_student_is_grouped_in_its_turn() -> None:
    deep_LINN, shallow_LINN = maps(4, 2, 5, seed=3), maps(2, 2, 5, seed=4)
    one = attention_rows(deep_LINN, shallow_LINN)
    other = attention_rows(sliding_means(deep_LINN, 2), shallow_LINN)
    torch.testing.assert_close(one, other)


def test_equal_attention_costs_nothing_and_its_scale_does_not_count() -> None:
    student_LINN = maps(2, 2, 6, seed=5).requires_grad_()
    rows_I = attention_rows(student_LINN, student_LINN.detach() * 1)
    rows_I.sum().backward()
    assert float(rows_I.detach().abs().max()) == 0
    assert float(student_LINN.grad.abs().max()) < 1e-12
    half = attention_rows(student_LINN.detach(), student_LINN.detach() / 2)
    assert float(half.abs().max()) < 1e-12


def test_an_attention_sink_is_left_out() -> None:
    """A first token that takes all attention on one side alone must not decide the row."""
    plain_LINN = maps(1, 1, 12, seed=6)
    sunk_LINN = plain_LINN.clone()
    sunk_LINN[..., 0] += 5.0
    with_sink = attention_rows(sunk_LINN, plain_LINN, drop_sinks=False)
    without = attention_rows(sunk_LINN, plain_LINN, drop_sinks=True)
    assert float(without) < 0.3 * float(with_sink)


def test_the_gradient_is_the_students_and_that_of_finite_differences() -> None:
    student_LINN, teacher_LINN = maps(2, 1, 4, seed=7), maps(3, 1, 4, seed=8)
    teacher_LINN.requires_grad_()
    attention_rows(student_LINN.requires_grad_(), teacher_LINN).sum().backward()
    assert teacher_LINN.grad is None
    assert torch.autograd.gradcheck(
        lambda s: attention_rows(s, teacher_LINN), student_LINN.detach().requires_grad_()
    )


def test_no_image_gives_no_row_and_bad_shapes_are_named() -> None:
    assert attention_rows(torch.zeros(2, 0, 1, 1), torch.zeros(3, 0, 1, 1)).shape == (0,)
    with pytest.raises(ValueError, match="must agree in all but the layers"):
        attention_rows(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 5, 5))
    with pytest.raises(ValueError, match="at least one layer"):
        attention_rows(torch.zeros(2, 1, 4, 4), torch.zeros(0, 1, 4, 4))
    with pytest.raises(ValueError, match="at least 2 of them"):
        attention_rows(torch.zeros(2, 1, 1, 1), torch.zeros(2, 1, 1, 1))
