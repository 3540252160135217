"""Relations between response and visual tokens, and rows of relations, against sums written out in fp64.

Shape legend: I images, P response tokens, N visual tokens, D and E width of student and teacher.
"""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from llava_kd.losses import reference, relation
from llava_kd.losses.text_relation import text_relation_rows

IMAGES, P, N, D, E = 3, 4, 5, 6, 7
NAMES = ("centre", "normalise", "normalise_rows")
HOW = [dict(zip(NAMES, bits, strict=True)) for bits in product((False, True), repeat=3)]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5


def sides() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    is_there_IP = torch.tensor([[True, True, True, True], [True, False, True, False], [False] * 4])
    return (
        (normal(IMAGES, P, D, seed=1), normal(IMAGES, N, D, seed=2)),
        (
            normal(IMAGES, P, E, seed=3),
            normal(IMAGES, N, E, seed=4),
        ),
        is_there_IP,
    )


def unit(vector: list[float]) -> list[float]:
    length = math.sqrt(sum(x * x for x in vector))
    return [x / length for x in vector]


def entries(text: list[list[float]], visual: list[list[float]], how: dict[str, bool]) -> list[float]:
    """vec R of one image, number by number."""
    if how["centre"]:
        mean = [sum(column) / len(visual) for column in zip(*visual, strict=True)]
        visual = [[x - m for x, m in zip(row, mean, strict=True)] for row in visual]
    if how["normalise"]:
        text, visual = [unit(row) for row in text], [unit(row) for row in visual]
    rows = [[sum(a * b for a, b in zip(h, v, strict=True)) for v in visual] for h in text]
    return [x for row in rows for x in (unit(row) if how["normalise_rows"] else row)]


