"""The reference losses against loops over the definition, identities of the divergences, and bad input.

Shape legend: N rows, V student vocabulary, U teacher vocabulary, C common columns, D student width,
E teacher width, I images.
"""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

from llava_kd.losses.divergence import (
    KINDS,
    Divergence,
    Kind,
    Temperature,
    divergence_rows,
    tail_share,
)
from llava_kd.losses.kernels import row_torch
from llava_kd.losses.reference import HeadLoss, head_loss, relation_rows

N, V, U, C, D, E = 5, 11, 13, 9, 4, 6
MIX = 0.3


def make_inputs(seed: int = 0) -> dict[str, Tensor]:
    """fp64 inputs with two vocabularies; row 1 has no cross-entropy, row 2 no KL, row 3 neither."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "student_ND": normal(N, D),
        "student_head_VD": normal(V, D),
        "student_bias_V": normal(V),
        "targets_N": torch.tensor([3, -100, 10, -100, 0]),
        "ce_weight_N": torch.tensor([0.5, 0.0, 2.0, 0.0, 1.0], dtype=torch.float64),
        "teacher_NE": normal(N, E),
        "teacher_head_UE": normal(U, E),
        "teacher_bias_U": normal(U),
        "kl_weight_N": torch.tensor([1.5, 0.25, 0.0, 0.0, 1.0], dtype=torch.float64),
    }


def run(inputs: dict[str, Tensor], **options: object) -> HeadLoss:
    return head_loss(**{"num_common": C, **inputs, **options})  # pyright: ignore[reportArgumentType]


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    total = sum(math.exp(x - top) for x in logits)
    return [math.exp(x - top) / total for x in logits]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def mixture(p: list[float], q: list[float], share: float) -> list[float]:
    return [share * a + (1 - share) * b for a, b in zip(p, q, strict=True)]


def by_definition(kind: Kind, p_t: list[float], p_s: list[float]) -> float:
    match kind:
        case "forward":
            return kl(p_t, p_s)
        case "reverse":
            return kl(p_s, p_t)
        case "jsd":
            m = mixture(p_t, p_s, MIX)
            return MIX * kl(p_t, m) + (1 - MIX) * kl(p_s, m)
        case "skewed_forward":
            return kl(p_t, mixture(p_t, p_s, MIX))
        case "skewed_reverse":
            return kl(p_s, mixture(p_s, p_t, MIX))
        case "total_variation":
            return max(  # the largest difference in the probability of any event
                sum(p_t[v] - p_s[v] for v in range(len(p_t)) if event >> v & 1)
                for event in range(2 ** len(p_t))
            )
        case "symmetric":
            return (1 - MIX) * kl(p_t, p_s) + MIX * kl(p_s, p_t)
        case "adaptive":
            tail = tail_by_definition(p_t, p_s, MIX)
            return (1 - tail) * kl(p_t, p_s) + tail * kl(p_s, p_t)


def tail_by_definition(p_t: list[float], p_s: list[float], head_mass: float) -> float:
    order = sorted(range(len(p_t)), key=lambda v: -p_t[v])
    head, mass = {order[0]}, 0.0
    for v in order:
        mass += p_t[v]
        if mass > head_mass:
            break
        head.add(v)
    gaps = [abs(a - b) for a, b in zip(p_t, p_s, strict=True)]
    return sum(gap for v, gap in enumerate(gaps) if v not in head) / sum(gaps)


def at(logits: list[float], temperature: Temperature) -> list[float]:
    divisor = statistics.stdev(logits) if isinstance(temperature, str) else temperature
    return [x / divisor for x in logits]


@pytest.mark.parametrize("temperature", [1.0, 2.5, "std"])
@pytest.mark.parametrize("kind", KINDS)
def test_head_loss_equals_loops_over_the_definition(kind: Kind, temperature: Temperature):
    inputs = make_inputs()
    result = run(inputs, temperature=temperature, divergence=Divergence(kind, MIX))
    student_NV = inputs["student_ND"] @ inputs["student_head_VD"].T + inputs["student_bias_V"]
    teacher_NU = inputs["teacher_NE"] @ inputs["teacher_head_UE"].T + inputs["teacher_bias_U"]
    total = 0.0
    for row in range(N):
        ce = divergence = 0.0
        if inputs["ce_weight_N"][row]:
            ce = -math.log(softmax(student_NV[row].tolist())[int(inputs["targets_N"][row])])
        if inputs["kl_weight_N"][row]:
            p_t = softmax(at(teacher_NU[row, :C].tolist(), temperature))
            p_s = softmax(at(student_NV[row, :C].tolist(), temperature))
            square = 1.0 if isinstance(temperature, str) else temperature**2
            divergence = square * by_definition(kind, p_t, p_s)
        assert float(result.ce_N[row]) == pytest.approx(ce, rel=1e-12, abs=1e-14)
        assert float(result.kl_N[row]) == pytest.approx(divergence, rel=1e-12, abs=1e-14)
        total += float(inputs["ce_weight_N"][row]) * ce + float(inputs["kl_weight_N"][row]) * divergence
    assert float(result.loss) == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, "std"])
@pytest.mark.parametrize("kind", KINDS)
def test_divergence_of_equal_models_is_zero(kind: Kind, temperature: Temperature):
    inputs = make_inputs()
    inputs |= {
        "teacher_NE": inputs["student_ND"],
        "teacher_head_UE": torch.cat([inputs["student_head_VD"], torch.ones(2, D, dtype=torch.float64)]),
        "teacher_bias_U": torch.cat([inputs["student_bias_V"], torch.ones(2, dtype=torch.float64)]),
    }
    student_ND = inputs["student_ND"].requires_grad_()
    result = run(
        inputs, divergence=Divergence(kind, MIX), temperature=temperature,
        ce_weight_N=torch.zeros(N, dtype=torch.float64),
    )  # fmt: skip
    (gradient_ND,) = torch.autograd.grad(result.loss, student_ND)
    torch.testing.assert_close(result.kl_N, torch.zeros_like(result.kl_N), atol=1e-13, rtol=0)
    torch.testing.assert_close(gradient_ND, torch.zeros_like(gradient_ND), atol=1e-13, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_divergence_is_positive_for_different_models(kind: Kind):
    kl_N = run(make_inputs(), divergence=Divergence(kind, MIX)).kl_N
    assert (kl_N[[0, 1, 4]] > 1e-3).all()


def test_reverse_is_forward_with_the_sides_exchanged():
    generator = torch.Generator().manual_seed(1)
    s_NC, t_NC = torch.randn(2, N, C, generator=generator, dtype=torch.float64).log_softmax(2)
    reverse = divergence_rows(s_NC, t_NC, Divergence("reverse"))
    torch.testing.assert_close(reverse, divergence_rows(t_NC, s_NC, Divergence("forward")))


def test_jsd_at_one_half_is_symmetric_and_at_most_log_two():
    generator = torch.Generator().manual_seed(1)
    s_NC, t_NC = (20 * torch.randn(2, N, C, generator=generator, dtype=torch.float64)).log_softmax(2)
    jsd = divergence_rows(s_NC, t_NC, Divergence("jsd", 0.5))
    torch.testing.assert_close(jsd, divergence_rows(t_NC, s_NC, Divergence("jsd", 0.5)))
    assert (jsd <= math.log(2)).all()


@pytest.mark.parametrize(("skewed", "plain"), [("skewed_forward", "forward"), ("skewed_reverse", "reverse")])
def test_skewed_divergence_tends_to_the_plain_one(skewed: Kind, plain: Kind):
    inputs = make_inputs()
    almost = run(inputs, divergence=Divergence(skewed, 1e-9)).kl_N
    torch.testing.assert_close(almost, run(inputs, divergence=Divergence(plain)).kl_N, rtol=1e-6, atol=0)


def test_kl_ignores_columns_outside_the_common_ones():
    inputs = make_inputs()
    before = run(inputs).kl_N
    inputs["student_bias_V"][C:] += 50
    inputs["teacher_bias_U"][C:] -= 50
    torch.testing.assert_close(run(inputs).kl_N, before)


def test_cross_entropy_sees_every_student_column():
    inputs = make_inputs()
    before = run(inputs).ce_N
    inputs["student_bias_V"][C:] += 50
    assert float((run(inputs).ce_N - before)[0]) > 10


def test_loss_does_not_depend_on_the_split():
    inputs = make_inputs()
    parts = [
        run({k: v[rows] if k.rsplit("_")[-1].startswith("N") else v for k, v in inputs.items()}).loss
        for rows in (slice(0, 2), slice(2, 2), slice(2, 5))
    ]
    torch.testing.assert_close(torch.stack(parts).sum(), run(inputs).loss)


@pytest.mark.parametrize("temperature", [1.0, "std"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "adaptive"])
def test_gradient_of_head_loss_passes_gradcheck(kind: Kind, temperature: Temperature):
    inputs = make_inputs()
    names = ("student_ND", "student_head_VD", "student_bias_V")
    options = {"divergence": Divergence(kind, MIX), "temperature": temperature}

    def loss(*values: Tensor) -> Tensor:
        return run(inputs | dict(zip(names, values, strict=True)), **options).loss

    assert torch.autograd.gradcheck(loss, [inputs[name].requires_grad_() for name in names])


def log_softmaxes(columns: int = C, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = scale * torch.randn(2, N, columns, generator=generator, dtype=torch.float64)
    return logits[0].log_softmax(1), logits[1].log_softmax(1)


def test_the_shares_of_the_adaptive_divergence_have_no_gradient():
    s_NC, t_NC = log_softmaxes()
    s_NC.requires_grad_()
    shares = tail_share(s_NC, t_NC, MIX).tolist()
    assert len({round(share, 6) for share in shares}) == N
    (found_NC,) = torch.autograd.grad(divergence_rows(s_NC, t_NC, Divergence("adaptive", MIX)).sum(), s_NC)
    fixed = torch.stack([
        divergence_rows(s_NC[[n]], t_NC[[n]], Divergence("symmetric", share))[0]
        for n, share in enumerate(shares)
    ])  # fmt: skip
    torch.testing.assert_close(found_NC, torch.autograd.grad(fixed.sum(), s_NC)[0])


@pytest.mark.parametrize(
    ("teacher", "tail"),
    [
        ([0.6, 0.3, 0.1], [1, 2]),  # the largest alone is more than the head may hold
        ([0.25, 0.3, 0.45], [0, 1]),  # the second crosses the bound, and is left out
        ([0.1, 0.2, 0.3, 0.4], [0, 1, 2]),
        ([0.4, 0.05, 0.05, 0.25, 0.25], [1, 2, 3, 4]),  # one of two equal ones would fit
        ([0.25, 0.25, 0.25, 0.25], []),  # equal ones all are the largest
        ([0.2, 0.3, 0.125, 0.25, 0.125], [0, 2, 4, 3]),  # 0.3 + 0.25 is more than a half
        ([1.0], []),
    ],
)
def test_where_the_head_of_the_adaptive_divergence_ends(teacher: list[float], tail: list[int]):
    """The head's mass is a half. `row_torch` finds the same among the largest columns."""
    p_t = torch.tensor([teacher], dtype=torch.float64)
    p_s = torch.full_like(p_t, 1e-9)  # so that the gap at a column is what the teacher holds there
    want = sum(teacher[v] - 1e-9 for v in tail) / sum(p - 1e-9 for p in teacher)
    for function in (tail_share, row_torch._tail_share):
        assert float(function(p_s.log(), p_t.log(), 0.5)) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("scale", [0.01, 1.0, 6.0], ids=["flat", "wide", "peaked"])
