"""What a batch says of itself: targets, valid visual tokens, and counts that add up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_batches import TOKENS, inputs, record

from llava_kd.batch import IGNORE_INDEX, Batch, Counts


def test_a_target_is_the_next_label_and_the_last_place_has_none() -> None:
    batch = inputs(record(1), record(2, answer=9))
    targets_BT = batch.targets_BT
    assert torch.equal(targets_BT[:, :-1], batch.labels_BT[:, 1:])
    assert bool((targets_BT[:, -1] == IGNORE_INDEX).all())


def test_the_last_token_of_a_packed_record_has_no_target_in_the_next_one() -> None:
    row = inputs([record(1), record(2)])
    ends = (row.segment_ids_BT[0].diff() > 0).nonzero().squeeze(1)
    assert ends.numel() == 1
    assert row.targets_BT[0, ends].tolist() == [IGNORE_INDEX]


@pytest.mark.parametrize(
    ("records", "valid"),
    [
        ([record(1), record(2)], [True, False]),
        ([record(1, images=2), record(2, images=0), record(3)], [False, True, False]),
        ([record(1, images=3)], [True, False, True]),
        ([record(1), record(2, images=2)], [False, False, False]),
    ],
    ids=["one a row", "several and none", "neighbours in one record", "no valid one"],
)
def test_an_invalid_image_loses_exactly_its_own_visual_tokens(records: list, valid: list[bool]) -> None:
    batch = replace(inputs(*records), image_is_valid_I=torch.tensor(valid))
    images = sum(len(item.pixels_ICHW) for item in records)
    owner = torch.arange(images).repeat_interleave(TOKENS)
    expected = torch.tensor([valid[image] for image in owner])
    assert torch.equal(batch.distilled_visual_BT[batch.visual_BT], expected)
    assert not bool(batch.distilled_visual_BT[~batch.visual_BT].any())


def test_counts_are_targets_visual_tokens_and_valid_images() -> None:
    batch = Batch(student=inputs(record(1, answer=4), record(2, answer=7, images=2, is_valid=False)))
    counts = batch.counts()
    assert counts["response_tokens"] == 4  # the answer of a bad record is no target
    assert counts["visual_tokens"] == TOKENS
    assert counts["images"] == 1
    assert all(value.dtype == torch.float64 for value in counts.values())


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_counts_of_parts_add_up_to_those_of_the_whole(cut: int) -> None:
    records = [record(1), record(2, images=0), record(3, images=2), record(4, answer=11)]
    whole = Batch(student=inputs(*records)).counts()
    parts = Batch(student=inputs(*records[:cut])).counts() + Batch(student=inputs(*records[cut:])).counts()
    assert parts == whole
    assert set(whole) == {"response_tokens", "visual_tokens", "images"}


def test_counts_are_added_and_read_by_name_whatever_their_order() -> None:
    one, other = Counts(images=torch.tensor(7.0), words=torch.tensor(3.0)), Counts(words=torch.tensor(5.0))
    other["images"] = torch.tensor(0.0)
    assert one + other == {"images": 7, "words": 8}
    with pytest.raises(ValueError, match="only some have \\['rows'\\]"):
        _ = one + Counts(**other, rows=torch.tensor(1.0))
    with pytest.raises(ValueError, match="no denominator is named 'rows'; there are \\['images', 'words'\\]"):
        _ = one["rows"]


def test_a_denominator_that_is_zero_on_every_rank_is_refused_where_a_term_asks_for_it() -> None:
    counts = Counts(images=torch.tensor(0.0), words=torch.tensor(3.0))
    assert counts.positive("words") == 3
    with pytest.raises(ValueError, match="divided by images, and this step has none on any rank"):
        counts.positive("images")


@pytest.mark.parametrize("records", [[record(1, images=0)], [record(1, images=0, answer=0)]])
def test_a_batch_without_images_has_no_visual_row(records: list) -> None:
    batch = Batch(student=inputs(*records))
    assert batch.student.num_images == 0
    assert batch.counts()["visual_tokens"] == 0
    assert batch.counts()["images"] == 0
    assert not bool(batch.student.distilled_visual_BT.any())


def test_moving_a_batch_keeps_all_of_it() -> None:
    batch = Batch(
        student=inputs([record(1), record(2)]), teacher=inputs([record(3), record(4)]), record_ids=("a", "b")
    )
    moved = batch.to("meta")
    assert moved.record_ids == batch.record_ids
    for before, after in ((batch.student, moved.student), (batch.teacher_inputs, moved.teacher_inputs)):
        assert after.is_packed
        assert after.pixels_ICHW.device.type == "meta"
        assert after.segment_ids_BT.shape == before.segment_ids_BT.shape
    assert moved.teacher_inputs is moved.teacher


def test_a_teacher_without_inputs_of_its_own_reads_the_students() -> None:
    batch = Batch(student=inputs(record(1)))
    assert batch.teacher_inputs is batch.student
