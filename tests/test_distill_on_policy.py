"""Records taken apart and laid out with other answers, and what no label of these may teach.

Shape legend: as of `llava_kd.batch`; D and V sizes of the student's head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_distill_teaching import mllm
from tiny_batches import IMAGE_ID, TOKENS, TinyRecord, inputs, record
from tiny_objectives import among, objective_of
from torch import Tensor

from llava_kd.batch import IGNORE_INDEX, Batch, Inputs
from llava_kd.distill.formulas import FORMULAS, Common
from llava_kd.distill.student import Student
from llava_kd.distill.taught import LABELLED
from llava_kd.distill.teaching.from_teacher import FromTeacher
from llava_kd.distill.teaching.live import Teacher
from llava_kd.distill.teaching.on_policy.own_answers import OWN, OwnAnswers
from llava_kd.distill.teaching.on_policy.talks import Talk, talks_of, with_answers
from llava_kd.distill.terms.cross_entropy import CrossEntropy
from llava_kd.distill.terms.relation import Relation
from llava_kd.distill.terms.response_kl import ResponseKL
from llava_kd.distill.terms.visual_kl import VisualKL
from llava_kd.models.mllm import MLLM

LONG = 512


def talk_record(*parts: Sequence[int], images: int = 1) -> TinyRecord:
    """Prompts and answers by turns, a prompt first; -1 in a prompt is an image."""
    ids, labels = [], []
    for number, part in enumerate(parts):
        tokens = [t for token in part for t in ([IMAGE_ID] * TOKENS if token == -1 else [token])]
        ids += tokens
        labels += tokens if number % 2 else [IGNORE_INDEX] * len(tokens)
    ids_T = torch.tensor(ids)
    pixels = torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(len(ids)))
    return TinyRecord(
        ids=ids_T, labels=torch.tensor(labels), visual=ids_T == IMAGE_ID, pixels_ICHW=pixels, is_valid=True
    )


def batch_of(*records: TinyRecord, teacher: Inputs | None = None) -> Batch:
    names = tuple(f"r{number}" for number in range(len(records)))
    return Batch(student=inputs(*records), teacher=teacher, record_ids=names)


def answers_in(side: Inputs) -> list[list[list[int]]]:
    """Of each row, the runs of its labels."""
    rows = []
    for labels in side.labels_BT.tolist():
        runs: list[list[int]] = [[]]
        for label in labels:
            if label == IGNORE_INDEX:
                runs.append([])
            else:
                runs[-1].append(label)
        rows.append([run for run in runs if run])
    return rows


def answered(
    batch: Batch,
    *answers: Sequence[Sequence[int]],
    max_length: int = LONG,
    row_tokens: int | None = None,
) -> Batch:
    """Each talk with its own answers; one that does not end is written with -1 behind it."""
    talks = talks_of(batch, max_length=max_length)
    for talk, given in zip(talks, answers, strict=True):
        for answer in given:
            assert talk.room > 0
            talk.answer(torch.tensor([t for t in answer if t >= 0]), is_ended=answer[-1] >= 0)
        assert talk.room == 0
    return with_answers(batch, talks, row_tokens=row_tokens)


def assert_equal(ours: Inputs, theirs: Inputs) -> None:
    for name in (
        "input_ids_BT",
        "labels_BT",
        "position_ids_BT",
        "segment_ids_BT",
        "visual_BT",
        "pixels_ICHW",
    ):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    for name in ("response_N", "visual_N", "distilled_N", "valid_images_N", "boundaries_N", "lengths"):
        a, b = getattr(ours.places, name), getattr(theirs.places, name)
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, name


RECORDS = (
    talk_record([1, -1, 2], [3, 4, 5], [6, 7], [8], [9], [10, 11]),
    talk_record([20, 21], [22], images=0),
    talk_record([30, -1, -1], [31, 32], [33], [34], images=2),
)


def test_the_same_answers_give_the_same_batch() -> None:
    batch = batch_of(*RECORDS)
    again = answered(batch, *answers_in(batch.student))
    assert_equal(again.student, batch.student)
    assert again.own_answers
    assert not batch.own_answers


def test_other_answers_stand_where_the_datas_did_on_both_sides() -> None:
    """Against records that are laid out with these answers from the start."""
    said = ([[100], [101, 102, 103], [104]], [[110, 111]], [[120], [121]])
    rows = (
        talk_record([1, -1, 2], [100], [6, 7], [101, 102, 103], [9], [104]),
        talk_record([20, 21], [110, 111], images=0),
        talk_record([30, -1, -1], [120], [33], [121], images=2),
    )
    padded = inputs(*RECORDS, pad_to=80)
    batch = batch_of(*RECORDS, teacher=padded)
    ours = answered(batch, *said)
    expected = replace(inputs(*rows), pixels_ICHW=batch.student.pixels_ICHW)
    assert_equal(ours.student, expected)
    assert ours.teacher is not None
    assert_equal(ours.teacher, replace(expected, pixels_ICHW=padded.pixels_ICHW))
    assert ours.num_shared_targets == len(expected.places.response_N) == 9


def test_an_answer_that_does_not_end_closes_its_talk() -> None:
    ours = answered(batch_of(RECORDS[0]), [[100, 101, -1]])
    assert answers_in(ours.student) == [[[100, 101]]]
    assert ours.student.input_ids_BT.shape[1] == 2 + TOKENS + 2


def test_an_image_of_a_later_question_stays_without_an_answer() -> None:
    late = talk_record([1], [2], [3, -1, 4], [5], [6], [7])
    ours = answered(batch_of(late), [[100, -1]])
    assert ours.student.input_ids_BT.tolist() == [[1, 100, 3, *[IMAGE_ID] * TOKENS, 4]]
    assert answers_in(ours.student) == [[[100]]]
    assert int(ours.student.visual_BT.sum()) == TOKENS


@pytest.mark.parametrize("extra", [0, 3], ids=["student", "teacher"])
def test_no_side_grows_beyond_its_longest_row(extra: int) -> None:
    """`extra` tokens more of the teacher's prompt leave so much less for the answer, on both sides."""
    first = talk_record([1, 2, 3], [4], [5, 6], [7], images=0)
    longer = talk_record([1, 2, 3, *[9] * extra], [4], [5, 6], [7], images=0)
    batch = batch_of(first, teacher=inputs(longer))
    ours = answered(batch, [[100] * 9], max_length=10)
    assert answers_in(ours.student) == answers_in(ours.teacher or ours.student) == [[[100] * (7 - extra)]]
    two = answered(batch, [[100] * 2, [101] * 8], max_length=12)
    assert answers_in(two.student) == [[[100] * 2, [101] * (5 - extra)]]
    none_left = answered(
        batch, [[100] * (7 - extra)], max_length=12
    )  # the next question fits, no answer does
    assert answers_in(none_left.student) == [[[100] * (7 - extra)]]


