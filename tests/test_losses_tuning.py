"""Losses that tune a teacher: the information of its answers beyond the label, and smoothed labels.

Shape legend: N rows, V vocabulary, D width, K labels with a centroid.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from torch.nn.functional import cross_entropy

from llava_kd.losses.tuning import information
from llava_kd.losses.tuning.information import (
    Centroids,
    add_softmaxes,
    conditional_information,
    conditional_information_by_chunk,
    row_of_tokens,
)
from llava_kd.losses.tuning.smoothing import smoothing, smoothing_without_logits

V, D, N = 37, 8, 150
TOKENS = (5, 3, 20, 36)


class Case(NamedTuple):
    hidden_ND: Tensor
    head_VD: Tensor
    bias_V: Tensor
    labels_N: Tensor
    centroids: Centroids

    @property
    def logits_NV(self) -> Tensor:
        return self.hidden_ND @ self.head_VD.T + self.bias_V

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.hidden_ND, self.head_VD, self.bias_V


def make(dtype: torch.dtype = torch.float64, temperature: float = 3.0, scale: float = 2.0) -> Case:
    draw = torch.Generator().manual_seed(0)
    hidden_ND = scale * torch.randn(N, D, generator=draw, dtype=torch.float64)
    head_VD = torch.randn(V, D, generator=draw, dtype=torch.float64)
    bias_V = torch.randn(V, generator=draw, dtype=torch.float64)
    labels_N = torch.tensor((*TOKENS, 0, 11))[torch.randint(0, 6, (N,), generator=draw)]
    p_NV = ((hidden_ND @ head_VD.T + bias_V) / temperature).softmax(1)
    q_KV = torch.stack([p_NV[labels_N == token].mean(0) for token in TOKENS])
    centroids = Centroids.of(torch.tensor(TOKENS), q_KV)
    leaves = [t.to(dtype).requires_grad_() for t in (hidden_ND, head_VD, bias_V)]
    return Case(leaves[0], leaves[1], leaves[2], labels_N, centroids)


FORMS = {
    "plain": conditional_information,
    "chunks of 7": lambda *a, **k: conditional_information_by_chunk(*a, **k, chunk_rows=7),
    "chunks": conditional_information_by_chunk,
}


def run(form: str, case: Case, *, temperature: float = 3.0, clamp: float = 1e9):
    return FORMS[form](
        case.hidden_ND, case.head_VD, case.labels_N, case.centroids,
        bias_V=case.bias_V, temperature=temperature, clamp=clamp,
    )  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_the_information_is_the_mean_divergence_to_the_labels_own_centroid(form: str) -> None:
    """By torch's own KL, label by label; a row whose label has no centroid is 0."""
    case = make()
    found = run(form, case)
    expected_N = torch.zeros(N, dtype=torch.float64)
    for k, token in enumerate(TOKENS):
        own = case.labels_N == token
        p = Categorical(logits=(case.logits_NV[own] / 3.0).detach())
        expected_N[own] = kl_divergence(p, Categorical(logits=case.centroids.log_q_KV[k].double()))
    assert {0, 11} & set(case.labels_N.tolist())
    torch.testing.assert_close(found.rows_N, expected_N, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.loss.detach(), expected_N.sum(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("clamp", [1e9, 1.0])
@pytest.mark.parametrize("form", ["chunks of 7", "chunks"])
def test_the_chunks_have_the_gradient_of_the_plain_form(form: str, clamp: float) -> None:
    case = make()
    plain, fast = run("plain", case, clamp=clamp), run(form, case, clamp=clamp)
    torch.testing.assert_close(fast.rows_N, plain.rows_N)
    for ours, theirs in zip(
        torch.autograd.grad(-2.5 * fast.loss, case.leaves),
        torch.autograd.grad(-2.5 * plain.loss, case.leaves),
        strict=True,
    ):
        assert bool(theirs.any())
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_at_the_clamp_counts_as_the_clamp_and_moves_nothing(form: str) -> None:
    case = make()
    free_N = run(form, case).rows_N
    clamp = float(free_N[free_N > 0].median())
    clamped = run(form, case, clamp=clamp)
    torch.testing.assert_close(clamped.rows_N, free_N.clamp(max=clamp))
    (moved_ND,) = torch.autograd.grad(clamped.loss, case.hidden_ND)
    torch.testing.assert_close(moved_ND.any(1), (free_N > 0) & (free_N < clamp))


@pytest.mark.parametrize("form", FORMS)
def test_softened_rows_of_a_sure_model_have_a_gradient_where_others_have_almost_none(form: str) -> None:
    """Why the term is taken at the temperature of the distillation: each with centroids of its own."""
    sizes = {}
    for temperature in (1.0, 12.0):
        case = make(temperature=temperature, scale=60.0)
        q_KV = case.centroids.log_q_KV.exp()
        assert float(q_KV.sum(1).sub(1).abs().max()) < 1e-5
        found = run(form, case, temperature=temperature)
        (gradient_ND,) = torch.autograd.grad(found.loss, case.hidden_ND)
        sizes[temperature] = float(gradient_ND.norm(dim=1).median())
    assert sizes[12.0] > 3 * sizes[1.0]


def test_equal_rows_of_a_label_tell_nothing_of_their_input() -> None:
    """I(X; Yhat | Y) = 0: each row is its own centroid, and stays there to first order."""
    case = make()
    hidden_ND = case.head_VD.detach()[case.labels_N].clone().requires_grad_()
    p_NV = ((hidden_ND @ case.head_VD.T + case.bias_V) / 3.0).softmax(1).detach()
    q_KV = torch.stack([p_NV[case.labels_N == token].mean(0) for token in TOKENS])
    same = case._replace(hidden_ND=hidden_ND, centroids=Centroids.of(torch.tensor(TOKENS), q_KV))
    found = run("chunks", same)
    (gradient_ND,) = torch.autograd.grad(found.loss, hidden_ND)
    assert float(found.rows_N.abs().max()) < 1e-6
    assert float(gradient_ND.abs().max()) < 1e-6


def test_centroids_are_means_of_softened_rows_however_they_come() -> None:
    case = make()
    for parts in ([slice(0, N)], [slice(0, 50), slice(50, 51), slice(51, N)]):
        total_KV = torch.zeros(len(TOKENS), V, dtype=torch.float64)
        row_of_N = row_of_tokens(torch.tensor(TOKENS), V)[case.labels_N]
        for part in parts:
            add_softmaxes(
                total_KV, case.hidden_ND[part], case.head_VD, row_of_N[part],
                temperature=3.0, bias_V=case.bias_V,
            )  # fmt: skip
        counts_K = torch.bincount(row_of_N[row_of_N >= 0], minlength=len(TOKENS))
        made = Centroids.of(torch.tensor(TOKENS), total_KV / counts_K[:, None])
        torch.testing.assert_close(made.log_q_KV, case.centroids.log_q_KV)


@pytest.mark.parametrize("form", FORMS)
def test_no_rows_no_centroids_and_probabilities_of_0_are_finite(form: str) -> None:
    case = make(torch.float32)
    empty = case._replace(hidden_ND=case.hidden_ND[:0], labels_N=case.labels_N[:0])
    others = case._replace(labels_N=torch.zeros_like(case.labels_N))
    zeros = case._replace(centroids=Centroids.of(torch.tensor(TOKENS), torch.eye(V)[list(TOKENS)]))
    for one in (empty, others, zeros):
        found = run(form, one)
        gradients = torch.autograd.grad(found.loss, one.leaves, allow_unused=True)
        assert bool(found.loss.isfinite())
        assert all(g is None or bool(g.isfinite().all()) for g in gradients)
    assert float(run(form, others).loss.detach()) == 0


@pytest.mark.parametrize("form", FORMS)
def test_what_does_not_fit_is_refused(form: str) -> None:
    case = make()
    with pytest.raises(ValueError, match="clamp of conditional mutual information must be above 0; got 0"):
        run(form, case, clamp=0.0)
    with pytest.raises(ValueError, match="temperature of conditional mutual information must be above 0"):
        run(form, case, temperature=0.0)
    other = case._replace(head_VD=case.head_VD[:-1], bias_V=case.bias_V[:-1])
    with pytest.raises(ValueError, match="must be over the 36 rows of the head; got 37"):
        run(form, other)


def test_16_bit_models_are_summed_in_fp32() -> None:
    wide, narrow = make(torch.float32), make(torch.bfloat16)
    found, rounded = run("chunks", wide), run("chunks", narrow)
    assert rounded.loss.dtype == torch.float32
    torch.testing.assert_close(rounded.rows_N, found.rows_N, rtol=0.1, atol=0.05)
    torch.testing.assert_close(run("plain", narrow).rows_N, rounded.rows_N, rtol=1e-4, atol=1e-5)


SMOOTHING = {"plain": smoothing, "without logits": smoothing_without_logits}


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("form", SMOOTHING)
def test_smoothing_is_what_smoothed_labels_add_to_cross_entropy(form: str, has_bias: bool) -> None:
    case = make()
    bias_V = case.bias_V if has_bias else None
    leaves = case.leaves if has_bias else case.leaves[:2]
    logits_NV = case.hidden_ND @ case.head_VD.T + (0 if bias_V is None else bias_V)
    for share in (0.1, 0.7):
        theirs = cross_entropy(logits_NV, case.labels_N, reduction="sum", label_smoothing=share)
        plain = cross_entropy(logits_NV, case.labels_N, reduction="sum")
        found = SMOOTHING[form](case.hidden_ND, case.head_VD, case.labels_N, bias_V=bias_V)
        torch.testing.assert_close(plain + share * found.loss, theirs)
        torch.testing.assert_close(found.rows_N.sum(), found.loss.detach())
        for a, b in zip(
            torch.autograd.grad(plain + share * found.loss, leaves, retain_graph=True),
            torch.autograd.grad(theirs, leaves, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def test_a_centroid_stands_where_its_token_does() -> None:
    assert information.row_of_tokens(torch.tensor([4, 1]), 6).tolist() == [-1, 1, -1, -1, 0, -1]
