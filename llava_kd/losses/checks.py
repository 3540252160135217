"""What the loss functions accept, shared by the reference and the fast forms.

Shape legend: N rows, V student vocabulary, U teacher vocabulary, D student width, E teacher width, I images,
M teacher tokens of an image (N student tokens there).
"""

from __future__ import annotations

import math

from torch import Tensor

from llava_kd.losses.divergence import WHOLE_KINDS, Divergence, Temperature, check_temperature


def check_head_inputs(
    student_ND: Tensor,
    student_head_VD: Tensor,
    targets_N: Tensor,
    *,
    ce_weight_N: Tensor,
    student_bias_V: Tensor | None,
    teacher_NE: Tensor | None,
    teacher_head_UE: Tensor | None,
    teacher_bias_U: Tensor | None,
    kl_weight_N: Tensor | None,
    temperature: Temperature,
    num_common: int | None,
    student_cap: float | None = None,
    teacher_cap: float | None = None,
) -> int:
    """The number of common columns (0 without a teacher), or a ValueError that says which input is off."""
    num_rows = student_ND.shape[0]
    check_caps(student_cap, teacher_cap)
    _check_head("student", student_ND, student_head_VD, student_bias_V)
    _check_rows(num_rows, targets_N=targets_N, ce_weight_N=ce_weight_N)
    check_temperature(temperature)
    if teacher_NE is None and teacher_head_UE is None and kl_weight_N is None:
        if teacher_bias_U is not None or num_common is not None:
            raise ValueError(
                "teacher_bias_U and num_common need a teacher; give teacher_NE, or leave them out"
            )
        return 0
    if teacher_NE is None or teacher_head_UE is None or kl_weight_N is None:
        raise ValueError("teacher_NE, teacher_head_UE and kl_weight_N go together; give all three or none")
    _check_head("teacher", teacher_NE, teacher_head_UE, teacher_bias_U)
    if teacher_NE.shape[0] != num_rows:
        raise ValueError(
            f"student and teacher must have the same rows; got {num_rows} and {teacher_NE.shape[0]}"
        )
    _check_rows(num_rows, kl_weight_N=kl_weight_N)
    vocabularies = (student_head_VD.shape[0], teacher_head_UE.shape[0])
    if num_common is None and vocabularies[0] != vocabularies[1]:
        raise ValueError(
            f"student and teacher heads have {vocabularies[0]} and {vocabularies[1]} rows; pass num_common, "
            "the number of leading columns that mean the same token in both"
        )
    num_common = min(vocabularies) if num_common is None else num_common
    if not 1 <= num_common <= min(vocabularies):
        raise ValueError(f"num_common must lie in 1..{min(vocabularies)}; got {num_common}")
    return num_common


def check_caps(*caps: float | None) -> None:
    """ValueError for a cap of logits that is not above 0 and finite; None is no cap."""
    for cap in caps:
        if cap is not None and not (cap > 0 and math.isfinite(cap)):
            raise ValueError(f"the cap of a head's logits must be positive and finite; got {cap}")


def check_targets(targets_N: Tensor, ce_weight_N: Tensor, num_classes: int) -> None:
    """ValueError for a target outside the vocabulary on a row that has a cross-entropy weight."""
    is_bad_N = (ce_weight_N != 0) & ((targets_N < 0) | (targets_N >= num_classes))
    if bool(is_bad_N.any()):
        row = int(is_bad_N.nonzero()[0])
        raise ValueError(
            f"targets must lie in 0..{num_classes - 1} where ce_weight_N is not zero; row {row} has "
            f"{int(targets_N[row])} with weight {float(ce_weight_N[row])}"
        )


def check_top_k(
    student_ND: Tensor,
    student_head_VD: Tensor,
    logits_NK: Tensor,
    columns_NK: Tensor,
    rest_N: Tensor,
    num_common: int,
) -> None:
    """ValueError where what was kept of a teacher's logits does not fit the rows or the columns."""
    num_rows, num_classes = student_ND.shape[0], student_head_VD.shape[0]
    if not 1 <= num_common <= num_classes:
        raise ValueError(f"num_common must lie in 1..{num_classes}; got {num_common}")
    shapes = [list(tensor.shape) for tensor in (logits_NK, columns_NK, rest_N)]
    width = shapes[0][1] if len(shapes[0]) == 2 else 0
    if shapes != [[num_rows, width], [num_rows, width], [num_rows]] or not 1 <= width < num_common:
        raise ValueError(
            f"top k: logits and columns must be [{num_rows}, k] with k in 1..{num_common - 1}, and the rest "
            f"[{num_rows}]; got {shapes[0]}, {shapes[1]} and {shapes[2]}"
        )


