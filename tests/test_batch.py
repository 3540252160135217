"""What a batch says of itself: targets, valid visual tokens, and counts that add up."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch
from tiny_batches import TOKENS, TinyRecord, inputs, record
from torch import Tensor

from llava_kd import batch as batch_module
from llava_kd.batch import IGNORE_INDEX, Batch, Counts, Inputs, Stretches, StretchRows, TeacherRows


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


# Where things are, against loops over the records ----

# Images, prompt and answer of each record, in rows of one or two.
LAID = {
    "one a row": [[(1, 4, 5)], [(0, 2, 3)], [(1, 1, 2)], [(1, 3, 0)]],
    "packed": [[(1, 4, 5), (0, 2, 3)], [(1, 1, 2)], [(1, 2, 4), (1, 6, 1)]],
    "two images in one": [[(0, 3, 2), (2, 4, 6)], [(1, 2, 1), (0, 1, 9)]],
    "no answer before": [[(0, 3, 0), (1, 4, 6)], [(1, 2, 0)]],
    "one image in all": [[(0, 3, 2), (1, 4, 5)], [(0, 2, 1)]],
}


def laid(rows: list[list[tuple[int, int, int]]], pad_to: int = 70) -> tuple[Inputs, list[list[TinyRecord]]]:
    records = [
        [record(10 * b + r, images=i, prompt=p, answer=a) for r, (i, p, a) in enumerate(row)]
        for b, row in enumerate(rows)
    ]
    return inputs(*records, pad_to=pad_to), records


def placed(side: Inputs, records: list[list[TinyRecord]]) -> list[tuple[TinyRecord, int]]:
    """Every record with the flat place where it begins."""
    found, width = [], side.input_ids_BT.shape[1]
    for b, row in enumerate(records):
        start = b * width
        for item in row:
            found.append((item, start))
            start += len(item.ids)
    return found


@pytest.mark.parametrize("name", LAID)
def test_places_are_those_of_loops_over_the_rows(name: str) -> None:
    side, records = laid(LAID[name])
    side = replace(side, image_is_valid_I=torch.arange(side.num_images) % 2 == 1)
    places, width = side.places, side.input_ids_BT.shape[1]
    begins, response, visual = [], [], []
    for item, start in placed(side, records):
        begins.append(start)
        visual += [start + t for t in range(len(item.ids)) if item.visual[t]]
        response += [start + t - 1 for t in range(len(item.ids)) if item.labels[t] != IGNORE_INDEX]
    pads = [b * width + sum(len(item.ids) for item in row) for b, row in enumerate(records)]
    bounds = sorted({*begins, *pads, len(records) * width})
    assert places.response_N.tolist() == response
    assert places.visual_N.tolist() == visual
    assert places.valid_images_N.tolist() == list(range(1, side.num_images, 2))
    odd = [place for n, place in enumerate(visual) if n // TOKENS % 2 == 1]
    assert places.distilled_N.tolist() == odd
    assert places.boundaries_N.tolist() == bounds
    assert places.boundaries_N.dtype == torch.int32
    assert places.lengths == tuple(b - a for a, b in pairwise(bounds))


@pytest.mark.parametrize("name", LAID)
def test_answers_of_an_image_are_the_targets_of_its_record(name: str) -> None:
    side, records = laid(LAID[name])
    index_IP, is_there_IP = side.answers_of_images()
    want, before = [], 0
    for item, _ in placed(side, records):
        count = int((item.labels != IGNORE_INDEX).sum())
        want += [list(range(before, before + count))] * len(item.pixels_ICHW)
        before += count
    assert [row[there].tolist() for row, there in zip(index_IP, is_there_IP, strict=True)] == want
    assert (
        index_IP.shape
        == is_there_IP.shape
        == (side.num_images, min(before, max(side.places.lengths) - TOKENS))
    )
    assert not bool(index_IP[~is_there_IP].any())  # a place that can be read, whatever stands there
    assert not bool(is_there_IP[:, 0].logical_not().logical_and(is_there_IP.any(1)).any())


@pytest.mark.parametrize("name", LAID)
def test_questions_of_an_image_are_the_text_of_its_record_that_is_no_answer(name: str) -> None:
    side, records = laid(LAID[name])
    place_IP, is_text_IP = side.questions_of_images()
    want = [
        [start + t for t in range(len(item.ids)) if not item.visual[t] and item.labels[t] == IGNORE_INDEX]
        for item, start in placed(side, records)
        for _ in item.pixels_ICHW
    ]
    assert [row[there].tolist() for row, there in zip(place_IP, is_text_IP, strict=True)] == want
    assert place_IP.shape == is_text_IP.shape == (side.num_images, max(side.places.lengths))
    assert int(place_IP.max()) < side.input_ids_BT.numel()


@pytest.mark.parametrize("longest", [0, 1])
def test_places_past_the_end_of_an_images_record_stay_in_its_row(longest: int) -> None:
    """The last record is shorter than the longest: the places that it lacks are 0, which can be read."""
    rows = [[(1, 4, 9)], [(1, 2, 1)]]
    side, _ = laid(rows[:: 1 if longest == 0 else -1], pad_to=0)
    for index_IP, is_there_IP in (side.answers_of_images(), side.questions_of_images()):
        short = 1 - longest
        assert index_IP[short, -1] == 0
        assert not bool(is_there_IP[short, -1])


def test_without_images_or_answers_there_is_nothing_of_them() -> None:
    for side, shapes in (
        (inputs(record(1, images=0)), ((0, 0), (0, 0))),
        (inputs(record(1, images=2, answer=0)), ((2, 0), (2, 37))),
    ):
        for found, shape in zip((side.answers_of_images(), side.questions_of_images()), shapes, strict=True):
            assert tuple(found[0].shape) == tuple(found[1].shape) == shape
            assert (found[0].dtype, found[1].dtype) == (torch.int64, torch.bool)


def test_an_answer_as_long_as_the_record_beside_its_image_fits() -> None:
    """Hardly a prompt, and an image of a single token."""
    side = inputs(record(1, prompt=0, answer=7, tokens=1), record(2, prompt=0, answer=3, tokens=1))
    index_IP, is_there_IP = side.answers_of_images()
    assert is_there_IP.sum(1).tolist() == [7, 3]
    assert index_IP.shape[1] == 8  # the longest record, 9, less its image
    place_IP, is_text_IP = side.questions_of_images()
    assert place_IP[is_text_IP].tolist() == side.places.boundaries_N[:2].tolist()  # the word before the image


def test_an_image_may_be_the_first_thing_of_its_record() -> None:
    """As in a template without a first token: its place is then where the record begins."""
    items = []
    for seed in (1, 2, 3):
        item = record(seed, prompt=2, answer=seed)
        items.append(replace(item, ids=item.ids[1:], labels=item.labels[1:], visual=item.visual[1:]))
    side = inputs(items)
    index_IP, is_there_IP = side.answers_of_images()
    place_IP, is_text_IP = side.questions_of_images()
    assert index_IP[is_there_IP].tolist() == list(range(6))
    assert is_there_IP.sum(1).tolist() == [1, 2, 3]
    assert is_text_IP.sum(1).tolist() == [2, 2, 2]
    begins = side.places.boundaries_N[:3].tolist()
    assert place_IP[is_text_IP].tolist() == [begin + TOKENS + k for begin in begins for k in (0, 1)]


def test_scores_are_those_of_the_targets_and_zero_where_nobody_asked() -> None:
    side, _ = laid(LAID["packed"])
    scores_BT = torch.rand(side.labels_BT.shape, generator=torch.Generator().manual_seed(0))
    found_N = replace(side, scores_BT=scores_BT).target_scores_N
    is_label_BT = side.labels_BT != IGNORE_INDEX
    assert torch.equal(found_N, scores_BT[is_label_BT])
    assert torch.equal(side.target_scores_N, torch.zeros(int(is_label_BT.sum())))


# Changing and moving every tensor ----


def everything() -> Batch:
    """A batch that has all it can have."""

    def rows(start: int) -> StretchRows:
        a, b, c = (torch.arange(start + k, start + k + 3) for k in range(3))
        return StretchRows(first_S=a, further_R=b, stretch_R=c)

    side, _ = laid(LAID["packed"])
    full = replace(
        side,
        known_places=side.places,
        scores_BT=torch.rand(side.labels_BT.shape),
        own={"pixel_values": torch.ones(2, 3), "grid": torch.arange(4)},
    )
    stored = {f.name: torch.full((2,), float(n)) for n, f in enumerate(fields(TeacherRows))}
    return Batch(
        student=full,
        teacher=replace(full, input_ids_BT=full.input_ids_BT + 1),
        record_ids=("a", "b"),
        teacher_rows=TeacherRows(**stored),
        num_shared_targets=7,
        stretches=Stretches(student=rows(1), teacher=rows(20)),
        step=3,
        own_answers=True,
    )


def leaves(value: object, path: str = "") -> dict[str, object]:
    """Every value in a nest of dataclasses and dictionaries, by its path."""
    if isinstance(value, dict):
        return {k: v for name, part in value.items() for k, v in leaves(part, f"{path}.{name}").items()}
    if hasattr(value, "__dataclass_fields__"):
        return leaves({f.name: getattr(value, f.name) for f in fields(value)}, path)  # pyright: ignore
    return {path: value}


def test_moving_reaches_every_tensor_and_keeps_the_rest() -> None:
    batch = everything()
    before, after = leaves(batch), leaves(batch.to("meta"))
    assert before.keys() == after.keys()
    assert sum(isinstance(value, Tensor) for value in before.values()) == 2 * (8 + 5 + 2) + 8 + 6
    for path, value in before.items():
        moved = after[path]
        if isinstance(value, Tensor):
            assert isinstance(moved, Tensor), path
            assert (moved.device.type, moved.shape, moved.dtype) == ("meta", value.shape, value.dtype), path
        else:
            assert moved == value, path
    stays = leaves(batch.to("cpu"))
    for path, value in before.items():
        same = torch.equal if isinstance(value, Tensor) else lambda a, b: a == b
        assert same(stays[path], value), path  # pyright: ignore[reportArgumentType]


def test_what_a_batch_lacks_it_lacks_after_a_move() -> None:
    moved = Batch(student=inputs(record(1))).to("meta")
    assert (moved.teacher, moved.teacher_rows, moved.stretches) == (None, None, None)
    assert (moved.student.known_places, moved.student.scores_BT, moved.student.own) == (None, None, None)


def test_a_change_reaches_every_tensor_of_a_part_in_its_own_place() -> None:
    batch = everything()
    rows, places = TeacherRows(places_M=torch.arange(3), rest_M=torch.ones(3)), batch.student.known_places
    assert places is not None
    assert batch.stretches is not None
    for part in (rows, places, batch.stretches, batch.teacher_rows):
        assert part is not None
        before, after = leaves(part), leaves(part.map(lambda tensor: tensor + 5))
        assert before.keys() == after.keys()
        for path, value in before.items():
            if isinstance(value, Tensor):
                assert torch.equal(after[path], value + 5), path  # pyright: ignore[reportArgumentType]
            else:
                assert after[path] == value, path


def test_only_a_copy_to_another_kind_of_device_is_not_waited_for() -> None:
    """One to the host would be read before it is there."""

    class Recorder:
        def to(self, device: object, *, non_blocking: bool) -> tuple[object, bool]:
            return device, non_blocking

    for device, runs_on in (("cpu", False), (torch.device("cpu"), False), ("cuda:1", True), ("meta", True)):
        assert batch_module._moved(Recorder(), device) == (device, runs_on)  # pyright: ignore
