"""The relation loss through Gram matrices beside the one that forms the logits: time, memory, error.

    python benchmarks/relation.py --device cuda --json benchmarks/results/relation_h200.json

Seconds are medians of forward and backward, run in turn in one process. Memory is what a call holds at its
peak beyond its inputs. Errors are relative to fp64, computed over blocks of the vocabulary without the Gram
identity. The teacher's Gram matrix is computed beforehand, as in training; so is a frozen student's.

Shape legend: I images, N tokens of an image, V vocabulary, W columns of a block of it, D student width,
E teacher width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from _common import Row, interleaved_median, meta, parser, peak_extra_bytes, print_table, write_json
from torch import Tensor

from llava_kd.losses import reference, relation
from llava_kd.losses.relation import head_gram

COLUMNS = ("case", "impl", "seconds", "speedup", "peak_extra_bytes", "row_error", "dh_error", "dw_error")
VOCABULARY_AT_A_TIME = 8192


@dataclass(frozen=True, kw_only=True)
class Case:
    student_IND: Tensor
    student_head_VD: Tensor
    teacher_IME: Tensor
    teacher_head_VE: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.student_IND, self.student_head_VD) if t.requires_grad]


def make_case(
    *, images: int, tokens: int, widths: tuple[int, int], vocabulary: int, frozen: bool, device: str
) -> Case:
    """Rows that share a component, as visual tokens do; bf16 on CUDA, fp32 on a CPU."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    sides = []
    for width in widths:
        rows_IND = (normal(images, tokens, width) + normal(1, 1, width)).to(dtype)
        sides += [rows_IND, (normal(vocabulary, width) * 2 / width**0.5).to(dtype)]
    return Case(
        student_IND=sides[0].requires_grad_(),
        student_head_VD=sides[1].requires_grad_(not frozen),
        teacher_IME=sides[2],
        teacher_head_VE=sides[3],
    )


def materialised(case: Case) -> Tensor:
    return reference.relation_rows(
        case.student_IND, case.teacher_IME,
        student_head_VD=case.student_head_VD, teacher_head_UE=case.teacher_head_VE,
    )  # fmt: skip


def through_gram(case: Case) -> Callable[[Case], Tensor]:
    """The fast form, with what training computes once computed here."""
    teacher_gram_EE = head_gram(case.teacher_head_VE)
    student_gram_DD = None if case.student_head_VD.requires_grad else head_gram(case.student_head_VD)

    def rows(case: Case) -> Tensor:
        return relation.relation_rows(
            case.student_IND, case.teacher_IME, student_head_VD=case.student_head_VD,
            student_gram_DD=student_gram_DD, teacher_gram_EE=teacher_gram_EE,
        )  # fmt: skip

    return rows


def relations(features_IND: Tensor, head_VD: Tensor) -> Tensor:
    """Y Y^T in fp64, a block of the vocabulary at a time."""
    features_IND = features_IND.detach().double()
    images, tokens, _ = features_IND.shape
    total_INN = features_IND.new_zeros(images, tokens, tokens)
    for head_WD in head_VD.detach().split(VOCABULARY_AT_A_TIME):
        y_INW = features_IND @ head_WD.double().T
        total_INN += y_INW @ y_INW.mT
    return total_INN


def exact(case: Case) -> list[Tensor]:
    """Rows, and the gradients of their sum with respect to the leaves, in fp64 without the Gram identity."""
    student_INN = relations(case.student_IND, case.student_head_VD).requires_grad_()
    rows_I = reference.cosine_distance_rows(student_INN, relations(case.teacher_IME, case.teacher_head_VE))
    (gradient_INN,) = torch.autograd.grad(rows_I.sum(), student_INN)
    gradient_INN = gradient_INN + gradient_INN.mT
    features_IND = case.student_IND.detach().double()
    dh_IND, dw = torch.zeros_like(features_IND), []
    for head_WD in case.student_head_VD.detach().double().split(VOCABULARY_AT_A_TIME):
        dy_INW = gradient_INN @ (features_IND @ head_WD.T)
        dh_IND += dy_INW @ head_WD
        if case.student_head_VD.requires_grad:
            dw.append(dy_INW.flatten(0, 1).T @ features_IND.flatten(0, 1))
    return [rows_I.detach(), dh_IND, *([torch.cat(dw)] if dw else [])]


def measure(name: str, case: Case, *, device: str, repeats: int, budget: float) -> list[Row]:
    """One row for each way."""
    truth = exact(case)
    calls: dict[str, Callable[[], object]] = {}
    rows: dict[str, Row] = {}
    for impl, way in (("materialised", materialised), ("Gram", through_gram(case))):
        values_I = way(case)
        found = [values_I.detach(), *torch.autograd.grad(values_I.sum(), case.leaves)]
        errors = [float((got - want).norm() / want.norm()) for got, want in zip(found, truth, strict=True)]
        del values_I, found
        rows[impl] = {"case": name, "impl": impl, **dict(zip(COLUMNS[-3:], errors, strict=False))}
        calls[impl] = lambda way=way: torch.autograd.grad(way(case).sum(), case.leaves)
        rows[impl]["peak_extra_bytes"] = peak_extra_bytes(calls[impl], device=device)
    seconds = interleaved_median(calls, device=device, repeats=repeats, budget_s=budget)
    for impl, row in rows.items():
        row |= {"seconds": seconds[impl], "speedup": seconds["materialised"] / seconds[impl]}
    return list(rows.values())


def main() -> None:
    options = parser("Time, memory and error of the relation loss.")
    options.add_argument("--images", type=int, help="images of a batch (default: 8 on CUDA, 1 on a CPU)")
    options.add_argument("--tokens", type=int, default=729)
    options.add_argument("--vocabulary", type=int, default=151936)
    arguments = options.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device, images = arguments.device, arguments.images or (8 if arguments.device == "cuda" else 1)
    where, rows = meta(device=device), []
    for head, frozen in (("frozen", True), ("moving", False)):
        case = make_case(
            images=images, tokens=arguments.tokens, vocabulary=arguments.vocabulary, frozen=frozen,
            widths=(1024, 2560 if device == "cuda" else 2048), device=device,
        )  # fmt: skip
        name = f"{images} x {arguments.tokens} tokens, {head} head"
        measured = measure(name, case, device=device, repeats=30 if device == "cuda" else 5, budget=120)
        print_table(measured, COLUMNS)
        rows += measured
    if arguments.json:
        write_json(arguments.json, meta=where, rows=rows)


if __name__ == "__main__":
    main()
