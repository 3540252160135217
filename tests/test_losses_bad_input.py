"""What both forms of the head loss do with bad input, forward and gradient."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from loss_inputs import LEAVES, D, E, assert_same, make_inputs, result_and_gradients, run

from llava_kd.losses import head_loss as fast
from llava_kd.losses import reference
from llava_kd.losses.divergence import KINDS, Divergence, Kind, Temperature

BOTH = pytest.mark.parametrize("path", [reference, fast], ids=["reference", "fast"])


@BOTH
@pytest.mark.parametrize("rows", [0, 4], ids=["no rows", "no weights"])
def test_nothing_to_do_gives_a_zero_that_is_joined_to_the_graph(path: ModuleType, rows: int):
    inputs = make_inputs(rows=rows)
    inputs |= {"ce_weight_N": torch.zeros(rows), "kl_weight_N": torch.zeros(rows)}
    inputs["student_ND"][:] = torch.nan  # no row is read
    result = result_and_gradients(path, inputs)
    assert float(result["loss"].detach()) == 0
    for name in LEAVES:
        assert result[name].shape == inputs[name].shape
        assert result[name].count_nonzero() == 0


@BOTH
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["student_ND", "teacher_NE"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_bad_hidden_state_makes_loss_and_gradient_nan(
    path: ModuleType, bad: float, side: str, temperature: float
):
    inputs = make_inputs()
    inputs[side][1, 3] = bad  # row 1 has a KL weight alone
    result = result_and_gradients(path, inputs, temperature=temperature)
    assert result["loss"].isnan()
    assert result["student_ND"][1].isnan().any()
    assert result["student_head_VD"].isnan().any()
    assert result["kl_N"].isnan().nonzero().flatten().tolist() == [1]
    assert result["student_ND"][[0, 2]].isfinite().all()


@BOTH
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_bad_hidden_state_makes_cross_entropy_nan_whatever_the_head(
    path: ModuleType, bad: float, sign: float
):
    inputs = make_inputs()
    inputs["student_head_VD"][:, 3] = sign * inputs["student_head_VD"][:, 3].abs()  # all logits to one side
    inputs["student_ND"][2, 3] = bad  # row 2 has a cross-entropy weight alone
    result = result_and_gradients(path, inputs)
    assert result["loss"].isnan()
    assert result["ce_N"].isnan().nonzero().flatten().tolist() == [2]
    assert result["student_ND"][2].isnan().any()


@BOTH
@pytest.mark.parametrize("side", ["student_bias_V", "teacher_bias_U"])
@pytest.mark.parametrize("temperature", [2.0, "std"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_infinite_logit_makes_every_divergence_nan(
    path: ModuleType, kind: Kind, temperature: Temperature, side: str
):
    """Also where the mass there is 0 and the distance would be finite."""
    inputs = make_inputs()
    inputs[side][40] = -math.inf
    result = run(path, inputs, divergence=Divergence(kind, 0.3), temperature=temperature)
    has_kl_N = inputs["kl_weight_N"] != 0
    assert result.loss.isnan()
    assert result.kl_N[has_kl_N].isnan().all()


@BOTH
@pytest.mark.parametrize("temperature", [2.0, "std"])
@pytest.mark.parametrize("kind", KINDS)
def test_columns_that_are_not_common_may_hold_anything(
    path: ModuleType, kind: Kind, temperature: Temperature
):
    inputs = make_inputs() | {"ce_weight_N": torch.zeros(13)}
    options = {"divergence": Divergence(kind, 0.3), "temperature": temperature, "num_common": 65}
    before = result_and_gradients(path, inputs, **options)
    inputs["student_bias_V"][65:], inputs["teacher_bias_U"][65:] = -math.inf, math.nan
    assert_same(result_and_gradients(path, inputs, **options), before, tolerance=0.0)


@BOTH
def test_what_a_row_without_weight_holds_does_not_matter(path: ModuleType):
    inputs = make_inputs()
    expected = result_and_gradients(path, inputs)
    inputs["student_ND"][3] = torch.nan
    inputs["teacher_NE"][2:4] = torch.inf  # row 2 has a cross-entropy weight alone
    assert_same(result_and_gradients(path, inputs), expected, tolerance=0.0)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("row", [1, 2], ids=["kl", "cross-entropy"])
def test_overflowing_fp16_logit_makes_loss_and_gradient_nan(sign: float, row: int):
    """Also where a single, negative logit overflows, which a softmax alone would not show."""
    inputs = make_inputs()
    inputs["student_ND"][row] = 0
    inputs["student_ND"][row, 3] = 1000
    inputs["student_head_VD"][:, 3] = 0
    inputs["student_head_VD"][40, 3] = 100 * sign
    assert result_and_gradients(fast, inputs)["loss"].isfinite()
    result = result_and_gradients(fast, inputs, logits_dtype=torch.float16)
    assert result["loss"].isnan()
    assert result["student_ND"][row].isnan().any()


def test_fp16_logits_agree_with_fp32_ones_to_their_precision():
    inputs = make_inputs()
    exact = result_and_gradients(fast, inputs)
    assert_same(result_and_gradients(fast, inputs, logits_dtype=torch.float16), exact, tolerance=2e-3)


@BOTH
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, r"temperature must be positive and finite; got 0\.0"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"temperature": math.nan}, "temperature must be positive"),
        ({"temperature": "stdd"}, "temperature must be a number or 'std'; got 'stdd'"),
        ({"num_common": None}, r"heads have 70 and 90 rows; pass num_common"),
        ({"num_common": 0}, r"num_common must lie in 1\.\.70; got 0"),
        ({"num_common": 71}, r"num_common must lie in 1\.\.70; got 71"),
        ({"kl_weight_N": None}, "go together"),
        ({"teacher_NE": torch.zeros(12, E)}, "same rows; got 13 and 12"),
        (
            {"teacher_NE": torch.zeros(13, E + 1)},
            r"teacher rows .* agree in width; got \[13, 25\] and \[90, 24\]",
        ),
        ({"student_head_VD": torch.zeros(70, D + 1)}, "student rows .* agree in width"),
        ({"student_bias_V": torch.zeros(69)}, "student bias must have an entry per head row, 70"),
        ({"ce_weight_N": torch.zeros(12)}, "ce_weight_N must have an entry for each of the 13"),
        ({"targets_N": torch.full((13,), 70)}, r"targets must lie in 0\.\.69 .* row 0 has 70"),
        ({"targets_N": torch.full((13,), -100)}, r"targets must lie in 0\.\.69 .* row 0 has -100"),
    ],
    ids=str,
)
def test_bad_argument_is_refused_with_what_came(path: ModuleType, change: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        run(path, make_inputs(), **change)


@BOTH
def test_teacher_options_without_a_teacher_are_refused(path: ModuleType):
    inputs = {k: v for k, v in make_inputs().items() if "teacher" not in k and "kl" not in k}
    with pytest.raises(ValueError, match="need a teacher"):
        run(path, inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logits_dtype": torch.bfloat16}, "float32 or torch.float16"),
        ({"chunk_rows": 0}, "must be positive; got 0"),
    ],
)
def test_bad_option_of_the_fast_path_is_refused(options: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        run(fast, make_inputs(), **options)


@BOTH
def test_a_divergence_that_a_form_lacks_is_refused(path: ModuleType) -> None:
    """Not a loss of zero: the list of kinds grew, and this form did not."""
    another = Divergence()
    object.__setattr__(another, "kind", "another")
    with pytest.raises(ValueError, match="lacks the divergence 'another'"):
        run(path, make_inputs(), divergence=another)
