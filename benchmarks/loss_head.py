"""Speed, memory and gradient error of the distillation loss head, beside plain PyTorch and other projects.

    python benchmarks/loss_head.py --device cuda --json benchmarks/results/loss_head_h200.json

Seconds are medians of forward and backward, run in turn in one process. Memory is what a call holds at its
peak beyond its inputs, and the same less the gradients that it returns. Error is the relative distance of dX
and dW from fp64. liger-kernel, fla-core and orda-kernel are measured where they are installed.

Shape legend: N rows, V vocabulary, D student width.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from _common import Row, interleaved_median, meta, parser, peak_extra_bytes, print_table, write_json
from _head_losses import Case, Loss, gemms, make_case, ours, plain_losses
from _head_peers import peer_losses
from torch import Tensor

GEMMS = "matrix products alone"
SPEED_COLUMNS = ("case", "terms", "impl", "seconds", "ratio_to_gemms", "peak_extra_bytes")
SPEED_COLUMNS += ("peak_temporary_bytes", "note")
ERROR_COLUMNS = ("case", "impl", "kl", "dx_error", "dw_error", "note")
QWEN_TOKENS = 151665  # entries of the Qwen2.5 tokenizer; its models' heads are wider
# Difference of logits, in standard deviations of them, that gives about this KL between the softmaxes.
NEAR = {"KL 0.4": 0.28, "KL 0.05": 0.099, "KL 0.005": 0.031}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A problem to time. `share` of the time left is what it may take."""

    name: str
    rows: int
    num_response: int
    widths: tuple[int, int]
    vocabularies: tuple[int, int] = (151936, 151936)
    num_common: int | None = None
    frozen_head: bool = False
    chunks: tuple[int, ...] = ()
    only: tuple[str, ...] = ()
    share: float = 0.5

    def case(self, device: str) -> Case:
        return make_case(
            rows=self.rows,
            num_response=self.num_response,
            widths=self.widths,
            vocabularies=self.vocabularies,
            num_common=self.num_common,
            frozen_head=self.frozen_head,
            dtype=torch.bfloat16 if device == "cuda" else torch.float32,
            device=device,
        )


PAPER = {"rows": 8232, "num_response": 2400, "widths": (1024, 2560)}
QWEN = {"widths": (896, 3584), "vocabularies": (151936, 152064), "num_common": QWEN_TOKENS}
ONE_IMAGE = {"rows": 793, "num_response": 64, "widths": (1024, 2048)}
SHAPES = {
    "cuda": (
        Shape(name="8 images, 8232 rows", **PAPER, chunks=(256, 1024, 2112, 4224, 8232)),
        Shape(name="1 image, 60 response tokens", rows=789, num_response=60, widths=(1024, 2560)),
        Shape(name="512 rows", rows=512, num_response=128, widths=(1024, 2560)),
        Shape(name="32768 rows", rows=32768, num_response=8192, widths=(1024, 2560)),
        Shape(name="Qwen2.5 7B to 0.5B, 8232 rows", **PAPER | QWEN),
        Shape(name="frozen head, 8232 rows", **PAPER, frozen_head=True),
    ),
    "cpu": (
        Shape(name="1 image, 64 response tokens", **ONE_IMAGE, share=0.8),
        Shape(
            name="1 image, 64 response tokens, frozen head",
            **ONE_IMAGE,
            frozen_head=True,
            only=("ours, fp32 logits", "naive PyTorch"),
            share=0.8,
        ),
    ),
}


def main() -> None:
    options = parser("Speed, memory and gradient error of the distillation loss head.")
    options.add_argument("--budget", type=float, default=420.0, help="seconds in which to finish, about")
    options.add_argument("--skip-peers", action="store_true", help="only ours and plain PyTorch")
    arguments = options.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    deadline = time.perf_counter() + arguments.budget
    device = arguments.device
    plain, peers = plain_losses(device), {} if arguments.skip_peers else peer_losses(device)
    where = meta(device=device)
    rows = error_rows(plain | peers, device=device)
    print_table(rows, ERROR_COLUMNS)
    for shape in SHAPES[device]:
        losses = plain | {f"ours, chunks of {rows}": ours(chunk_rows=rows) for rows in shape.chunks}
        if shape.num_common is None:
            losses |= peers
        budget = shape.share * max(1.0, deadline - time.perf_counter())
        measured = speed_rows(shape, losses, device=device, budget=budget)
        print_table(measured, SPEED_COLUMNS)
        rows += measured
        if arguments.json:
            write_json(arguments.json, meta=where, rows=rows)


def speed_rows(shape: Shape, losses: dict[str, Loss], *, device: str, budget: float) -> list[Row]:
    """One row for each way to compute the loss of a shape."""
    case = shape.case(device)
    chosen = {name: loss for name, loss in losses.items() if name in shape.only or not shape.only}
    problems = {"ce+kl": case}
    if device == "cuda":  # on a CPU the time is better spent on repeats of the same products
        problems["kl"] = replace(case, num_response=0)
    found: list[Row] = []
    for terms, problem in problems.items():
        measured = time_all(chosen, problem, device=device, budget=budget / len(problems))
        found += [{"case": shape.name, "terms": terms, **row} for row in measured]
    return found


