"""Losses of inner layers against sums written out, closed forms, and Gaussians of known mutual information.

Shape legend: K pairs, N rows, D and E widths, V and U vocabularies of student and teacher.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from llava_kd.losses import head_loss as fast
from llava_kd.losses import reference
from llava_kd.losses.inner.exits import Enhanced, enhanced
from llava_kd.losses.inner.hint import hint_rows
from llava_kd.losses.inner.mutual_information import information_rows
from llava_kd.losses.kernels import rows as chunking


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Hints ----


def test_a_hint_is_the_distance_written_out() -> None:
    student, teacher = normal(4, 6, seed=1), normal(4, 6, seed=2)
    mse, cosine = hint_rows(student, teacher, "mse"), hint_rows(student, teacher, "cosine")
    for n, (a, b) in enumerate(zip(student.tolist(), teacher.tolist(), strict=True)):
        assert float(mse[n]) == pytest.approx(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / 6)
        lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        assert float(cosine[n]) == pytest.approx(1 - dot / lengths)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_a_hint_of_the_same_states_is_zero_and_moves_the_student_alone(kind) -> None:
    student, teacher = normal(4, 6, seed=1).requires_grad_(), normal(4, 6, seed=2).requires_grad_()
    assert float(hint_rows(student, student, kind).abs().max().detach()) < 1e-12
    hint_rows(student, teacher, kind).sum().backward()
    assert student.grad is not None
    assert teacher.grad is None
    with pytest.raises(ValueError, match=r"of one shape; got student \[4, 6\], teacher \[4, 5\]"):
        hint_rows(student, teacher[:, :5], kind)


# Mutual information ----

K = 5


def bound(f: list[list[float]], q: list[float], alpha: float) -> float:
    """The equation, term by term: f[i][j] of x_i and y_j, q[j] of y_j."""
    num = len(q)
    total = 0.0
    for j in range(num):
        denominator = alpha * sum(math.exp(f[i][j]) for i in range(num)) / num + (1 - alpha) * q[j]
        total += math.log(math.exp(f[j][j]) / denominator) / num
        others = [math.exp(f[i][j]) for i in range(num) if i != j]
        apart = alpha * sum(others) / len(others) + (1 - alpha) * q[j]
        total -= sum(e / apart for e in others) / len(others) / num
    return 1 + total


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_bound_is_the_equation_written_out(alpha: float) -> None:
    f, log_q = normal(K, K, seed=1), normal(K, seed=2)
    got = information_rows(f, log_q, alpha=alpha).mean()
    assert float(got) == pytest.approx(bound(f.tolist(), log_q.exp().tolist(), alpha), abs=1e-12)


def test_at_one_it_is_infonce_at_most_log_of_the_pairs() -> None:
    f, log_q = normal(K, K, seed=1), normal(K, seed=2)
    infonce = math.log(K) - cross_entropy(f.T, torch.arange(K))
    torch.testing.assert_close(information_rows(f, log_q, alpha=1.0).mean(), infonce)
    sure = information_rows(100 * torch.eye(K, dtype=torch.float64), log_q, alpha=1.0)
    assert float(sure.mean()) == pytest.approx(math.log(K))


def test_at_zero_it_is_tuba_and_nwj_where_the_baseline_is_e() -> None:
    f, log_q = normal(K, K, seed=1), normal(K, seed=2)
    off = ~torch.eye(K, dtype=torch.bool)
    of_others = [f[:, j][off[:, j]].exp().mean() for j in range(K)]
    tuba = 1 + (f.diagonal() - log_q).mean() - (torch.stack(of_others) / log_q.exp()).mean()
    torch.testing.assert_close(information_rows(f, log_q, alpha=0.0).mean(), tuba)
    nwj = f.diagonal().mean() - torch.stack(of_others).mean() / math.e
    torch.testing.assert_close(information_rows(f, torch.ones_like(log_q), alpha=0.0).mean(), nwj)


def test_between_the_ends_it_goes_from_one_to_the_other() -> None:
    f, log_q = normal(K, K, seed=1), normal(K, seed=2)
    for near, end in ((1e-9, 0.0), (1 - 1e-9, 1.0)):
        torch.testing.assert_close(
            information_rows(f, log_q, alpha=near), information_rows(f, log_q, alpha=end)
        )


def gaussians(seed: int, *, pairs: int = 64, width: int = 10, rho: float = 0.85) -> tuple[Tensor, float]:
    """The best critic's scores, log p(y | x) / p(y), of correlated pairs; and their mutual information."""
    x, noise = normal(pairs, width, seed=seed), normal(pairs, width, seed=10_000 + seed)
    y, left = rho * x + math.sqrt(1 - rho**2) * noise, 1 - rho**2
    apart_KK = (y.unsqueeze(0) - rho * x.unsqueeze(1)).square().sum(2)
    scores_KK = 0.5 * y.square().sum(1) - apart_KK / (2 * left) - width / 2 * math.log(left)
    return scores_KK, -width / 2 * math.log(left)