@pytest.mark.parametrize("how", HOW, ids=lambda how: "+".join(k for k, v in how.items() if v) or "raw")
def test_each_row_is_the_distance_of_two_matrices_written_out(how: dict[str, bool]) -> None:
    student, teacher, is_there_IP = sides()
    got_I = text_relation_rows(student, teacher, is_there_IP, **how)
    expected = []
    for i in range(IMAGES):
        there = is_there_IP[i].nonzero().squeeze(1)
        if not len(there):
            expected.append(0.0)
            continue
        a, b = (
            unit(entries(text[i, there].tolist(), visual[i].tolist(), how))
            for text, visual in (student, teacher)
        )
        expected.append(1 - sum(x * y for x, y in zip(a, b, strict=True)))
    torch.testing.assert_close(got_I, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_its_gradient_is_that_of_finite_differences_and_reaches_the_student_alone() -> None:
    (text, visual), teacher, is_there_IP = sides()
    leaves = [t.requires_grad_() for t in (text, visual, *teacher)]
    how = {"centre": True, "normalise": True, "normalise_rows": True}
    assert torch.autograd.gradcheck(
        lambda t, v: text_relation_rows((t, v), teacher, is_there_IP, **how), (text, visual)
    )
    text_relation_rows((text, visual), teacher, is_there_IP, **how).sum().backward()
    assert text.grad is not None
    assert not text.grad[~is_there_IP].any()
    assert [leaf.grad is None for leaf in leaves] == [False, False, True, True]


@pytest.mark.parametrize("how", HOW, ids=str)
def test_what_is_not_there_may_hold_anything(how: dict[str, bool]) -> None:
    (text, visual), teacher, is_there_IP = sides()
    expected_I = text_relation_rows((text, visual), teacher, is_there_IP, **how)
    spoilt = text.masked_fill(~is_there_IP.unsqueeze(2), math.nan).requires_grad_()
    got_I = text_relation_rows((spoilt, visual), teacher, is_there_IP, **how)
    assert torch.equal(got_I, expected_I)
    got_I.sum().backward()
    assert spoilt.grad is not None
    assert spoilt.grad.isfinite().all()


def test_a_model_against_itself_and_turned_costs_nothing() -> None:
    student, _, is_there_IP = sides()
    turn, _ = torch.linalg.qr(normal(D, D, seed=9))
    turned = (student[0] @ turn, student[1] @ turn)
    for how in HOW:
        assert text_relation_rows(student, turned, is_there_IP, **how).abs().max() < 1e-12


def test_sides_that_do_not_match_are_refused() -> None:
    student, teacher, is_there_IP = sides()
    with pytest.raises(ValueError, match=r"visual states .* student \[3, 5, 6\], teacher \[3, 4, 7\]"):
        text_relation_rows(student, (teacher[0], teacher[1][:, :4]), is_there_IP)
    with pytest.raises(ValueError, match=r"response states .* student \[3, 4, 6\], teacher \[3, 3, 7\]"):
        text_relation_rows(student, (teacher[0][:, :3], teacher[1]), is_there_IP)
    with pytest.raises(ValueError, match=r"mask of response tokens .* got \[3, 3\]"):
        text_relation_rows(student, teacher, is_there_IP[:, :3])


# Rows of a relation ----


@pytest.mark.parametrize("path", [reference, relation], ids=["reference", "fast"])
@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
def test_normalised_rows_are_compared_token_by_token(path, centre: bool, normalise: bool) -> None:
    """The mean over tokens of 1 - cosine, and N / 2 times the loss of Similarity-Preserving KD."""
    heads = {"student_head_VD": normal(9, D, seed=5), "teacher_head_UE": normal(11, E, seed=6)}
    sides = {"student_IND": normal(IMAGES, N, D, seed=2), "teacher_IME": normal(IMAGES, N, E, seed=4)}
    got_I = path.relation_rows(**sides, **heads, centre=centre, normalise=normalise, normalise_rows=True)
    for i in range(IMAGES):
        grams = []
        for side, head in zip(sides.values(), heads.values(), strict=True):
            logits = side[i] @ head.T
            logits = logits - logits.mean(0) if centre else logits
            logits = torch.nn.functional.normalize(logits, dim=1) if normalise else logits
            grams.append(torch.nn.functional.normalize(logits @ logits.T, dim=1))
        by_token = sum(1 - float(a @ b) for a, b in zip(*grams, strict=True)) / N
        assert float(got_I[i]) == pytest.approx(by_token, rel=1e-9)
        preserving = float((grams[0] - grams[1]).square().sum()) / N**2
        assert float(got_I[i]) == pytest.approx(N / 2 * preserving, rel=1e-9)


def test_both_forms_of_normalised_rows_have_one_gradient() -> None:
    heads = {"student_head_VD": normal(9, D, seed=5), "teacher_head_UE": normal(11, E, seed=6)}
    found = []
    for path in (reference, relation):
        leaves = [
            normal(IMAGES, N, D, seed=2).requires_grad_(),
            heads["student_head_VD"].clone().requires_grad_(),
        ]
        rows_I = path.relation_rows(
            leaves[0],
            normal(IMAGES, N, E, seed=4),
            student_head_VD=leaves[1],
            teacher_head_UE=heads["teacher_head_UE"],
            normalise_rows=True,
        )
        found.append(torch.autograd.grad((rows_I * torch.tensor([1.0, 2.0, 3.0])).sum(), leaves))
    for plain, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-12)


def test_a_token_whose_similarities_are_zero_stays_so() -> None:
    sides = {"student_IND": normal(IMAGES, N, D, seed=2), "teacher_IME": normal(IMAGES, N, E, seed=4)}
    sides["student_IND"][0, 2] = 0
    leaf_IND = sides["student_IND"].requires_grad_()
    for path in (reference, relation):
        rows_I = path.relation_rows(leaf_IND, sides["teacher_IME"], normalise_rows=True)
        (gradient_IND,) = torch.autograd.grad(rows_I.sum(), leaf_IND)
        assert gradient_IND.isfinite().all()
        assert float(rows_I[0].detach()) > 0
