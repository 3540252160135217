"""Hints and mutual information for a student with few pictures; the bound on Gaussians that are known.

    python scripts/methods/inner_layers/mutual_information.py [--seeds 5] [--out DIR]

The student is a perceptron with one hidden layer, whose states are compared with the teacher's last features
by llava_kd's hints, through a trained map, or by its critic and bound. First, the bound itself, with the best
critic and q = 1: 64 pairs of Gaussians of 10 dimensions, 1,000 times.

Shape legend: K pairs, N pictures, D and E widths of student and teacher.
"""

from __future__ import annotations

import math

import torch
from small_data import BATCH, CLASSES, SIDE, TEACHER_WIDTH, Data, accuracy, kd, make_data, report, train
from torch import Tensor, nn

from llava_kd.distill.terms.inner.mi_alpha import Critic
from llava_kd.losses.inner.hint import hint_rows
from llava_kd.losses.inner.mutual_information import information_rows

WIDTH = 32
ARMS: dict[str, str | float | None] = {  # the kind of a hint, or alpha
    "no teacher": None,
    "KD": None,
    "KD + hint mse": "mse",
    "KD + hint cosine": "cosine",
    "KD + InfoNCE (alpha 1)": 1.0,
    "KD + MI, alpha 0.9": 0.9,
    "KD + MI, alpha 0.5": 0.5,
    "KD + MI, alpha 0.1": 0.1,
}


def gaussians() -> None:
    generator, pairs, dimensions, rho = torch.Generator().manual_seed(0), 64, 10, 0.85
    left = 1 - rho**2
    truth = -dimensions / 2 * math.log(left)
    print(f"known information {truth:.2f} nats, log of the pairs {math.log(pairs):.2f}\n")
    print("| alpha | bias | standard deviation |\n|---|---|---|")
    drawn = [torch.randn(2, pairs, dimensions, generator=generator) for _ in range(1000)]
    for alpha in (1.0, 0.9, 0.5, 0.1, 0.01, 0.0):
        found = []
        for x, noise in drawn:
            y = rho * x + math.sqrt(left) * noise
            apart_KK = (y.unsqueeze(0) - rho * x.unsqueeze(1)).square().sum(2)
            scores_KK = y.square().sum(1) / 2 - apart_KK / (2 * left) + truth
            rows_K = information_rows(scores_KK, torch.zeros(pairs), alpha=alpha, clamp=100.0)
            found.append(float(rows_K.mean()))
        values = torch.tensor(found)
        print(f"| {alpha:g} | {float(values.mean()) - truth:+.2f} | {float(values.std()):.2f} |")
    print()


def student_accuracy(arm: str, data: Data, seed: int) -> float:
    torch.manual_seed(seed)
    how = ARMS[arm]
    body = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, WIDTH), nn.ReLU())
    head = nn.Linear(WIDTH, CLASSES)
    own: nn.Module = nn.Identity()
    if isinstance(how, str):
        own = nn.Linear(WIDTH, TEACHER_WIDTH)
    elif how is not None:
        own = Critic(WIDTH, TEACHER_WIDTH, 128, has_baseline=how < 1)

    def loss_of(rows: Tensor) -> Tensor:
        states_ND, teacher_NE = body(data.images[rows]), data.features_NE[rows]
        loss = kd(states_ND, head, data, rows, has_teacher=arm != "no teacher")
        if isinstance(how, str):
            return loss + hint_rows(own(states_ND), teacher_NE, how).mean()  # pyright: ignore[reportArgumentType]
        if how is not None:
            ours_NW, theirs_NW, log_baseline_N = own(states_ND, teacher_NE)
            return loss - information_rows(ours_NW @ theirs_NW.T, log_baseline_N, alpha=how).mean()
        return loss

    train([*body.parameters(), *head.parameters(), *own.parameters()], loss_of, seed)
    return accuracy(nn.Sequential(body, head), *data.test)


def one_seed(seed: int) -> dict[str, float]:
    data = make_data(seed)
    return {"teacher": data.teacher_accuracy} | {arm: student_accuracy(arm, data, seed) for arm in ARMS}


if __name__ == "__main__":
    gaussians()
    print(f"{BATCH} rows are told apart at a time")
    report(str(__doc__), one_seed, "KD")