def test_of_known_information_bias_falls_and_variance_grows_as_alpha_falls() -> None:
    alphas = (1.0, 0.5, 0.1, 0.01, 0.0)
    found: dict[float, list[float]] = {alpha: [] for alpha in alphas}
    truth = 0.0
    for seed in range(200):
        scores_KK, truth = gaussians(seed)
        for alpha in alphas:
            rows_K = information_rows(scores_KK, torch.zeros(len(scores_KK)), alpha=alpha, clamp=100.0)
            found[alpha].append(float(rows_K.mean()))
    assert truth > math.log(64)  # more than InfoNCE can say
    means = [float(torch.tensor(found[alpha]).mean()) for alpha in alphas]
    spreads = [float(torch.tensor(found[alpha]).std()) for alpha in alphas]
    assert means == sorted(means)
    assert spreads == sorted(spreads)
    assert means[0] < math.log(64)
    error = 4 * spreads[-1] / math.sqrt(200)
    assert abs(means[-1] - truth) < error
    assert all(mean < truth + error for mean in means)


def test_exponents_past_the_clamp_stay_finite_and_push_down() -> None:
    f = torch.zeros(3, 3)
    f[0, 1] = 200.0
    f.requires_grad_()
    rows = information_rows(f, torch.zeros(3), alpha=0.0, clamp=10.0)
    assert rows.isfinite().all()
    rows.sum().backward()
    assert f.grad is not None
    assert f.grad.isfinite().all()
    assert float(f.grad[0, 1]) == pytest.approx(-math.exp(10.0) / 2)
    low = information_rows(normal(K, K, seed=3), torch.zeros(K), alpha=0.2, clamp=50.0)
    torch.testing.assert_close(information_rows(normal(K, K, seed=3), torch.zeros(K), alpha=0.2), low)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_its_gradient_is_that_of_finite_differences(alpha: float) -> None:
    f, log_q = normal(K, K, seed=1).requires_grad_(), normal(K, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: information_rows(a, b, alpha=alpha), (f, log_q))


@pytest.mark.parametrize("pairs", [0, 1])
def test_a_pair_alone_has_nothing_to_be_told_apart_from(pairs: int) -> None:
    f, log_q = normal(pairs, pairs, seed=1).requires_grad_(), normal(pairs, seed=2).requires_grad_()
    rows = information_rows(f, log_q, alpha=0.5)
    rows.sum().backward()
    assert rows.shape == (pairs,)
    assert not rows.any()
    assert f.grad is not None
    assert not f.grad.any()


def test_what_is_no_square_of_scores_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[pairs, pairs\] with a baseline \[pairs\]; got \[3, 4\]"):
        information_rows(torch.zeros(3, 4), torch.zeros(4), alpha=0.5)
    with pytest.raises(ValueError, match=r"alpha must be from 0 .* got 1.5"):
        information_rows(torch.zeros(3, 3), torch.zeros(3), alpha=1.5)


# Exits ----

N, D, E, V, U, COMMON = 7, 4, 5, 11, 12, 10
LABELS = torch.tensor([0, 3, 9, 2, -100, 10, 5])  # the fifth has none, the sixth is no common column


