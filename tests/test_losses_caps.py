"""A cap of logits, c tanh(z / c), in every formula: as if logits capped outside met an identity for a head.

Shape legend: N rows, I images, V and U rows of the heads, D and E widths of student and teacher, K labels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from llava_kd.losses import dbild, head_loss, label, reference, reference_top_k, relation, top_k
from llava_kd.losses.cross import stretches
from llava_kd.losses.cross.projection import Projection, projected_loss, projected_loss_by_chunk
from llava_kd.losses.cross.stretches import Distance, Stretched, Words
from llava_kd.losses.divergence import Divergence
from llava_kd.losses.inner.exits import enhanced
from llava_kd.losses.reference_top_k import TopK
from llava_kd.losses.row_figures import row_figures
from llava_kd.losses.targets.mixture import MixedTarget, Voice
from llava_kd.losses.tuning import information, smoothing
from llava_kd.losses.tuning.information import Centroids

N, V, U, D, E, COMMON = 12, 31, 29, 6, 9, 27
CAPS = (2.0, 3.0)  # of student and teacher, whose logits reach about 8


def drawn(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


HIDDEN, HEAD, BIAS = drawn(0, N, D), drawn(1, V, D), drawn(2, V)
THEIRS, THEIR_HEAD, THEIR_BIAS = drawn(3, N, E), drawn(4, U, E), drawn(5, U)
TARGETS, CE, KL = torch.arange(N) % COMMON, drawn(6, N).abs(), drawn(7, N).abs()
Side = tuple[Tensor, Tensor, Tensor | None, float | None]  # rows, head, bias, cap
Loss = Callable[[Side, Side], Tensor]


def outside(side: Side) -> Side:
    """The same logits, made here, under a head that changes nothing."""
    hidden, head, bias, cap = side
    assert cap is not None
    logits = hidden @ head.T if bias is None else hidden @ head.T + bias
    identity = torch.eye(len(head), dtype=torch.float64)
    return cap * (logits / cap).tanh(), identity, None, None


def distilled(module, **how: object) -> Loss:
    def loss(student: Side, teacher: Side) -> Tensor:
        return module.head_loss(
            student[0], student[1], TARGETS, ce_weight_N=CE, student_bias_V=student[2],
            student_cap=student[3],
            teacher_NE=teacher[0], teacher_head_UE=teacher[1], teacher_bias_U=teacher[2],
            teacher_cap=teacher[3], kl_weight_N=KL, num_common=COMMON, **how,
        ).loss  # fmt: skip

    return loss


def from_largest(module, **how: object) -> Loss:
    z_NC = outside((THEIRS, THEIR_HEAD, THEIR_BIAS, CAPS[1]))[0][:, :COMMON]
    kept = z_NC.topk(5, dim=1)
    rest_N = z_NC.scatter(1, kept.indices, -torch.inf).logsumexp(1)
    top = TopK(logits_NK=kept.values, columns_NK=kept.indices, rest_N=rest_N)

    def loss(student: Side, _: Side) -> Tensor:
        return module.top_k_head_loss(
            student[0], student[1], TARGETS, ce_weight_N=CE, top=top, kl_weight_N=KL, num_common=COMMON,
            student_bias_V=student[2], student_cap=student[3], **how,
        ).loss  # fmt: skip

    return loss


def differences(module) -> Loss:
    def loss(student: Side, teacher: Side) -> Tensor:
        return module.dbild_loss(
            student[0], student[1], teacher[0], teacher[1], student_bias_V=student[2], student_cap=student[3],
            teacher_bias_U=teacher[2], teacher_cap=teacher[3], candidates=8, num_common=COMMON,
        ).loss  # fmt: skip

    return loss


def related(module, **how: bool) -> Loss:
    def loss(student: Side, teacher: Side) -> Tensor:
        rows_I = module.relation_rows(
            student[0].view(3, 4, -1), teacher[0].view(3, 4, -1), student_head_VD=student[1],
            teacher_head_UE=teacher[1], student_cap=student[3], teacher_cap=teacher[3], **how,
        )  # fmt: skip
        return (rows_I * KL[:3]).sum()

    return loss


WORDS = Words(
    student_K=torch.arange(20), teacher_K=torch.arange(20).flip(0), student_A=torch.arange(20, V),
    teacher_B=torch.arange(20, U),
)  # fmt: skip
# Tokens that are spelt otherwise on the other side are carried there by a fixed map.
CARRIED = Projection(
    "onto_teacher", WORDS, torch.arange(V), (torch.arange(V) * 5) % U, torch.ones(V, dtype=HIDDEN.dtype)
)


def stretched(form: Callable, by: Words | Projection) -> Loss:
    def loss(*sides: Side) -> Tensor:
        ours, theirs = (
            Stretched(s[0][:7], TARGETS[:7], s[0][7:], TARGETS[7:], torch.arange(5), *s[1:]) for s in sides
        )
        return form(ours, theirs, by, Distance(temperature=2.0)).loss

    return loss


def smoothed(form: Callable) -> Loss:
    return lambda s, _: form(s[0], s[1], TARGETS, bias_V=s[2], cap=s[3]).loss


CENTROIDS = Centroids.of(torch.arange(V), drawn(8, V, V).softmax(1))


def informed(form: Callable) -> Loss:
    return lambda s, _: (
        form(s[0], s[1], TARGETS, CENTROIDS, temperature=2.0, clamp=9.0, bias_V=s[2], cap=s[3]).loss
    )


def mixed(module) -> Loss:
    """A second teacher, capped too."""

    def loss(student: Side, teacher: Side) -> Tensor:
        other = Voice(teacher[0].flip(0), *teacher[1:])
        weights_NM = drawn(9, N, 2).log_softmax(1)
        change = MixedTarget(others=(other,), log_weights_NM=weights_NM, temperature=1.0, num_common=COMMON)
        return distilled(module, teacher_change=change)(student, teacher)

    return loss


BOTH = {
    "reference": (reference, reference_top_k, reference, reference),
    "fast": (head_loss, top_k, dbild, relation),
}
LOSSES: dict[str, Loss] = {}
for form, (head, top, bild, relate) in BOTH.items():
    LOSSES |= {
        f"{form} forward": distilled(head),
        f"{form} adaptive at 2": distilled(head, temperature=2.0, divergence=Divergence("adaptive")),
        f"{form} reverse at std": distilled(head, temperature="std", divergence=Divergence("reverse")),
        f"{form} mixture": mixed(head),
        f"{form} top k": from_largest(top),
        f"{form} dbild": differences(bild),
        f"{form} relation": related(relate),
        f"{form} relation centred, unit": related(relate, centre=True, normalise=True),
    }
LOSSES |= {
    "reference stretches": stretched(stretches.stretch_loss, WORDS),
    "fast stretches": stretched(partial(stretches.stretch_loss_by_chunk, chunk_rows=3), WORDS),
    "reference projection": stretched(projected_loss, CARRIED),
    "fast projection": stretched(partial(projected_loss_by_chunk, chunk_rows=3), CARRIED),
    "reference smoothing": smoothed(smoothing.smoothing),
    "fast smoothing": smoothed(smoothing.smoothing_without_logits),
    "reference information": informed(information.conditional_information),
    "fast information": informed(information.conditional_information_by_chunk),
}


def gradients(loss: Loss, sides: Callable[[Side, Side], tuple[Side, Side]], *, bias: bool) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (HIDDEN, HEAD, BIAS)]
    student = (leaves[0], leaves[1], leaves[2] if bias else None, CAPS[0])
    teacher = (THEIRS, THEIR_HEAD, THEIR_BIAS if bias else None, CAPS[1])
    found = loss(*sides(student, teacher))
    return [found.detach(), *torch.autograd.grad(1.3 * found, leaves if bias else leaves[:2])]


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_are_those_of_logits_that_were_capped_outside(name: str) -> None:
    bias = "relation" not in name
    inside = gradients(LOSSES[name], lambda *sides: sides, bias=bias)
    expected = gradients(LOSSES[name], lambda s, t: (outside(s), outside(t)), bias=bias)
    for got, want in zip(inside, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    uncapped = gradients(LOSSES[name], lambda s, t: ((*s[:3], None), (*t[:3], None)), bias=bias)
    assert abs(float(inside[0] - uncapped[0])) > 1e-3


def test_what_is_said_of_rows_is_of_capped_logits() -> None:
    capped, plain = (
        (THEIRS, THEIR_HEAD, THEIR_BIAS, CAPS[1]),
        outside((THEIRS, THEIR_HEAD, THEIR_BIAS, CAPS[1])),
    )

    def said(side: Side) -> list[Tensor]:
        hidden, head, bias, cap = side
        rows = [*row_figures(hidden, head, bias, TARGETS, cap=cap)]
        for form in (label.label_rows, label.label_rows_by_chunk):
            rows += form(hidden, head, TARGETS, bias_V=bias, cap=cap)
        asked = enhanced(hidden, head, TARGETS, gamma=1.5, form="code", bias_U=bias, cap=cap)
        total = torch.zeros(U, U, dtype=torch.float64)
        rows.append(
            information.add_softmaxes(total, hidden, head, TARGETS, temperature=1.0, bias_V=bias, cap=cap)
        )
        return [*rows, asked.kl_weight_N, asked.ce_weight_N, total]

    for got, want in zip(said(capped), said(plain), strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("cap", [0.0, -1.0, float("inf"), float("nan")])
def test_a_cap_that_is_none_is_refused(cap: float) -> None:
    for module in (reference, head_loss):
        with pytest.raises(ValueError, match="cap of a head's logits must be positive and finite"):
            module.head_loss(HIDDEN, HEAD, TARGETS, ce_weight_N=CE, student_cap=cap)
    for module in (reference, relation):
        with pytest.raises(ValueError, match="must be positive and finite"):
            related(module)((HIDDEN, HEAD, None, cap), (THEIRS, THEIR_HEAD, None, None))


def test_an_infinite_logit_is_not_hidden_by_its_cap() -> None:
    for module in (reference, head_loss):
        wrong = HIDDEN.clone()
        wrong[3] = torch.inf
        loss = module.head_loss(wrong, HEAD.abs(), TARGETS, ce_weight_N=CE, student_cap=2.0).loss
        assert bool(loss.isnan())


def test_a_gram_matrix_alone_says_nothing_of_capped_logits() -> None:
    sides = {"student_head_VD": HEAD, "teacher_gram_EE": relation.head_gram(THEIR_HEAD), "teacher_cap": 2.0}
    with pytest.raises(ValueError, match="give the head together with its cap"):
        relation.relation_rows(HIDDEN.view(3, 4, D), THEIRS.view(3, 4, E), **sides)
