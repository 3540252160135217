"""The head loss against the k largest logits: what bounds the formula, and the fast form against it.

Shape legend: N rows, V student vocabulary, C common columns, K kept columns.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llava_kd.assembly.cache_teacher import largest
from llava_kd.losses import reference, reference_top_k, top_k
from llava_kd.losses.divergence import KINDS, WHOLE_KINDS, Divergence, Kind, Temperature
from llava_kd.losses.reference_top_k import TopK

COMMON = 33
MERGED = [kind for kind in KINDS if kind not in WHOLE_KINDS]
LEAVES = ("student_ND", "student_head_VD", "student_bias_V")


def make(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Rows with cross-entropy, with KL, with both, with neither; more student columns than common ones."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    kind_N = torch.arange(11) % 4
    return {
        "student_ND": normal(11, 8),
        "student_head_VD": normal(40, 8),
        "student_bias_V": normal(40),
        "targets_N": torch.where(kind_N % 2 == 0, 7, -100),
        "ce_weight_N": torch.rand(11, generator=generator).to(dtype) * (kind_N % 2 == 0),
        "kl_weight_N": torch.rand(11, generator=generator).to(dtype) * (kind_N < 2),
        "teacher_NE": normal(11, 6),
        "teacher_head_UE": normal(COMMON, 6),
        "teacher_bias_U": normal(COMMON),
    }


def kept(inputs: dict[str, Tensor], k: int, temperature: Temperature) -> TopK:
    logits_NC = inputs["teacher_NE"] @ inputs["teacher_head_UE"].T + inputs["teacher_bias_U"]
    top_NK, columns_NK = logits_NC.topk(k, dim=1)
    std_N = logits_NC.std(1) if isinstance(temperature, str) else None
    others_NC = logits_NC.scatter(1, columns_NK, -torch.inf)
    others_NC = others_NC / (temperature if std_N is None else std_N.unsqueeze(1))
    return TopK(logits_NK=top_NK, columns_NK=columns_NK, rest_N=others_NC.logsumexp(1), std_N=std_N)


def student_of(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in inputs.items() if not name.startswith("teacher")}


def full_kl(inputs: dict[str, Tensor], temperature: Temperature, divergence: Divergence) -> Tensor:
    options = {"temperature": temperature, "divergence": divergence, "num_common": COMMON}
    return reference.head_loss(**inputs, **options).kl_N  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("kind", MERGED)
@pytest.mark.parametrize("temperature", [1.0, 2.5, "std"])
def test_buckets_never_tell_more_than_all_columns_and_all_of_it_where_one_is_left_out(
    kind: Kind, temperature: Temperature
) -> None:
    inputs, divergence = make(), Divergence(kind, 0.3)
    whole_N = full_kl(inputs, temperature, divergence)
    before_N = torch.zeros_like(whole_N)
    for k in (1, 4, 16, COMMON - 1):
        found_N = reference_top_k.top_k_head_loss(
            **student_of(inputs), top=kept(inputs, k, temperature), num_common=COMMON,
            temperature=temperature, divergence=divergence,
        ).kl_N  # fmt: skip
        assert (found_N <= whole_N + 1e-12).all()
        assert (found_N >= before_N - 1e-12).all()
        before_N = found_N
    torch.testing.assert_close(before_N, whole_N, rtol=1e-9, atol=1e-12)


def test_the_formula_by_hand() -> None:
    """Two columns of four and a bucket, from probabilities that are written down."""
    student, teacher = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0.1, 0.6, 0.25, 0.05])
    top = TopK(
        logits_NK=teacher[[1, 2]].log().view(1, 2),
        columns_NK=torch.tensor([[1, 2]]),
        rest_N=teacher[[0, 3]].sum().log().view(1),
    )
    found = reference_top_k.top_k_head_loss(
        student.log().view(1, 4), torch.eye(4), torch.tensor([-100]), ce_weight_N=torch.zeros(1), top=top,
        kl_weight_N=torch.ones(1), num_common=4,
    )  # fmt: skip
    p, q = torch.tensor([0.6, 0.25, 0.15]), torch.tensor([0.3, 0.2, 0.5])
    torch.testing.assert_close(found.loss, (p * (p / q).log()).sum())


@pytest.mark.parametrize("k", [1, 4, 16])
def test_buckets_hide_no_more_of_the_total_variation_than_the_lesser_rest(k: int) -> None:
    inputs = make()
    student_NC = (
        inputs["student_ND"] @ inputs["student_head_VD"].T + inputs["student_bias_V"]
    )[:, :COMMON]  # fmt: skip
    top, divergence = kept(inputs, k, 1.0), Divergence("total_variation")
    found_N = reference_top_k.top_k_head_loss(
        **student_of(inputs), top=top, num_common=COMMON, divergence=divergence
    ).kl_N
    rest_s_N = 1 - student_NC.softmax(1).gather(1, top.columns_NK).sum(1)
    rest_t_N = 1 / (1 + (top.logits_NK.logsumexp(1) - top.rest_N).exp())
    hidden_N = full_kl(inputs, 1.0, divergence) - found_N
    assert (hidden_N <= torch.minimum(rest_s_N, rest_t_N) + 1e-12).all()
    assert hidden_N.max() > 1e-3


@pytest.mark.parametrize("temperature", [1.0, "std"])
@pytest.mark.parametrize("kind", MERGED)
def test_equal_models_have_no_divergence(kind: Kind, temperature: Temperature) -> None:
    inputs = make()
    inputs |= {"teacher_NE": inputs["student_ND"], "teacher_head_UE": inputs["student_head_VD"][:COMMON]}
    inputs["teacher_bias_U"] = inputs["student_bias_V"][:COMMON]
    # Over the student's common columns alone the two deviations agree.
    for path in (reference_top_k, top_k):
        found = path.top_k_head_loss(
            **student_of(inputs), top=kept(inputs, 5, temperature), num_common=COMMON,
            temperature=temperature, divergence=Divergence(kind, 0.3),
        )  # fmt: skip
        assert found.kl_N.abs().max() < 1e-12


@pytest.mark.parametrize("kind", MERGED)
@pytest.mark.parametrize("temperature", [1.0, 2.5, "std"])
@pytest.mark.parametrize("chunk_rows", [2, None])
def test_the_fast_form_equals_the_formula_in_value_and_gradient(
    kind: Kind, temperature: Temperature, chunk_rows: int | None
) -> None:
    inputs = make()
    options = {"temperature": temperature, "divergence": Divergence(kind, 0.3), "num_common": COMMON}
    results = []
    for path, more in ((reference_top_k, {}), (top_k, {"chunk_rows": chunk_rows})):
        given = student_of(inputs)
        leaves = {name: given[name].clone().requires_grad_() for name in LEAVES}
        found = path.top_k_head_loss(
            **{**given, **leaves}, top=kept(inputs, 6, temperature), **options, **more
        )
        results.append([*found, *torch.autograd.grad(found.loss * 1.7, list(leaves.values()))])
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_what_a_cache_keeps_is_what_the_formula_reads() -> None:
    inputs = make(torch.float32)
    teacher = [inputs[name] for name in ("teacher_NE", "teacher_head_UE", "teacher_bias_U")]
    for temperature in (2.0, "std"):
        found, want = largest(*teacher, k=6, temperature=temperature), kept(inputs, 6, temperature)
        torch.testing.assert_close(found["top_logits_MK"], want.logits_NK)
        torch.testing.assert_close(found["rest_M"], want.rest_N)
        assert torch.equal(found["top_columns_MK"].long(), want.columns_NK)
        assert ("std_M" in found) == (want.std_N is not None)
    torch.testing.assert_close(found["std_M"], want.std_N)


@pytest.mark.parametrize("path", [reference_top_k, top_k], ids=["reference", "fast"])
def test_what_the_largest_logits_cannot_serve_is_refused(path) -> None:
    inputs = make()
    options = {**student_of(inputs), "num_common": COMMON}
    with pytest.raises(ValueError, match="'adaptive' needs all of a teacher's columns"):
        path.top_k_head_loss(**options, top=kept(inputs, 6, 1.0), divergence=Divergence("adaptive"))
    with pytest.raises(ValueError, match="at no other; got temperature 'std' and none"):
        path.top_k_head_loss(**options, top=kept(inputs, 6, 1.0), temperature="std")
    with pytest.raises(ValueError, match=r"got temperature 2\.0 and some"):
        path.top_k_head_loss(**options, top=kept(inputs, 6, "std"), temperature=2.0)


@pytest.mark.parametrize("path", [reference_top_k, top_k], ids=["reference", "fast"])
def test_kept_logits_of_other_rows_or_all_columns_are_refused(path) -> None:
    inputs = make()
    top = kept(inputs, 6, 1.0)
    for bad in (top[torch.arange(10)], kept(inputs, COMMON, 1.0)):
        with pytest.raises(ValueError, match=r"top k: .* k in 1..32"):
            path.top_k_head_loss(**student_of(inputs), top=bad, num_common=COMMON)