def time_all(losses: dict[str, Loss], case: Case, *, device: str, budget: float) -> list[Row]:
    """Memory of a first call of each, then seconds in turn, with the matrix products in the same turns."""
    start = time.perf_counter()
    calls: dict[str, Callable[[], object]] = {GEMMS: lambda: gemms(case)}
    rows: dict[str, Row] = {GEMMS: {}}
    for name, loss in losses.items():
        call = step(loss, case)
        if time.perf_counter() - start > budget / 2:
            rows[name] = {"note": "out of time"}
            continue
        rows[name] = first_call(call, case, device=device, warm=device == "cuda" or "compiled" in name)
        if "note" not in rows[name]:
            calls[name] = call
    repeats, warmup = (30, 3) if device == "cuda" else (3, 0)
    left = budget - (time.perf_counter() - start)
    seconds = interleaved_median(calls, device=device, repeats=repeats, warmup=warmup, budget_s=left / 2)
    for name in calls:
        rows[name] |= {"seconds": seconds[name], "ratio_to_gemms": seconds[name] / seconds[GEMMS]}
    return [{"impl": name, **row} for name, row in rows.items()]


def step(loss: Loss, case: Case) -> Callable[[], list[Tensor]]:
    """Forward and backward; the gradients are returned, not accumulated."""
    return lambda: list(torch.autograd.grad(loss(case), case.leaves))


def first_call(call: Callable[[], object], case: Case, *, device: str, warm: bool) -> Row:
    """Peak memory of a call, or why it cannot be made."""
    try:
        if warm:
            call()  # compiles, loads libraries
        peak = peak_extra_bytes(call, device=device)
    except Exception as error:  # another project may fail in any way; the benchmark goes on
        return {"note": f"failed: {type(error).__name__}"}
    if peak is None:
        return {}
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in case.leaves)
    return {"peak_extra_bytes": peak, "peak_temporary_bytes": max(0, peak - gradients)}


def error_rows(losses: dict[str, Loss], *, device: str) -> list[Row]:
    """Relative error of the gradient for bf16 inputs at four distances between student and teacher."""
    rows, width = (2048, 1024) if device == "cuda" else (64, 128)
    far = make_case(
        rows=rows, widths=(width, width), vocabularies=(151936, 151936), dtype=torch.bfloat16, device=device
    )
    found: list[Row] = []
    for name, distance in {"KL 10": None, **NEAR}.items():
        case = far if distance is None else near(far, distance)
        kl, exact = exact_gradients(case)
        for impl, loss in losses.items():
            row: Row = {"case": name, "impl": impl, "kl": kl}
            try:
                gradients = torch.autograd.grad(loss(case), case.leaves)
            except Exception as error:  # another project may fail in any way; the benchmark goes on
                row["note"] = f"failed: {type(error).__name__}"
            else:
                errors = [float((g - e).norm() / e.norm()) for g, e in zip(gradients, exact, strict=True)]
                row["dx_error"], row["dw_error"] = errors
            found.append(row)
    return found


def near(case: Case, distance: float) -> Case:
    """The student's own head and rows as teacher, the rows moved by noise."""
    generator = torch.Generator(case.student_ND.device).manual_seed(1)
    rows_ND = case.student_ND.detach().float()
    noise_ND = torch.randn(rows_ND.shape, generator=generator, device=rows_ND.device)
    moved_ND = (rows_ND + distance * noise_ND).to(case.student_ND.dtype)
    return replace(case, teacher_NE=moved_ND, teacher_head_UE=case.student_head_VD.detach())


def exact_gradients(case: Case) -> tuple[float, tuple[Tensor, Tensor]]:
    """Mean KL and its gradients with respect to the student's rows and head, in fp64."""
    head_VD, head_UE = case.student_head_VD.detach().double(), case.teacher_head_UE.double()
    dX, dW_VD, kl = [], torch.zeros_like(head_VD), 0.0
    pairs = zip(case.student_ND.detach().split(256), case.teacher_NE.split(256), strict=True)
    for student_ND, teacher_NE in pairs:
        log_p_NV = (student_ND.double() @ head_VD.T).log_softmax(1)
        log_q_NV = (teacher_NE.double() @ head_UE.T).log_softmax(1)
        kl += float((log_q_NV.exp() * (log_q_NV - log_p_NV)).sum())
        dz_NV = (log_p_NV.exp() - log_q_NV.exp()) / len(case.student_ND)
        dX.append(dz_NV @ head_VD)
        dW_VD += dz_NV.T @ student_ND.double()
    return kl / len(case.student_ND), (torch.cat(dX), dW_VD)


if __name__ == "__main__":
    main()