@pytest.mark.parametrize("head_mass", [0.1, 0.5, 0.9])
def test_the_share_of_the_tail_equals_loops_over_the_definition(scale: float, head_mass: float):
    """Flat rows have a head of more columns than `row_torch` looks at first."""
    s_NC, t_NC = log_softmaxes(3000, scale)
    want = [
        tail_by_definition(t_C.exp().tolist(), s_C.exp().tolist(), head_mass)
        for s_C, t_C in zip(s_NC, t_NC, strict=True)
    ]
    for function in (tail_share, row_torch._tail_share):
        assert function(s_NC, t_NC, head_mass).tolist() == pytest.approx(want, rel=1e-9)


def test_symmetric_at_one_half_is_symmetric():
    s_NC, t_NC = log_softmaxes()
    for kind in ("symmetric", "total_variation"):
        both = [divergence_rows(*sides, Divergence(kind, 0.5)) for sides in ((s_NC, t_NC), (t_NC, s_NC))]
        torch.testing.assert_close(both[0], both[1])


def test_total_variation_is_at_most_one_and_bounded_by_the_divergence():
    """Pinsker: TV^2 <= KL / 2."""
    s_NC, t_NC = log_softmaxes(scale=20)
    found_N = divergence_rows(s_NC, t_NC, Divergence("total_variation"))
    assert (found_N <= 1).all()
    assert (2 * found_N**2 <= divergence_rows(s_NC, t_NC, Divergence("forward"))).all()


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_the_temperature_std_does_not_see_scale_or_shift_of_a_side(side: str):
    inputs = make_inputs()
    before = run(inputs, temperature="std").kl_N
    rows, bias = (f"{side}_{end}" for end in (("ND", "bias_V") if side == "student" else ("NE", "bias_U")))
    inputs |= {rows: 7 * inputs[rows], bias: 7 * inputs[bias] + 5}
    torch.testing.assert_close(run(inputs, temperature="std").kl_N, before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_at_the_temperature_std_neither_stretches_nor_shifts_the_logits(kind: Kind):
    """What a detached deviation would miss: along the logits themselves nothing changes."""
    inputs = make_inputs()
    logits_NV = inputs["student_ND"] @ inputs["student_head_VD"].T + inputs["student_bias_V"]
    logits_NV.requires_grad_()
    eye_VV = torch.eye(V, dtype=torch.float64)
    found = run(
        inputs | {"student_ND": logits_NV, "student_head_VD": eye_VV, "student_bias_V": None},
        ce_weight_N=torch.zeros(N, dtype=torch.float64), temperature="std", divergence=Divergence(kind, MIX),
    )  # fmt: skip
    (gradient_NV,) = torch.autograd.grad(found.loss, logits_NV)
    assert float(gradient_NV.abs().max()) > 1e-3
    zeros_N = torch.zeros(N, dtype=torch.float64)
    torch.testing.assert_close(gradient_NV.sum(1), zeros_N, rtol=0, atol=1e-13)
    torch.testing.assert_close((gradient_NV * logits_NV.detach()).sum(1), zeros_N, rtol=0, atol=1e-13)


def test_a_row_without_spread_is_uniform_at_the_temperature_std():
    inputs = make_inputs()
    inputs |= {"student_ND": 0 * inputs["student_ND"], "student_bias_V": 0 * inputs["student_bias_V"]}
    leaf_ND = inputs["student_ND"].requires_grad_()
    found = run(inputs, temperature="std")
    teacher_NU = inputs["teacher_NE"] @ inputs["teacher_head_UE"].T + inputs["teacher_bias_U"]
    p_t = softmax(at(teacher_NU[0, :C].tolist(), "std"))
    assert float(found.kl_N[0]) == pytest.approx(kl(p_t, [1 / C] * C), rel=1e-12)
    assert torch.autograd.grad(found.loss, leaf_ND)[0].isfinite().all()


def test_teacher_receives_no_gradient():
    inputs = make_inputs()
    for name in ("student_ND", "teacher_NE", "teacher_head_UE"):
        inputs[name].requires_grad_()
    run(inputs).loss.backward()
    assert inputs["student_ND"].grad is not None
    assert inputs["teacher_NE"].grad is None
    assert inputs["teacher_head_UE"].grad is None


def test_low_precision_inputs_are_summed_in_fp32():
    inputs = {k: v.bfloat16() if v.ndim == 2 else v for k, v in make_inputs().items()}
    exact = {k: v.double() if v.ndim == 2 else v for k, v in inputs.items()}
    result = run({k: v.float() if v.is_floating_point() and v.ndim == 1 else v for k, v in inputs.items()})
    assert result.loss.dtype == torch.float32
    torch.testing.assert_close(result.loss.double(), run(exact).loss, rtol=1e-6, atol=0)


def test_autocast_does_not_change_the_loss():
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in make_inputs().items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(inputs).loss
    assert torch.equal(inside, run(inputs).loss)


def relation_by_definition(y_s: Tensor, y_t: Tensor) -> float:
    r_s, r_t = (torch.stack([torch.stack([a @ b for b in y]) for a in y]) for y in (y_s, y_t))
    dot = float((r_s * r_t).sum())
    return 1 - dot / math.sqrt(float((r_s**2).sum()) * float((r_t**2).sum()))


def make_relation(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 7, D), (2, 7, E), (V, D), (U, E))
    s, t, w, u = (torch.randn(*shape, generator=generator, dtype=torch.float64) + 0.5 for shape in shapes)
    return s, t, w, u