def sides(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    shapes = {"x": (N, D), "head": (V, D), "t": (N, E), "teacher_head": (U, E), "bias": (V,), "b": (U,)}
    return {name: normal(*shape, seed=n).to(dtype) for n, (name, shape) in enumerate(shapes.items())}


def composed(given: dict[str, Tensor], asked: Enhanced, head_loss=reference.head_loss) -> Tensor:
    """As the term puts it together, a value a row in one sum."""
    return head_loss(
        given["x"], given["head"], LABELS, student_bias_V=given["bias"],
        ce_weight_N=asked.ce_weight_N, kl_weight_N=asked.kl_weight_N,
        teacher_NE=asked.sharpness * given["t"], teacher_head_UE=given["teacher_head"],
        teacher_bias_U=asked.sharpness * given["b"], num_common=COMMON,
    ).loss  # fmt: skip


def asked_of(given: dict[str, Tensor], gamma: float, form) -> Enhanced:
    return enhanced(
        given["t"], given["teacher_head"], LABELS, gamma=gamma, form=form, bias_U=given["b"],
        num_common=COMMON,
    )  # fmt: skip


def written_out(given: dict[str, Tensor], gamma: float, form: str) -> Tensor:
    """-sum of w log q, without a constant. Labels count in the whole vocabulary, the rest in the common."""
    teacher = (given["t"] @ given["teacher_head"].T + given["b"])[:, :COMMON].softmax(1)
    logits = given["x"] @ given["head"].T + given["bias"]
    common, whole = logits[:, :COMMON].log_softmax(1), logits.log_softmax(1)
    total = logits.new_zeros(())
    for n, label in enumerate(LABELS.tolist()):
        p_label = float(teacher[n, label]) if 0 <= label < COMMON else 0.0
        for c in range(COMMON):
            p = float(teacher[n, c])
            total = total - (p if form == "paper" else p**gamma) * common[n, c]
        if label >= 0:
            # What the label has beyond its share as a column.
            at_label = (1 + p_label) ** gamma - (1 if form == "code" else 0)
            beyond = at_label - (p_label if form == "paper" else p_label**gamma)
            total = total - beyond * whole[n, label]
    return total


@pytest.mark.parametrize("form", ["paper", "code"])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 1.5, 3.0])
def test_the_target_enhanced_loss_is_its_weights_written_out_less_a_constant(form, gamma: float) -> None:
    given, other = sides(), sides()
    other["x"] = normal(N, D, seed=99)
    gradients, values = [], []
    for function in (
        lambda s: composed(s, asked_of(s, gamma, form)),
        lambda s: written_out(s, gamma, form),
    ):
        given["x"] = given["x"].detach().requires_grad_()
        value = function(given)
        (gradient,) = torch.autograd.grad(value, given["x"])
        gradients.append(gradient)
        values.append(value.detach() - function(other).detach())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-5)


def plain(given: dict[str, Tensor], *, ce: float, kl: float) -> Tensor:
    return reference.head_loss(
        given["x"], given["head"], LABELS, student_bias_V=given["bias"], teacher_NE=given["t"],
        teacher_head_UE=given["teacher_head"], teacher_bias_U=given["b"], num_common=COMMON,
        ce_weight_N=ce * (LABELS >= 0).double(), kl_weight_N=torch.full((N,), kl).double(),
    ).loss  # fmt: skip


def test_at_gamma_one_the_paper_is_cross_entropy_and_kd_and_the_code_kd_beside_a_cross_entropy() -> None:
    given = sides()
    paper, code = (composed(given, asked_of(given, 1.0, form)) for form in ("paper", "code"))
    torch.testing.assert_close(paper, plain(given, ce=1, kl=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(code, plain(given, ce=0, kl=1), rtol=1e-6, atol=0)


def test_at_another_gamma_the_two_forms_differ_in_more_than_a_cross_entropy() -> None:
    given = sides()
    given["x"].requires_grad_()

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, given["x"])[0]

    for gamma, is_same in ((1.0, True), (1.5, False)):
        paper = gradient(composed(given, asked_of(given, gamma, "paper")))
        code = gradient(composed(given, asked_of(given, gamma, "code")) + plain(given, ce=1, kl=0))
        assert (float((paper - code).norm() / paper.norm()) < 1e-6) == is_same
    mass_N = asked_of(given, 1.5, "code").kl_weight_N
    assert (mass_N < 1).all()  # all that is not the label is weakened


@pytest.mark.parametrize("form", ["paper", "code"])
def test_rows_without_a_label_have_the_divergence_alone(form) -> None:
    asked = asked_of(sides(), 2.0, form)
    assert float(asked.ce_weight_N[4]) == 0
    assert float(asked.kl_weight_N[4]) > 0
    assert float(asked.ce_weight_N[5]) == (1 if form == "paper" else 0)  # p = 0 of a label out of reach


@pytest.mark.parametrize("form", ["paper", "code"])
def test_the_fast_head_and_chunks_of_rows_change_nothing(form, monkeypatch: pytest.MonkeyPatch) -> None:
    given = sides(torch.float32)
    whole = asked_of(given, 1.5, form)
    expected = composed(given, whole)
    monkeypatch.setattr(chunking, "CPU_CHUNK_BYTES", 1)
    monkeypatch.setattr(chunking, "CPU_TILE_ROWS", 2)
    apart = asked_of(given, 1.5, form)
    for a, b in zip(apart, whole, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(composed(given, apart, fast.head_loss), expected, rtol=1e-5, atol=1e-6)
