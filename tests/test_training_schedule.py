"""The learning-rate multiplier: a ramp, a peak of one, half a cosine."""

from __future__ import annotations

from itertools import pairwise

import pytest

from llava_kd.training.schedule import cosine_with_warmup


def multipliers(num_steps: int, warmup_ratio: float) -> list[float]:
    return [cosine_with_warmup(s, num_steps=num_steps, warmup_ratio=warmup_ratio) for s in range(num_steps)]


@pytest.mark.parametrize("num_steps", [1, 2, 7, 100, 5198])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.03, 0.5, 1.0])
def test_it_rises_to_one_at_most_and_falls(num_steps: int, warmup_ratio: float) -> None:
    values = multipliers(num_steps, warmup_ratio)
    peak = values.index(max(values))
    assert all(0 < value <= 1 for value in values)
    assert values[: peak + 1] == sorted(values[: peak + 1])
    assert values[peak:] == sorted(values[peak:], reverse=True)


def test_the_peak_comes_right_after_the_warmup() -> None:
    values = multipliers(100, 0.1)
    assert values.index(max(values)) == 10
    assert values[10] == 1
    steps = [b - a for a, b in pairwise(values[:11])]
    assert steps == pytest.approx([1 / 11] * 10)


def test_without_warmup_it_starts_at_one_and_is_half_in_the_middle() -> None:
    values = multipliers(100, 0.0)
    assert values[0] == 1
    assert values[50] == pytest.approx(0.5)
    assert values[99] < 0.001


def test_the_decay_ends_at_zero_and_stays_there() -> None:
    assert cosine_with_warmup(100, num_steps=100, warmup_ratio=0.03) == 0
    assert cosine_with_warmup(250, num_steps=100, warmup_ratio=0.03) == 0