@pytest.mark.parametrize("tap", ["logits", "features"])
@pytest.mark.parametrize("centre", [False, True], ids=["raw", "centred"])
@pytest.mark.parametrize("normalise", [False, True], ids=["lengths", "unit"])
def test_relation_equals_loops_over_the_definition(tap: str, centre: bool, normalise: bool):
    student_IND, teacher_INE, head_VD, head_UE = make_relation()
    heads = {"student_head_VD": head_VD, "teacher_head_UE": head_UE} if tap == "logits" else {}
    rows_I = relation_rows(student_IND, teacher_INE, centre=centre, normalise=normalise, **heads)
    for image, row in enumerate(rows_I.tolist()):
        sides = [student_IND[image], teacher_INE[image]]
        if tap == "logits":
            sides = [sides[0] @ head_VD.T, sides[1] @ head_UE.T]
        if centre:
            sides = [y - sum(y) / len(y) for y in sides]
        if normalise:
            sides = [torch.stack([token / token.norm() for token in y]) for y in sides]
        assert row == pytest.approx(relation_by_definition(*sides), rel=1e-10)


def test_relation_of_a_model_with_itself_is_zero():
    student_IND, _, head_VD, _ = make_relation()
    rows_I = relation_rows(student_IND, student_IND, student_head_VD=head_VD, teacher_head_UE=head_VD)
    torch.testing.assert_close(rows_I, torch.zeros_like(rows_I), atol=1e-14, rtol=0)


