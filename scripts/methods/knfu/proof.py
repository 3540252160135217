"""One teacher of the student's own subject and three of others: alone, mixed alike, mixed by KnFu's weights.

    python scripts/methods/knfu/proof.py [--seeds 5] [--out DIR]

Pictures of 12 x 12 belong to one of sixteen smooth patterns, moved, scaled in contrast, covered with noise.
Four subjects have four patterns each, and 5 % of a subject's pictures are of any pattern. The student, a
perceptron with one hidden layer, gets 80 pictures of the first subject; convolutional teachers learn 2,000
of one subject each. The arms of a seed differ in who teaches: 0.5 cross-entropy + 0.5 forward divergence at
temperature 2, by llava_kd's head loss, mixture and weights. Reported: accuracy on 2,000 further pictures of
the first subject, and the paired differences to no teacher.

Shape legend: N pictures, D features, V classes, M teachers.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from llava_kd.losses.head_loss import head_loss
from llava_kd.losses.targets.mixture import (
    MixedTarget,
    Voice,
    histograms,
    log_agreement,
    log_fusion_weights,
)
from llava_kd.search.findings.statistics import as_text, estimate, paired

SUBJECTS, EACH, SIDE = 4, 4, 12
CLASSES = SUBJECTS * EACH
TEMPERATURE = 2.0
NONE, UNIFORM, KNFU, AGREEMENT, ALONE, WRONG = (
    "no teacher", "uniform", "KnFu, beta 10", "agreement, beta 1", "the relevant one alone",
    "an irrelevant one alone",
)  # fmt: skip
ARMS = (NONE, UNIFORM, KNFU, AGREEMENT, ALONE, WRONG)


def pictures(
    number: int, subject: int, patterns: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """[N, 1, SIDE, SIDE] and their classes."""
    own_N = subject * EACH + torch.randint(0, EACH, (number,), generator=generator)
    any_N = torch.randint(0, CLASSES, (number,), generator=generator)
    classes_N = torch.where(torch.rand(number, generator=generator) < 0.05, any_N, own_N)
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


def train_teacher(images: Tensor, classes_N: Tensor, generator: torch.Generator) -> nn.Sequential:
    teacher = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(288, 64), nn.ReLU(), nn.Linear(64, CLASSES),
    )  # fmt: skip
    optimiser = torch.optim.Adam(teacher.parameters(), lr=2e-3)
    for _ in range(15):
        for rows in torch.randperm(len(images), generator=generator).split(100):
            optimiser.zero_grad()
            nn.functional.cross_entropy(teacher(images[rows]), classes_N[rows]).backward()
            optimiser.step()
    return teacher.eval().requires_grad_(False)


def train_student(
    images: Tensor, classes_N: Tensor, said: list[Tensor], log_weights_NM: Tensor | None, seed: int
) -> nn.Sequential:
    """Pictures to logits; the last layer is the head that the loss reads. `said`: each teacher's logits."""
    torch.manual_seed(seed)
    head = nn.Linear(32, CLASSES)
    body = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 32), nn.ReLU())
    optimiser = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=2e-3)
    order = torch.Generator().manual_seed(seed)
    eye_VV = torch.eye(CLASSES)
    for _ in range(200):
        for rows in torch.randperm(len(images), generator=order).split(40):
            optimiser.zero_grad()
            share_N = torch.full((len(rows),), 1 / len(rows))
            taught = {}
            if log_weights_NM is not None:
                change = MixedTarget(
                    others=tuple(Voice(logits_NV[rows], eye_VV) for logits_NV in said[1:]),
                    log_weights_NM=log_weights_NM[rows], temperature=TEMPERATURE, num_common=CLASSES,
                )  # fmt: skip
                taught = {
                    "kl_weight_N": 0.5 * share_N, "teacher_NE": said[0][rows], "teacher_head_UE": eye_VV,
                    "temperature": TEMPERATURE, "teacher_change": change,
                }  # fmt: skip
            ce_N = share_N * (0.5 if taught else 1.0)
            head_loss(
                body(images[rows]), head.weight, classes_N[rows], student_bias_V=head.bias, ce_weight_N=ce_N,
                **taught,
            ).loss.backward()  # fmt: skip
            optimiser.step()
    return nn.Sequential(*body, head)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, classes_N: Tensor) -> float:
    return 100 * float((model(images).argmax(1) == classes_N).double().mean())


def one_seed(seed: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    patterns = smooth_patterns(generator)
    known = [pictures(2000, subject, patterns, generator) for subject in range(SUBJECTS)]
    few, test = (pictures(number, 0, patterns, generator) for number in (80, 2000))
    teachers = [train_teacher(*data, generator) for data in known]
    said = [teacher(few[0]) for teacher in teachers]
    counted = [torch.bincount(c_N, minlength=CLASSES).tolist() for c_N in (few[1], *(c for _, c in known))]
    own_V, *theirs = histograms(counted)
    theirs_MV, number = torch.stack(theirs), len(few[1])

    def alike(log_weights_M: Tensor) -> Tensor:
        return log_weights_M.float().expand(number, -1)

    likelihood_NM = torch.stack([s.log_softmax(1).gather(1, few[1].unsqueeze(1)).squeeze(1) for s in said], 1)
    only = torch.eye(SUBJECTS).log()
    weights: dict[str, Tensor | None] = {
        NONE: None,
        UNIFORM: alike(torch.zeros(SUBJECTS).log_softmax(0)),
        KNFU: alike(log_fusion_weights(own_V, theirs_MV, beta=10.0)),
        AGREEMENT: log_agreement(likelihood_NM, torch.arange(number), number, beta=1.0),
        ALONE: alike(only[0]),
        WRONG: alike(only[1]),
    }
    found = {"the relevant teacher's own accuracy": accuracy(teachers[0], *test)}
    for arm in (KNFU, AGREEMENT):
        logs_NM = weights[arm]
        assert logs_NM is not None
        found[f"weight of the relevant teacher, {arm}"] = 100 * float(logs_NM[:, 0].exp().mean())
    return found | {arm: accuracy(train_student(*few, said, weights[arm], seed), *test) for arm in ARMS}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0")
    parser.add_argument("--out", type=Path, help="folder for results.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    runs = {seed: one_seed(seed) for seed in range(arguments.seeds)}
    values = {name: {seed: run[name] for seed, run in runs.items()} for name in runs[0]}
    print(f"{len(runs)} seeds; mean +- half the 95 % interval over them; per cent\n")
    for name in list(values)[: -len(ARMS)]:
        print(f"{name}: {as_text(estimate(list(values[name].values())))}")
    print("\n| arm | accuracy, % | against no teacher, paired |\n|---|---|---|")
    for arm in ARMS:
        gap = None if arm == NONE else paired(values[arm], values[NONE])
        print(f"| {arm} | {as_text(estimate(list(values[arm].values())))} | {as_text(gap, sign='+')} |")
    print(f"\n{time.perf_counter() - began:.0f} s")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "results.json").write_text(json.dumps(runs, indent=2) + "\n")


if __name__ == "__main__":
    main()
