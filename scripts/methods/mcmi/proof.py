"""One sure teacher tuned in five ways; what students of few pictures, or of nine classes, learn from each.

    python scripts/methods/mcmi/proof.py [--seeds 3] [--first 0] [--out DIR]

The patterns and the teacher of scripts/methods/std_temperature/proof.py. The teacher learns 4,000 pictures
and is then tuned on them for ten more epochs, with llava_kd's losses; the arms of a seed differ in that loss:

    plain            cross-entropy
    label smoothing  with 0.1 of smoothed labels
    MCMI, T = 1      minus 0.25 times the conditional mutual information at temperature 1, as in the paper
    MCMI, T = 4      minus 1 times it at the temperature of the distillation, each row clamped at 1 nat
    MCMI, T = 4, 5   minus 5 times it, each row clamped at 0.3 nats

Nothing was chosen by these figures, nor on other seeds.

Every teacher then has two students (0.1 cross-entropy + 0.9 divergence at T = 4): one of 50 pictures, tested
on all classes, and one of 500 without those of one class, tested on that class.

Shape legend: N pictures, D features, K = V classes.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from llava_kd.losses.head_loss import head_loss
from llava_kd.losses.tuning.information import (
    Centroids,
    add_softmaxes,
    conditional_information_by_chunk,
)
from llava_kd.losses.tuning.smoothing import smoothing_without_logits
from llava_kd.search.findings.statistics import as_text, estimate, paired


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Weights beside cross-entropy of 1, and the temperature and clamp of the information."""

    smoothing: float = 0.0
    information: float = 0.0
    temperature: float = 4.0
    clamp: float = 1.0


ARMS = {
    "plain": Tuning(),
    "label smoothing": Tuning(smoothing=0.1),
    "MCMI, T = 1": Tuning(information=0.25, temperature=1.0, clamp=1e9),
    "MCMI, T = 4": Tuning(information=1.0),
    "MCMI, T = 4, 5": Tuning(information=5.0, clamp=0.3),
}
DISTILLED_AT, CE, KL = 4.0, 0.1, 0.9
EPOCHS, RATE = 10, 5e-4
FEW, MANY, OMITTED = 50, 500, 0
Labelled = tuple[Tensor, Tensor]  # pictures and their classes


def beside(name: str) -> ModuleType:
    """The proof of another method."""
    path = Path(__file__).parents[1] / name / "proof.py"
    spec = importlib.util.spec_from_file_location(f"proof_of_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PATTERNS = beside("std_temperature")


@torch.no_grad()
def centroids_of(model: nn.Sequential, data: Labelled, temperature: float) -> tuple[Centroids, float]:
    """Of the model as it is, and the information that its answers hold."""
    (images, classes_N), body, head = data, model[:-1], model[-1]
    assert isinstance(head, nn.Linear)
    total_KV = torch.zeros(PATTERNS.CLASSES, PATTERNS.CLASSES, dtype=torch.float64)
    entropy_N = add_softmaxes(
        total_KV, body(images), head.weight, classes_N, temperature=temperature, bias_V=head.bias
    )
    rows_K = torch.bincount(classes_N, minlength=PATTERNS.CLASSES)
    mean_KV = total_KV / rows_K[:, None]
    told = (rows_K * torch.special.entr(mean_KV).sum(1)).sum() - entropy_N.double().sum()
    return Centroids.of(torch.arange(PATTERNS.CLASSES), mean_KV), float(told / len(classes_N))


def tuned(teacher: nn.Sequential, arm: Tuning, data: Labelled, seed: int) -> nn.Sequential:
    teacher = copy.deepcopy(teacher).requires_grad_()
    (images, classes_N), body, head = data, teacher[:-1], teacher[-1]
    assert isinstance(head, nn.Linear)
    centroids, _ = centroids_of(teacher, data, arm.temperature)
    optimiser = torch.optim.Adam(teacher.parameters(), lr=RATE)
    order = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images), generator=order).split(100):
            optimiser.zero_grad()
            side, share_N = (body(images[rows]), head.weight, classes_N[rows]), torch.ones(len(rows))
            loss = head_loss(*side, student_bias_V=head.bias, ce_weight_N=share_N).loss
            if arm.smoothing:
                loss = loss + arm.smoothing * smoothing_without_logits(*side, bias_V=head.bias).loss
            if arm.information:
                told = conditional_information_by_chunk(
                    *side, centroids, temperature=arm.temperature, clamp=arm.clamp, bias_V=head.bias
                )
                loss = loss - arm.information * told.loss
            (loss / len(rows)).backward()
            optimiser.step()
    return teacher.eval().requires_grad_(False)


