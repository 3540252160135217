"""What both proofs of this folder share: pictures, a teacher that is a ConvNet, and a student's training.

Pictures of 12 x 12 belong to one of ten smooth patterns, moved, scaled in contrast and covered with noise.
The teacher learns 4,000 of them; a student gets 150 others and is tested on 2,000. The arms of a seed begin
at the same weights and see the same batches. What an arm adds to 0.1 cross-entropy + 0.9 divergence at
temperature 4 has weight 1: nothing was tuned.

Shape legend: N pictures, D and E widths of student and teacher, V classes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from llava_kd.losses.head_loss import head_loss
from llava_kd.search.findings.statistics import as_text, estimate, paired

CLASSES, SIDE, FEW, BATCH, EPOCHS = 10, 12, 150, 50, 200
TEACHER_WIDTH = 64
CE, KL, TEMPERATURE = 0.1, 0.9, 4.0


@dataclass(frozen=True, kw_only=True)
class Data:
    """A teacher's features and head stand beside the pictures that a student learns."""

    images: Tensor
    classes_N: Tensor
    features_NE: Tensor
    head: nn.Linear
    test: tuple[Tensor, Tensor]
    teacher_accuracy: float


def pictures(number: int, patterns: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """[N, 1, SIDE, SIDE] and their classes."""
    classes_N = torch.randint(0, CLASSES, (number,), generator=generator)
    moves_N2 = torch.randint(-2, 3, (number, 2), generator=generator).tolist()
    moved = [torch.roll(patterns[c], tuple(m), (0, 1)) for c, m in zip(classes_N, moves_N2, strict=True)]
    contrast = 0.5 + torch.rand(number, 1, 1, generator=generator)
    noise = 0.8 * torch.randn(number, SIDE, SIDE, generator=generator)
    return (torch.stack(moved) * contrast + noise).unsqueeze(1), classes_N


def make_data(seed: int) -> Data:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    coarse = torch.randn(CLASSES, 1, 4, 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic").squeeze(1)
    patterns = smooth / smooth.flatten(1).std(1).view(-1, 1, 1)
    many, few, test = (pictures(number, patterns, generator) for number in (4000, FEW, 2000))
    body = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(288, TEACHER_WIDTH), nn.ReLU(),
    )  # fmt: skip
    head = nn.Linear(TEACHER_WIDTH, CLASSES)
    optimiser = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=2e-3)
    for _ in range(30):
        for rows in torch.randperm(len(many[0]), generator=generator).split(100):
            optimiser.zero_grad()
            nn.functional.cross_entropy(head(body(many[0][rows])), many[1][rows]).backward()
            optimiser.step()
    teacher = nn.Sequential(body, head).requires_grad_(False)
    return Data(
        images=few[0],
        classes_N=few[1],
        features_NE=body(few[0]),
        head=head,
        test=test,
        teacher_accuracy=accuracy(teacher, *test),
    )


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, classes_N: Tensor) -> float:
    return 100 * float((model(images).argmax(1) == classes_N).double().mean())


def kd(states_ND: Tensor, head: nn.Linear, data: Data, rows: Tensor, *, has_teacher: bool = True) -> Tensor:
    """The mean over some rows, of a student whose head reads these states."""
    share_N = torch.full((len(rows),), 1 / len(rows))
    ce, kl = (CE, KL) if has_teacher else (1.0, 0.0)
    return head_loss(
        states_ND, head.weight, data.classes_N[rows], student_bias_V=head.bias,
        ce_weight_N=ce * share_N, kl_weight_N=kl * share_N,
        teacher_NE=data.features_NE[rows], teacher_head_UE=data.head.weight, teacher_bias_U=data.head.bias,
        temperature=TEMPERATURE,
    ).loss  # fmt: skip


def train(parameters: Sequence[nn.Parameter], loss_of: Callable[[Tensor], Tensor], seed: int) -> None:
    """`loss_of` some of the few pictures is brought down."""
    optimiser = torch.optim.Adam(parameters, lr=2e-3)
    order = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for rows in torch.randperm(FEW, generator=order).split(BATCH):
            optimiser.zero_grad()
            loss_of(rows).backward()
            optimiser.step()


def report(doc: str, one_seed: Callable[[int], dict[str, float]], reference: str) -> None:
    """Run the seeds that the command line asks for and print a table of arms against one of them."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0")
    parser.add_argument("--out", type=Path, help="folder for results.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    runs = {seed: one_seed(seed) for seed in range(arguments.seeds)}
    print(f"{len(runs)} seeds; mean +- half the 95 % interval over them")
    print(f"\n| arm | accuracy, % | against {reference}, paired |\n|---|---|---|")
    for arm in runs[0]:
        values = {seed: run[arm] for seed, run in runs.items()}
        base = {seed: run[reference] for seed, run in runs.items()}
        gap = None if arm == reference else paired(values, base)
        print(f"| {arm} | {as_text(estimate(list(values.values())))} | {as_text(gap, sign='+', none='')} |")
    print(f"\n{time.perf_counter() - began:.0f} s")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "results.json").write_text(json.dumps(runs, indent=2) + "\n")
