"""No mixup, a tenth of the pictures, or all of them, under a teacher that is asked about the mixed ones.

    python scripts/methods/mixup/proof.py [--seeds 5] [--out DIR]

The patterns, the teacher and the student of scripts/methods/std_temperature/proof.py: 150 pictures for the
student, 2,000 for the test. Pairs are drawn by llava_kd's own draw, without replacement; the teacher is asked
about the blends, the divergence is taken on every picture, and cross-entropy on those that are not mixed.
Where all are mixed no label is left, so an arm without labels and without mixup stands beside it. Every arm
stands at the temperatures 1 and `std`. Reported: accuracy, and paired differences to no mixup.

Shape legend: N pictures of a batch, V classes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from llava_kd.distill.teaching.pictures.mixup import draw_pairs
from llava_kd.losses.divergence import Temperature
from llava_kd.losses.head_loss import head_loss
from llava_kd.search.findings.statistics import as_text, estimate, paired

ARMS = {  # share of the pictures that are mixed, weight of cross-entropy on the others
    "none": (0.0, 0.1),
    "none, and no labels": (0.0, 0.0),
    "a tenth": (0.1, 0.1),
    "all": (1.0, 0.1),
}
TEMPERATURES: tuple[Temperature, ...] = (1.0, "std")
EPOCHS, BATCH = 200, 50


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


def mixed(images: Tensor, share: float, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Pictures, some of them blended, and 1 for those that are as they were."""
    pairs = draw_pairs(len(images), share=share, alpha=1.0, generator=generator)
    result, is_plain_N = images.clone(), torch.ones(len(images))
    for i, j, own in zip(pairs.mixed, pairs.partners, pairs.own, strict=True):
        result[i] = own * images[i] + (1 - own) * images[j]
        is_plain_N[i] = 0.0
    return result, is_plain_N


def train_student(
    arm: str, temperature: Temperature, few: tuple[Tensor, Tensor], teacher: nn.Module, seed: int
) -> nn.Sequential:
    torch.manual_seed(seed)
    share, ce = ARMS[arm]
    images, classes_N = few
    head = nn.Linear(32, PATTERNS.CLASSES)
    body = nn.Sequential(nn.Flatten(), nn.Linear(PATTERNS.SIDE**2, 32), nn.ReLU())
    optimiser = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=2e-3)
    order, pairs = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    eye_VV = torch.eye(PATTERNS.CLASSES)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images), generator=order).split(BATCH):
            optimiser.zero_grad()
            seen, is_plain_N = mixed(images[rows], share, pairs)
            share_N = torch.full((len(rows),), 1 / len(rows))
            head_loss(
                body(seen), head.weight, classes_N[rows], student_bias_V=head.bias,
                ce_weight_N=ce * share_N * is_plain_N, kl_weight_N=0.9 * share_N, teacher_NE=teacher(seen),
                teacher_head_UE=eye_VV, temperature=temperature,
            ).loss.backward()  # fmt: skip
            optimiser.step()
    return nn.Sequential(*body, head)


def one_seed(seed: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    patterns = PATTERNS.smooth_patterns(generator)
    many, few, test = (PATTERNS.pictures(number, patterns, generator) for number in (4000, 150, 2000))
    teacher = PATTERNS.train_teacher(*many, generator)
    found = {"teacher": PATTERNS.accuracy(teacher, *test)}
    for temperature in TEMPERATURES:
        for name in ARMS:
            student = train_student(name, temperature, few, teacher, seed)
            found[f"{name}, T = {temperature}"] = PATTERNS.accuracy(student, *test)
    return found


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
    print(f"teacher: {as_text(estimate(list(values['teacher'].values())))} %")
    print("\n| pictures mixed | T | accuracy, % | against no mixup, paired |\n|---|---|---|---|")
    for temperature in TEMPERATURES:
        for name in ARMS:
            own, none = (values[f"{n}, T = {temperature}"] for n in (name, "none"))
            gap = None if name == "none" else paired(own, none)
            right, gain = as_text(estimate(list(own.values()))), as_text(gap, sign="+")
            print(f"| {name} | {temperature} | {right} | {gain} |")
    print(f"\n{time.perf_counter() - began:.0f} s")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "results.json").write_text(json.dumps(runs, indent=2) + "\n")


if __name__ == "__main__":
    main()
