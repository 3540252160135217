"""Random records laid into rows by hand, for tests of the models and losses: no data room is needed.

Shape legend: B rows, T tokens, I images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tiny_llava import IMAGE_TOKEN, tiny_tokenizer
from torch import Tensor

from llava_kd.batch import IGNORE_INDEX, Inputs

IMAGE_ID = tiny_tokenizer().convert_tokens_to_ids(IMAGE_TOKEN)
NUM_WORDS = 256
TOKENS = 16  # of an image in the default tiny model
SIZE = 32


@dataclass(frozen=True, kw_only=True)
class TinyRecord:
    """Ids, labels and visual marks of one record, and its pixels."""

    ids: Tensor
    labels: Tensor
    visual: Tensor
    pixels_ICHW: Tensor
    is_valid: bool


def record(
    seed: int,
    *,
    images: int = 1,
    prompt: int = 4,
    answer: int = 5,
    tokens: int = TOKENS,
    is_valid: bool = True,
) -> TinyRecord:
    """A word, the images, a prompt, and an answer that is the target."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        return torch.randint(NUM_WORDS, (count,), generator=generator).tolist()

    ids = words(1)
    for _ in range(images):
        ids += [IMAGE_ID] * tokens
    ids += words(prompt)
    labels = [IGNORE_INDEX] * len(ids)
    targets = words(answer)
    ids += targets
    labels += targets if is_valid else [IGNORE_INDEX] * answer
    return TinyRecord(
        ids=torch.tensor(ids),
        labels=torch.tensor(labels),
        visual=torch.tensor(ids) == IMAGE_ID,
        pixels_ICHW=torch.randn(images, 3, SIZE, SIZE, generator=generator),
        is_valid=is_valid,
    )


def inputs(*rows: TinyRecord | Sequence[TinyRecord], pad_to: int = 0) -> Inputs:
    """Right-padded rows; a row of several records is packed."""
    packed = [[row] if isinstance(row, TinyRecord) else list(row) for row in rows]
    length = max(pad_to, *(sum(len(r.ids) for r in row) for row in packed))
    shape = (len(packed), length)
    ids_BT, labels_BT = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORE_INDEX)
    positions_BT, segments_BT = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    visual_BT = torch.zeros(shape, dtype=torch.bool)
    for b, row in enumerate(packed):
        start = 0
        for number, item in enumerate(row, start=1):
            place = slice(start, start + len(item.ids))
            ids_BT[b, place], labels_BT[b, place], visual_BT[b, place] = item.ids, item.labels, item.visual
            positions_BT[b, place] = torch.arange(len(item.ids))
            segments_BT[b, place] = number
            start = place.stop
        positions_BT[b, start:] = torch.arange(length - start)
    every = [item for row in packed for item in row]
    return Inputs(
        input_ids_BT=ids_BT,
        labels_BT=labels_BT,
        position_ids_BT=positions_BT,
        segment_ids_BT=segments_BT,
        visual_BT=visual_BT,
        pixels_ICHW=torch.cat([item.pixels_ICHW for item in every]),
        image_is_valid_I=torch.tensor([item.is_valid for item in every for _ in item.pixels_ICHW]).bool(),
        is_packed=any(len(row) > 1 for row in packed),
    )
