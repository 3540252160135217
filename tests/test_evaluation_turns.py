"""Conversations answered turn by turn against the same prompts read whole.

Shape legend: as of `llava_kd.evaluation.generation.turns`; I images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_batches import IMAGE_ID, TOKENS
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from llava_kd.evaluation.generation.generate import Generator
from llava_kd.evaluation.generation.turns import Turns
from llava_kd.evaluation.generation.writing import GREEDY, Writing

PICTURE = [IMAGE_ID] * TOKENS
# Of each conversation what stands before its answers: the second reads little behind its picture, the third
# begins without one and is shown it later, the fourth has two and ends first.
TALKS = (
    [[1, *PICTURE, 2, 3, 4, 5], [6, 7], [8]],
    [[*PICTURE, 9], [10], [11, 12, 13]],
    [[14, 15], [16, *PICTURE, 17], [18, *range(20, 45)]],
    [[50, *PICTURE, 51, *PICTURE, 52]],
)
NUM_IMAGES = (1, 1, 1, 2)


@pytest.fixture
def generator(student_dir: Path) -> Generator:
    found = Generator.load(student_dir, device=torch.device("cpu"), max_new_tokens=5)
    return replace(found, num_tokens=300)


def pictures() -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(number, 3, 32, 32, generator=draw) for number in NUM_IMAGES]


def whole(generator: Generator, ids: list[Tensor], pixels: Sequence[Tensor], names: Sequence[str]) -> Tensor:
    """The oracle: each prompt by itself from its first token on, as `llava-kd eval` reads it."""
    said = []
    for ids_L, pixels_ICHW, name in zip(ids, pixels, names, strict=True):
        inputs = {"input_ids": ids_L[None], "attention_mask": torch.ones_like(ids_L)[None]}
        shown = int((ids_L == IMAGE_ID).sum()) // TOKENS
        more = {"pixel_values": pixels_ICHW[:shown]} if shown else {}
        said.append(generator.written({**inputs, **more}, [name])[0])
    return torch.nn.utils.rnn.pad_sequence(said, batch_first=True, padding_value=generator.end_ids[0])


def turn_by_turn(generator: Generator) -> list[tuple[Tensor, Tensor]]:
    """Answers of every turn, of `Turns` and of the oracle; each is followed by the next prompt."""
    pixels, pairs = pictures(), []
    turns = Turns(generator, pixels)
    so_far = [list[int]() for _ in TALKS]
    for number in range(3):
        which = [k for k, talk in enumerate(TALKS) if number < len(talk)]
        for k in which:
            so_far[k] += TALKS[k][number]
        ids = [torch.tensor(so_far[k]) for k in which]
        names = [f"{number} {k}" for k in which]
        got = turns.written(which, [(ids_L, ids_L == IMAGE_ID) for ids_L in ids], names)
        expected = whole(generator, ids, [pixels[k] for k in which], names)
        pairs.append((got, expected))
        for k, row in zip(which, got.tolist(), strict=True):
            ends = [place for place, token in enumerate(row) if token in generator.end_ids]
            so_far[k] += row[: ends[0] + 1] if ends else row
    return pairs


@pytest.mark.parametrize("writing", [GREEDY, Writing(temperature=1.0, seed=3)], ids=["greedy", "drawn"])
@pytest.mark.parametrize("more_ends", [(), tuple(range(0, 300, 3))], ids=["all cut", "many end"])
def test_answers_are_those_of_prompts_that_are_read_whole(
    generator: Generator, writing: Writing, more_ends: tuple[int, ...]
) -> None:
    asked = replace(generator, writing=writing, more_ends=more_ends)
    pairs = turn_by_turn(asked)
    lengths = set()
    for got, expected in pairs:
        width = expected.shape[1]
        assert torch.equal(got[:, :width], expected)
        lengths |= set(torch.isin(expected, torch.tensor(asked.end_ids)).int().argmax(1).tolist())
    assert len(lengths) > 1 or not more_ends
    assert len({tuple(row) for got, _ in pairs for row in got.tolist()}) > 3


def test_the_logits_are_those_of_prompts_that_are_read_whole(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To rounding: a token in a wrong place moves them by far more than it changes answers."""
    seen: list[Tensor] = []
    choose = Writing.choose

    def spy(self: Writing, logits_BV: Tensor, uniform_B: Tensor | None) -> Tensor:
        seen.append(logits_BV)
        return choose(self, logits_BV, uniform_B)

    monkeypatch.setattr(Writing, "choose", spy)
    one = replace(generator, max_new_tokens=2)
    turn_by_turn(one)
    for rows in (4, 3, 3):
        ours_SBV = torch.stack(seen[:2])
        alone_SBV = torch.stack(seen[2 : 2 + 2 * rows]).reshape(rows, 2, -1).transpose(0, 1)
        torch.testing.assert_close(ours_SBV, alone_SBV, rtol=1e-4, atol=1e-5)
        del seen[: 2 + 2 * rows]
    assert not seen


def columns_read(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each forward, the columns of its input."""
    read: list[int] = []
    forward = generator.model.forward

    def spy(**given: Any) -> object:
        if "inputs_embeds" in given:
            read.append(given["inputs_embeds"].shape[1])
        return forward(**given)

    with monkeypatch.context() as patch:
        patch.setattr(generator.model, "forward", spy)
        turn_by_turn(generator)
    return read


def test_nothing_is_read_twice_but_what_evens_out_the_rows(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest of: the answer's last token, and the next prompt."""
    longest = max(len(talk[0]) for talk in TALKS)
    assert columns_read(generator, monkeypatch) == [longest, 1 + len(TALKS[2][1]), 1 + len(TALKS[2][2])]


def test_a_model_that_forgets_reads_its_prompts_whole(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sliding window in one layer: columns that were moved would be the wrong ones."""
    text = generator.model.config.get_text_config()
    text.sliding_window = 6
    text.layer_types = ["sliding_attention", *text.layer_types[1:]]
    generator.model.model.language_model.has_sliding_layers = True
    assert any(type(layer) is DynamicSlidingWindowLayer for layer in DynamicCache(config=text).layers)
    for got, expected in turn_by_turn(generator):
        assert torch.equal(got, expected)
    longest = [max(sum(map(len, t[: n + 1])) + 5 * n for t in TALKS if n < len(t)) for n in range(3)]
    assert columns_read(generator, monkeypatch) == longest


def test_an_image_token_that_the_model_writes_is_a_word(generator: Generator) -> None:
    """It is no place of an image, though it has the id of one."""
    turns = Turns(generator, [pictures()[0]])
    first = torch.tensor([1, *PICTURE, 2])
    turns.written([0], [(first, first == IMAGE_ID)], ["a"])
    second = torch.cat([first, torch.tensor([IMAGE_ID, 3])])
    marks = torch.cat([first == IMAGE_ID, torch.tensor([False, False])])
    assert turns.written([0], [(second, marks)], ["a"]).shape == (1, 5)
