"""A saturated teacher at the temperatures 4, 1 and `std`: few images for the student, many for the test.

    python scripts/methods/std_temperature/proof.py [--seeds 5] [--out DIR]

Pictures of 12 x 12 belong to one of ten smooth patterns, moved, scaled in contrast and covered with noise. A
convolutional teacher learns 4,000 of them until it is sure of nearly every one; a student, a perceptron with
one hidden layer, gets 150 others, with 0.1 cross-entropy + 0.9 forward divergence by llava_kd's head loss.
The arms of a seed differ in the temperature alone. Reported: accuracy on 2,000 further pictures, and the
paired differences to temperature 1.

Shape legend: N pictures, D features, V classes.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from llava_kd.losses.divergence import Temperature
from llava_kd.losses.head_loss import head_loss
from llava_kd.search.findings.statistics import as_text, estimate, paired

CLASSES, SIDE = 10, 12
ARMS: dict[str, tuple[float, float, Temperature]] = {  # weights of cross-entropy and divergence, temperature
    "no teacher": (1.0, 0.0, 1.0),
    "T = 4": (0.1, 0.9, 4.0),
    "T = 1": (0.1, 0.9, 1.0),
    "T = std": (0.1, 0.9, "std"),
}


def pictures(number: int, patterns: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """[N, 1, SIDE, SIDE] and their classes."""
    classes_N = torch.randint(0, CLASSES, (number,), generator=generator)
    moves_N2 = torch.randint(-2, 3, (number, 2), generator=generator)
    moved = [
        torch.roll(patterns[c], (int(y), int(x)), (0, 1))
        for c, (y, x) in zip(classes_N.tolist(), moves_N2, strict=True)
    ]
    contrast = 0.5 + torch.rand(number, 1, 1, generator=generator)
    noise = 0.8 * torch.randn(number, SIDE, SIDE, generator=generator)
    return (torch.stack(moved) * contrast + noise).unsqueeze(1), classes_N


def smooth_patterns(generator: torch.Generator) -> Tensor:
    coarse = torch.randn(CLASSES, 1, 4, 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic").squeeze(1)
    return smooth / smooth.flatten(1).std(1).view(-1, 1, 1)


def make_teacher() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(288, 64), nn.ReLU(), nn.Linear(64, CLASSES),
    )  # fmt: skip


def train_teacher(images: Tensor, classes_N: Tensor, generator: torch.Generator) -> nn.Sequential:
    teacher = make_teacher()
    optimiser = torch.optim.Adam(teacher.parameters(), lr=2e-3)
    for _ in range(30):
        for rows in torch.randperm(len(images), generator=generator).split(100):
            optimiser.zero_grad()
            nn.functional.cross_entropy(teacher(images[rows]), classes_N[rows]).backward()
            optimiser.step()
    return teacher.eval().requires_grad_(False)


def train_student(
    arm: str, images: Tensor, classes_N: Tensor, teacher_NV: Tensor, seed: int
) -> nn.Sequential:
    """Pictures to logits; the last layer is the head that the loss reads."""
    torch.manual_seed(seed)
    ce, kl, temperature = ARMS[arm]
    head = nn.Linear(32, CLASSES)
    body = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 32), nn.ReLU())
    optimiser = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=2e-3)
    order = torch.Generator().manual_seed(seed)
    eye_VV = torch.eye(CLASSES)
    for _ in range(200):
        for rows in torch.randperm(len(images), generator=order).split(50):
            optimiser.zero_grad()
            share_N = torch.full((len(rows),), 1 / len(rows))
            loss = head_loss(
                body(images[rows]), head.weight, classes_N[rows], student_bias_V=head.bias,
                ce_weight_N=ce * share_N, kl_weight_N=kl * share_N, teacher_NE=teacher_NV[rows],
                teacher_head_UE=eye_VV, temperature=temperature,
            ).loss  # fmt: skip
            loss.backward()
            optimiser.step()
    return nn.Sequential(*body, head)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, classes_N: Tensor) -> float:
    return 100 * float((model(images).argmax(1) == classes_N).double().mean())


def one_seed(seed: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    patterns = smooth_patterns(generator)
    many, few, test = (pictures(number, patterns, generator) for number in (4000, 150, 2000))
    teacher = train_teacher(*many, generator)
    logits_NV = teacher(few[0])
    found = {
        "teacher's accuracy": accuracy(teacher, *test),
        "teacher's largest probability": 100 * float(logits_NV.softmax(1).amax(1).mean()),
        "teacher's standard deviation": float(logits_NV.std(1).mean()),
    }
    return found | {arm: accuracy(train_student(arm, *few, logits_NV, seed), *test) for arm in ARMS}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0")
    parser.add_argument("--out", type=Path, help="folder for results.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    runs = {seed: one_seed(seed) for seed in range(arguments.seeds)}
    values = {name: {seed: run[name] for seed, run in runs.items()} for name in runs[0]}
    print(f"{len(runs)} seeds; mean +- half the 95 % interval over them\n")
    for name in list(values)[: -len(ARMS)]:
        print(f"{name}: {as_text(estimate(list(values[name].values())))}")
    print("\n| arm | accuracy, % | against T = 1, paired |\n|---|---|---|")
    for arm in ARMS:
        gap = None if arm == "T = 1" else paired(values[arm], values["T = 1"])
        print(f"| {arm} | {as_text(estimate(list(values[arm].values())))} | {as_text(gap, sign='+')} |")
    print(f"\n{time.perf_counter() - began:.0f} s")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "results.json").write_text(json.dumps(runs, indent=2) + "\n")


if __name__ == "__main__":
    main()