def check_softening_of_top_k(
    temperature: Temperature, divergence: Divergence, std_N: Tensor | None, num_rows: int
) -> None:
    """ValueError where the largest logits do not serve the divergence, or are of another temperature."""
    if divergence.kind in WHOLE_KINDS:
        raise ValueError(
            f"the divergence {divergence.kind!r} needs all of a teacher's columns, of which the largest "
            "logits hide the tail; choose another divergence, or give the teacher's hidden states"
        )
    check_temperature(temperature)
    if isinstance(temperature, str) != (std_N is not None):
        has = "none" if std_N is None else "some"
        raise ValueError(
            "top k: standard deviations of the teacher's logits are given at temperature 'std' and at no "
            f"other; got temperature {temperature!r} and {has}"
        )
    if std_N is not None:
        _check_rows(num_rows, std_N=std_N)


def _check_head(side: str, hidden_ND: Tensor, head_VD: Tensor, bias_V: Tensor | None) -> None:
    if hidden_ND.ndim != 2 or head_VD.ndim != 2 or hidden_ND.shape[1] != head_VD.shape[1]:
        raise ValueError(
            f"{side} rows [N, width] and head [vocabulary, width] must agree in width; got "
            f"{list(hidden_ND.shape)} and {list(head_VD.shape)}"
        )
    if bias_V is not None and bias_V.shape != head_VD.shape[:1]:
        raise ValueError(
            f"{side} bias must have an entry per head row, {head_VD.shape[0]}; got {list(bias_V.shape)}"
        )


def _check_rows(num_rows: int, **vectors: Tensor) -> None:
    for name, vector in vectors.items():
        if vector.shape != (num_rows,):
            raise ValueError(
                f"{name} must have an entry for each of the {num_rows} student rows; got {list(vector.shape)}"
            )


def check_relation_inputs(
    student_IND: Tensor,
    teacher_IME: Tensor,
    student_head_VD: Tensor | None,
    teacher_head_UE: Tensor | None,
) -> None:
    """ValueError where the two sides do not have the same images, tokens or tap."""
    if student_IND.ndim != 3 or teacher_IME.ndim != 3 or student_IND.shape[:2] != teacher_IME.shape[:2]:
        raise ValueError(
            "a relation compares the same tokens of the same images: [images, tokens, width] must agree in "
            f"the first two sizes; got student {list(student_IND.shape)}, teacher {list(teacher_IME.shape)}"
        )
    if (student_head_VD is None) != (teacher_head_UE is None):
        raise ValueError("give both heads to compare logits, or neither to compare the features themselves")
    for side, features, head in (
        ("student", student_IND, student_head_VD),
        ("teacher", teacher_IME, teacher_head_UE),
    ):
        if head is not None and (head.ndim != 2 or head.shape[1] != features.shape[2]):
            raise ValueError(
                f"{side} features and head must agree in width; "
                f"got {list(features.shape)} and {list(head.shape)}"
            )


def check_dbild_inputs(
    student_ND: Tensor,
    student_head_VD: Tensor,
    teacher_NE: Tensor,
    teacher_head_UE: Tensor,
    *,
    temperature: float,
    candidates: int,
    num_common: int | None,
    caps: tuple[float | None, float | None] = (None, None),
) -> int:
    """The number of common columns, or a ValueError that says which input is off."""
    check_caps(*caps)
    _check_head("student", student_ND, student_head_VD, None)
    _check_head("teacher", teacher_NE, teacher_head_UE, None)
    if student_ND.shape[0] != teacher_NE.shape[0]:
        raise ValueError(
            "student and teacher must have the same rows; "
            f"got {student_ND.shape[0]} and {teacher_NE.shape[0]}"
        )
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive and finite; got {temperature}")
    if candidates < 4:
        raise ValueError(f"candidates must be at least 4, for pairs to compare; got {candidates}")
    vocabularies = (student_head_VD.shape[0], teacher_head_UE.shape[0])
    num_common = min(vocabularies) if num_common is None else num_common
    if not 2 <= num_common <= min(vocabularies):
        raise ValueError(f"num_common must lie in 2..{min(vocabularies)}; got {num_common}")
    return num_common


def check_attention_inputs(student_LINN: Tensor, teacher_LINN: Tensor) -> None:
    """ValueError where the two sides do not have the same images and tokens, or no layer."""
    shapes = f"got student {list(student_LINN.shape)}, teacher {list(teacher_LINN.shape)}"
    if student_LINN.ndim != 4 or student_LINN.shape[1:] != teacher_LINN.shape[1:]:
        raise ValueError(
            "attention maps [layers, images, tokens, tokens] must agree in all but the layers; " + shapes
        )
    if student_LINN.shape[2] != student_LINN.shape[3] or 0 in (student_LINN.shape[0], teacher_LINN.shape[0]):
        raise ValueError("attention maps must be square and have at least one layer on each side; " + shapes)
    if student_LINN.shape[1] > 0 and student_LINN.shape[2] < 2:
        raise ValueError("attention between the tokens of an image needs at least 2 of them; " + shapes)