def test_relation_of_models_that_almost_agree_keeps_its_precision():
    student_IND, _, _, _ = make_relation()
    moved_IND = student_IND + 1e-3 * torch.randn(
        student_IND.shape, generator=torch.Generator().manual_seed(1)
    )
    exact = relation_rows(student_IND, moved_IND)
    assert exact.max() < 1e-6
    torch.testing.assert_close(
        relation_rows(student_IND.float(), moved_IND.float()).double(), exact, rtol=2e-3, atol=0
    )


def test_relation_ignores_scale_and_rotation_of_the_features():
    student_IND, teacher_INE, _, _ = make_relation()
    rotation_DD = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64)).Q
    moved_IND = 1000 * student_IND @ rotation_DD
    torch.testing.assert_close(relation_rows(moved_IND, teacher_INE), relation_rows(student_IND, teacher_INE))


def test_centred_relation_ignores_what_all_tokens_share():
    student_IND, teacher_INE, _, _ = make_relation()
    shared = torch.full((D,), 30.0, dtype=torch.float64)
    centred = relation_rows(student_IND, teacher_INE, centre=True)
    torch.testing.assert_close(relation_rows(student_IND + shared, teacher_INE, centre=True), centred)
    raw, moved = relation_rows(student_IND, teacher_INE), relation_rows(student_IND + shared, teacher_INE)
    assert (moved - raw).abs().min() > 0.01