def test_a_later_image_keeps_its_room() -> None:
    late = talk_record([1], [2], [-1], [5])
    talks = talks_of(batch_of(late), max_length=TOKENS + 4)
    assert talks[0].room == 3
    assert talks[0].answer(torch.arange(100, 110), is_ended=True)  # cut
    assert len(talks[0].rows()[0][0]) == TOKENS + 4


def test_a_record_without_a_target_is_left_as_it_is() -> None:
    bad = record(3, is_valid=False)
    batch = batch_of(bad, RECORDS[1])
    ours = answered(batch, [], [[100]])
    length = len(bad.ids)
    assert torch.equal(ours.student.input_ids_BT[0, :length], bad.ids)
    assert answers_in(ours.student) == [[], [[100]]]
    assert len(ours.student.places.distilled_N) == 0


def packed(*rows: Sequence[TinyRecord], teacher: Inputs | None = None) -> Batch:
    names = tuple(f"r{number}" for number in range(sum(map(len, rows))))
    return Batch(student=inputs(*rows), teacher=teacher, record_ids=names)


def test_the_same_answers_give_the_same_packed_batch() -> None:
    rows = [RECORDS[0], RECORDS[1]], [RECORDS[2], RECORDS[1]]
    batch = packed(*rows, teacher=inputs(*rows, pad_to=90))
    said = [answers_in(inputs(one))[0] for row in rows for one in row]
    longest = max(sum(len(one.ids) for one in row) for row in rows)
    again = answered(batch, *said, row_tokens=longest)
    assert again.student.is_packed
    assert_equal(again.student, batch.student)
    assert again.teacher is not None
    assert_equal(again.teacher, replace(inputs(*rows), pixels_ICHW=again.teacher.pixels_ICHW))


def test_longer_answers_take_more_rows_and_no_row_is_overfull() -> None:
    said = [[100] * 9], [[101] * 9], [[102] * 9]
    alone = [talk_record([1, 2], *of, images=0) for of in said]
    short = [talk_record([1, 2], [3], images=0)] * 3
    ours = answered(packed(short), *said, row_tokens=22)
    assert_equal(ours.student, inputs(alone[:2], alone[2:]))


def test_a_picture_behind_the_last_answer_keeps_its_place() -> None:
    """As of a record that was cut in its last answer."""
    late = talk_record([1, -1], [2, 3], [4, -1], images=2)
    ours = answered(batch_of(late, RECORDS[1]), [[100]], [[101]])
    assert ours.student.input_ids_BT[0].tolist()[-1 - TOKENS :] == [4, *[IMAGE_ID] * TOKENS]
    assert int(ours.student.visual_BT.sum()) == 2 * TOKENS


def test_sides_with_other_numbers_of_answers_are_refused() -> None:
    with pytest.raises(ValueError, match="record 'r0': student and teacher must read the same number"):
        talks_of(batch_of(RECORDS[0], teacher=inputs(RECORDS[2])), max_length=LONG)


# What is taught of them ----

