"""Difference sampling by its definition: which records stay, and what is said of a reference."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from llava_kd.curation.difference import GroupRow, Share, doubts, group_rows, kept, table

NAN = float("nan")


def by_definition(scores: list[float], groups: list[str], share: float) -> set[int]:
    """Of every subset of the right size inside a group the one of the largest sum, the first of equals."""
    stays: set[int] = set()
    for name in set(groups):
        members = [i for i, group in enumerate(groups) if group == name and scores[i] == scores[i]]
        count = max(1, int(share * len(members) + 1e-9))
        stays |= set(max(itertools.combinations(members, count), key=lambda c: sum(scores[i] for i in c)))
    return stays


@pytest.mark.parametrize("share", [0.1, 0.29, 0.5, 0.75, 1.0])
def test_what_stays_is_the_best_of_every_subset(share: float) -> None:
    rng = np.random.default_rng(int(100 * share))
    for _ in range(20):
        scores = rng.choice(
            [-2.0, -1.0, 0.0, 0.5, 3.0, NAN], size=10, p=[0.2, 0.2, 0.2, 0.2, 0.15, 0.05]
        ).tolist()
        groups = rng.choice(["a", "b"], size=10).tolist()
        if any(
            all(np.isnan(s) for s, g in zip(scores, groups, strict=True) if g == name) for name in set(groups)
        ):
            continue
        found = kept(np.array(scores), groups, Share(keep=share))
        assert set(found.nonzero()[0].tolist()) == by_definition(scores, groups, share)


def test_the_share_is_taken_inside_each_group_unless_all_are_pooled() -> None:
    scores, groups = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), ["low", "low", "low", "high", "high", "high"]
    third = Share(keep=1 / 3)
    assert kept(scores, groups, third).tolist() == [False, False, True, False, False, True]
    pooled = Share(keep=1 / 3, pooled=True)
    assert kept(scores, groups, pooled).tolist() == [False, False, False, False, True, True]
    quota = Share(keep=1 / 3, quotas={"low": 1.0})
    assert kept(scores, groups, quota).tolist() == [True, True, True, False, False, True]


def test_a_share_of_whole_records_is_not_rounded_away() -> None:
    for count in (10, 29, 57, 100, 1000):
        for part in range(1, count + 1):
            found = kept(np.arange(float(count)), ["a"] * count, Share(keep=part / count))
            assert found.sum() == part


def test_the_score_is_a_difference_and_not_a_ratio() -> None:
    """Both models sure, the teacher a little surer: the largest ratio, and the smallest difference."""
    teacher, reference = np.array([0.001, 0.5]), np.array([0.01, 2.0])
    assert (reference / teacher).argmax() == 0
    (row,) = group_rows(teacher, reference, np.array([False, True]), ["a", "a"])
    assert row.gap == pytest.approx((0.009 + 1.5) / 2)
    assert row.kept_score == pytest.approx(1.5)


def test_figures_of_a_group_leave_its_bad_records_out() -> None:
    teacher, reference = np.array([1.0, NAN, 3.0, 1.0]), np.array([2.0, NAN, 2.0, 5.0])
    a, b, everything = group_rows(
        teacher, reference, np.array([True, False, False, True]), ["a", "a", "a", "b"]
    )
    assert (a.records, a.bad, a.kept, a.teacher, a.reference, a.gap, a.better) == (
        3,
        1,
        1,
        2.0,
        2.0,
        0.0,
        0.5,
    )
    assert (a.kept_score, b.gap) == (1.0, 4.0)
    assert (everything.name, everything.records, everything.bad, everything.kept) == ("all", 4, 1, 2)
    assert "| a | 3 | 1 | 1 | 2.000 | 2.000 | +0.000 | 50% | +1.000 |" in table([a, b], "tokens")


def test_equal_models_are_better_nowhere() -> None:
    same = np.array([0.5, 2.0, 1.0])
    rows = group_rows(same, same.copy(), np.array([True, False, False]), ["a"] * 3)
    assert rows[0].better == 0
    with pytest.raises(ValueError, match="as good in every group"):
        doubts(rows)


def row(name: str, better: float) -> GroupRow:
    figures = {"records": 9, "bad": 0, "kept": 3, "teacher": 1.0, "reference": 1.1, "gap": 0.1}
    return GroupRow(name=name, better=better, kept_score=0.2, **figures)  # type: ignore[arg-type]


def test_a_reference_as_good_as_the_teacher_is_named_or_refused() -> None:
    assert doubts([row("a", 0.9), row("b", 0.8)]) == []
    (line,) = doubts([row("a", 0.9), row("b", 0.55)])
    assert line.startswith("b: ")
    (line,) = doubts([row("a", 0.9), row("b", 0.2)])
    assert line.startswith("b: ")
    with pytest.raises(ValueError, match="as good in every group"):
        doubts([row("a", 0.5), row("b", 0.2)])


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, NAN])
def test_a_share_beyond_its_ends_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        Share(keep=share)
    with pytest.raises(ValueError, match="--quota coco must be a share"):
        Share(keep=0.5, quotas={"coco": share})


def test_a_group_without_a_score_and_a_quota_of_no_group_are_refused() -> None:
    with pytest.raises(ValueError, match="b has no record with a score"):
        kept(np.array([1.0, NAN]), ["a", "b"], Share(keep=0.5))
    with pytest.raises(ValueError, match="must name groups that exist"):
        kept(np.array([1.0]), ["a"], Share(keep=0.5, quotas={"c": 0.5}))
    with pytest.raises(ValueError, match="give only one of them"):
        Share(keep=0.5, quotas={"c": 0.5}, pooled=True)