def student_of(teacher: nn.Module, data: Labelled, seed: int, epochs: int) -> nn.Sequential:
    images, classes_N = data
    torch.manual_seed(seed)
    head = nn.Linear(32, PATTERNS.CLASSES)
    body = nn.Sequential(nn.Flatten(), nn.Linear(PATTERNS.SIDE**2, 32), nn.ReLU())
    optimiser = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=2e-3)
    order = torch.Generator().manual_seed(seed)
    teacher_NV, eye_VV = teacher(images), torch.eye(PATTERNS.CLASSES)
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=order).split(50):
            optimiser.zero_grad()
            share_N = torch.full((len(rows),), 1 / len(rows))
            head_loss(
                body(images[rows]), head.weight, classes_N[rows], student_bias_V=head.bias,
                ce_weight_N=CE * share_N, kl_weight_N=KL * share_N, teacher_NE=teacher_NV[rows],
                teacher_head_UE=eye_VV, temperature=DISTILLED_AT,
            ).loss.backward()  # fmt: skip
            optimiser.step()
    return nn.Sequential(*body, head)


def one_seed(seed: int, arms: dict[str, Tuning]) -> dict[str, dict[str, float]]:
    """Figures of each arm."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    patterns = PATTERNS.smooth_patterns(generator)
    large, few, many, test = [
        PATTERNS.pictures(number, patterns, generator) for number in (4000, FEW, MANY, 2000)
    ]
    teacher = PATTERNS.train_teacher(*large, generator)
    is_there = many[1] != OMITTED
    of_omitted = test[1] == OMITTED
    found = {}
    for name, arm in arms.items():
        own = tuned(teacher, arm, large, seed)
        _, told = centroids_of(own, large, DISTILLED_AT)
        of_few = student_of(own, few, seed, epochs=400)
        of_nine = student_of(own, (many[0][is_there], many[1][is_there]), seed, epochs=40)
        found[name] = {
            "teacher, %": PATTERNS.accuracy(own, *test),
            "its information, nats at T = 4": told,
            "student of 50, %": PATTERNS.accuracy(of_few, *test),
            "omitted class, %": PATTERNS.accuracy(of_nine, test[0][of_omitted], test[1][of_omitted]),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--out", type=Path, help="folder for results.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    runs = {}
    for seed in seeds:
        runs[seed] = one_seed(seed, ARMS)
        print(f"seed {seed}: {json.dumps(runs[seed])}", file=sys.stderr, flush=True)
    figures = list(runs[arguments.first]["plain"])
    print(
        f"{len(runs)} seeds from {arguments.first}; mean +- half the 95 % interval; (paired, against plain)\n"
    )
    print(f"| teacher | {' | '.join(figures)} |\n|{'---|' * (1 + len(figures))}")
    for arm in ARMS:
        cells = []
        for figure in figures:
            values, plain = ({s: run[a][figure] for s, run in runs.items()} for a in (arm, "plain"))
            digits = 3 if "nats" in figure else 1
            cell = as_text(estimate(list(values.values())), digits=digits)
            if arm != "plain" and len(runs) > 1:
                cell += f" ({as_text(paired(values, plain), digits=digits, sign='+')})"
            cells.append(cell)
        print(f"| {arm} | {' | '.join(cells)} |")
    print(f"\n{time.perf_counter() - began:.0f} s")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "results.json").write_text(json.dumps(runs, indent=2) + "\n")


if __name__ == "__main__":
    main()