OBJECTIVE = objective_of(
    cross_entropy=CrossEntropy(),
    response_kl=ResponseKL(divergence="reverse"),
    visual_kl=VisualKL(),
    relation=Relation(),
    num_common=260,
)


@pytest.fixture
def models(student_dir: Path, teacher_dir: Path) -> tuple[MLLM, Teacher]:
    return mllm(student_dir, "multi_modal_projector", "language_model"), Teacher(
        mllm(teacher_dir), shares_tower=True
    )


def gradients(student: Student, batch: Batch) -> dict[str, Tensor]:
    student.zero_grad()
    loss, _ = student.losses(student, batch, student.counts(batch))
    loss.backward()
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("losses", ["fast", "reference"])
def test_the_gradient_is_that_of_a_run_on_the_same_answers_without_labels(
    models: tuple[MLLM, Teacher], losses: str
) -> None:
    """Oracle: the terms that read the teacher alone, on records that hold these answers from the start."""
    said = ([[100], [101, 102, 103], [104]], [[110, 111]], [[120], [121]])
    ours = answered(batch_of(*RECORDS), *said)
    student, teacher = models
    terms = replace(OBJECTIVE, common=Common(num_common=260, formulas=FORMULAS[losses]))
    found = gradients(Student(student, terms, OwnAnswers(FromTeacher(teacher))), ours)
    offline = replace(ours, own_answers=False)
    alone = among(terms, "response_kl", "visual_kl", "relation")
    expected = gradients(Student(student, alone, FromTeacher(teacher)), offline)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)
    with_labels = gradients(Student(student, terms, FromTeacher(teacher)), offline)
    assert any(not torch.allclose(with_labels[name], value) for name, value in found.items())


def test_packed_own_answers_teach_what_they_teach_in_rows_of_their_own(models: tuple[MLLM, Teacher]) -> None:
    said = ([[100], [101, 102, 103], [104]], [[110, 111]], [[120], [121]])
    alone = answered(batch_of(*RECORDS), *said)
    ours = answered(packed(RECORDS[:2], RECORDS[2:]), *said, row_tokens=1000)
    assert ours.student.input_ids_BT.shape[0] == 1
    student, teacher = models
    found, expected = (
        gradients(Student(student, OBJECTIVE, OwnAnswers(FromTeacher(teacher))), batch)
        for batch in (ours, alone)
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_labels_of_the_data_count_as_ever_beside_it(models: tuple[MLLM, Teacher]) -> None:
    student, teacher = models
    batch = batch_of(*RECORDS)
    found = gradients(Student(student, OBJECTIVE, OwnAnswers(FromTeacher(teacher))), batch)
    expected = gradients(Student(student, OBJECTIVE, FromTeacher(teacher)), batch)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_step_of_both_kinds_of_batches_divides_labels_by_labels(models: tuple[MLLM, Teacher]) -> None:
    student, teacher = models
    one = Student(student, OBJECTIVE, OwnAnswers(FromTeacher(teacher)))
    data, own = batch_of(RECORDS[0]), answered(batch_of(RECORDS[1]), [[110, 111]])
    assert [float(one.counts(b)[LABELLED]) for b in (data, own)] == [6, 0]
    counts = one.counts(data) + one.counts(own)
    means = [one.losses(one, batch, counts)[1] for batch in (data, own)]
    alone = Student(student, among(OBJECTIVE, "cross_entropy"))
    expected = alone.losses(alone, data, alone.counts(data))[1]["cross_entropy"]
    torch.testing.assert_close(means[0]["cross_entropy"] + means[1]["cross_entropy"], expected)
    assert float(means[0][OWN] + means[1][OWN]) == pytest.approx(2 / 8)


def test_nothing_is_advised_of_a_step_without_labels(models: tuple[MLLM, Teacher]) -> None:
    teaching = OwnAnswers(FromTeacher(models[1]))
    worse = {"teacher_cross_entropy": torch.tensor(2.0), "cross_entropy": torch.tensor(0.0)}
    for _ in range(5):
        assert teaching.advice({**worse, OWN: torch.tensor(1.0)}) is None
    said = [teaching.advice({**worse, OWN: torch.tensor(0.0)}) for _ in range(3)]
    assert said[-1] is not None


def test_a_talk_says_what_is_read_before_its_answer() -> None:
    (talk,) = talks_of(batch_of(RECORDS[0]), max_length=LONG)
    assert isinstance(talk, Talk)
    assert talk.prompt.ids.tolist() == [1, *[IMAGE_ID] * TOKENS, 2]
    assert talk.prompt.visual.tolist() == [False, *[True] * TOKENS, False]
    assert (talk.turn, talk.num_to_come) == (0, 2)
    assert not talk.answer(torch.tensor([100, 101]), is_ended=True)
    assert talk.prompt.ids.tolist() == [1, *[IMAGE_ID] * TOKENS, 2, 100, 101, 6, 7]
    assert (talk.turn, talk.num_to_come) == (1, 1)