def test_normalised_relation_ignores_the_length_of_each_token():
    student_IND, teacher_INE, _, _ = make_relation()
    lengths_IN1 = torch.rand(2, 7, 1, dtype=torch.float64) + 0.5
    unit = relation_rows(student_IND, teacher_INE, normalise=True)
    torch.testing.assert_close(relation_rows(student_IND * lengths_IN1, teacher_INE, normalise=True), unit)


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
def test_gradient_of_relation_passes_gradcheck(centre: bool, normalise: bool):
    student_IND, teacher_INE, head_VD, head_UE = make_relation()

    def rows(student_IND: Tensor, head_VD: Tensor) -> Tensor:
        return relation_rows(
            student_IND, teacher_INE, student_head_VD=head_VD, teacher_head_UE=head_UE,
            centre=centre, normalise=normalise,
        )  # fmt: skip

    assert torch.autograd.gradcheck(rows, (student_IND.requires_grad_(), head_VD.requires_grad_()))


@pytest.mark.parametrize("mix", [0.0, 1.0, -0.1, math.nan])
def test_mix_outside_the_open_interval_is_refused(mix: float):
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        Divergence("jsd", mix)


def test_unknown_divergence_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"one of \['forward', 'reverse', 'jsd'.*got 'backward'"):
        Divergence("backward")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("kind", ["jsd", "skewed_forward", "skewed_reverse"])
@pytest.mark.parametrize("mix", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("noise", [0.0, 1e-3, 1e-1])
def test_small_mixture_divergences_have_no_bias_in_fp32(kind: str, mix: float, noise: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student_NC = 3 * torch.randn(64, 3000, generator=generator)
    teacher_NC = student_NC + noise * torch.randn(64, 3000, generator=generator)
    divergence = Divergence(kind=kind, mix=mix)  # pyright: ignore[reportArgumentType]
    exact_N = divergence_rows(
        student_NC.double().log_softmax(1), teacher_NC.double().log_softmax(1), divergence
    )
    plain_N = divergence_rows(student_NC.log_softmax(1), teacher_NC.log_softmax(1), divergence)
    rows_N, _ = row_torch._divergence(student_NC.log_softmax(1), teacher_NC.log_softmax(1), divergence)
    absolute = 1e-8 if kind == "jsd" else 4e-7  # a skewed form still holds the error of the log-softmax
    limit = 0.0 if noise == 0 else absolute + 1e-5 * float(exact_N.mean())
    for found_N in (plain_N, rows_N):
        assert abs(float((found_N.double() - exact_N).mean())) <= limit
