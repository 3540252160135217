"""How response tokens resemble the visual tokens of their image, in the student as in the teacher.

Of an image with visual states V and the states H of the response tokens of its record, R = H V^T. A row is
1 - cos(vec R_s, vec R_t), one an image. LLaVA-KD (arXiv 2410.16236) compares V V^T so; matrices between text
and vision are compared by EM-KD (arXiv 2511.21106), by another distance. There is one form: the matrices are
small, and no head is involved.

Shape legend: I images, P response tokens of a record (fewer are filled up), N visual tokens, D and E width
of student and teacher.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_kd.losses.reference import accumulation_dtype, cosine_distance_rows, unit_rows


def text_relation_rows(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    is_there_IP: Tensor,
    *,
    centre: bool = False,
    normalise: bool = False,
    normalise_rows: bool = False,
) -> Tensor:
    """[I], 0 for an image without response tokens. The teacher receives no gradient.

    A side is its response states [I, P, width] and its visual ones [I, N, width]; tokens that are not
    `is_there_IP` count as zeros. `centre` subtracts the mean visual state of the image, `normalise` scales
    every state to length one, `normalise_rows` every token's row of R. ValueError where sides do not match.
    """
    _check(student, teacher, is_there_IP)
    how = {"centre": centre, "normalise": normalise, "normalise_rows": normalise_rows}
    with torch.autocast(is_there_IP.device.type, enabled=False):
        student_IPN = _relation(*student, is_there_IP, **how)
        with torch.no_grad():
            teacher_IPN = _relation(*teacher, is_there_IP, **how)
        return cosine_distance_rows(student_IPN, teacher_IPN) * is_there_IP.any(1)


def _relation(
    text_IPD: Tensor,
    visual_IND: Tensor,
    is_there_IP: Tensor,
    *,
    centre: bool,
    normalise: bool,
    normalise_rows: bool,
) -> Tensor:
    dtype = accumulation_dtype(text_IPD)
    text_IPD = text_IPD.to(dtype).masked_fill(~is_there_IP.unsqueeze(2), 0.0)
    visual_IND = visual_IND.to(dtype)
    if centre:
        visual_IND = visual_IND - visual_IND.mean(1, keepdim=True)
    if normalise:
        text_IPD, visual_IND = unit_rows(text_IPD), unit_rows(visual_IND)
    relation_IPN = text_IPD @ visual_IND.mT
    return unit_rows(relation_IPN) if normalise_rows else relation_IPN


def _check(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], is_there_IP: Tensor) -> None:
    for what, of_student, of_teacher in zip(("response", "visual"), student, teacher, strict=True):
        if of_student.ndim != 3 or of_student.shape[:2] != of_teacher.shape[:2]:
            raise ValueError(
                f"{what} states [images, tokens, width] must agree in the first two sizes; got student "
                f"{list(of_student.shape)}, teacher {list(of_teacher.shape)}"
            )
    if is_there_IP.shape != student[0].shape[:2] or len(is_there_IP) != len(student[1]):
        raise ValueError(
            "the mask of response tokens [images, tokens] must fit the response states "
            f"{list(student[0].shape)} and the number of images of the visual states, {len(student[1])}; got "
            f"{list(is_there_IP.shape)}"
        )
