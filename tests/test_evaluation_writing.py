"""How tokens are drawn: as often as they are likely, the same in any batch, never outside of top_p."""

from __future__ import annotations

import pytest
import torch

from llava_kd.evaluation.generation.writing import GREEDY, Writing


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits_V = torch.tensor([1.0, -0.5, 2.0, 0.0, -3.0])
    writing = Writing(temperature=0.7)
    uniform_B = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    drawn_B = writing.choose(logits_V.expand(20_000, -1), uniform_B)
    found = torch.bincount(drawn_B, minlength=5) / 20_000
    assert found.tolist() == pytest.approx((logits_V / 0.7).softmax(0).tolist(), abs=1e-4)


def test_top_p_leaves_the_smallest_set_that_reaches_it() -> None:
    logits_V = torch.tensor([0.1, 0.4, 0.3, 0.2]).log()
    uniform_B = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    for top_p, allowed in (
        (0.39, {1}),
        (0.41, {1, 2}),
        (0.69, {1, 2}),
        (0.71, {1, 2, 3}),
        (1.0, {0, 1, 2, 3}),
    ):
        drawn_B = Writing(temperature=1, top_p=top_p).choose(logits_V.expand(1000, -1), uniform_B)
        assert set(drawn_B.tolist()) == allowed


def test_the_ends_of_the_unit_interval_draw_tokens_too() -> None:
    logits_BV = torch.tensor([[0.0, 1e4, -1e4]]).expand(2, -1)
    drawn_B = Writing(temperature=1).choose(logits_BV, torch.tensor([0.0, 1 - 1e-16], dtype=torch.float64))
    assert drawn_B.tolist() == [1, 1]


def test_a_question_draws_the_same_numbers_in_any_batch() -> None:
    writing = Writing(temperature=1, seed=3)
    together = writing.draws(["a", "b", "c"], 8)
    assert torch.equal(writing.draws(["c"], 8)[0], together[2])
    assert torch.equal(writing.draws(["b"], 5)[0], together[1][:5])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(Writing(temperature=1, seed=4).draws(["a"], 8)[0], together[0])


def test_without_a_temperature_the_likeliest_is_taken() -> None:
    logits_BV = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(GREEDY.choose(logits_BV, None), logits_BV.argmax(-1))
    assert GREEDY.identity == {}
    assert Writing(temperature=1).identity != Writing(temperature=1, seed=1).identity


@pytest.mark.parametrize(
    "words", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1}]
)
def test_values_beyond_their_ends_are_refused(words: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"temperature must|top_p must"):
        Writing(**words)
