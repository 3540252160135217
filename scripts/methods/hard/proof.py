"""A student that is lost where pictures are moved learns it from a teacher that is not, by learned changes.

    python scripts/methods/hard/proof.py [--seeds 5] [--out DIR]

Ten smooth patterns of 8 x 8 stand in the middle of pictures of 18 x 18, scaled in contrast and covered with
noise. The teacher, convolutions and a global maximum, has only seen them so, and knows them anywhere by how
it is built; the student, a perceptron with one hidden layer, knows a pattern where it has seen it. The arms
of a seed differ in what is done to the training pictures, which are always centred, and in the loss:

    labels        cross-entropy alone
    distilled     0.1 cross-entropy + 0.9 divergence, pictures as they are
    small moves   the same, each picture moved at random by up to 1 pixel
    learned       the same, with llava_kd's augmentor, warps and phases, which may move by up to 5 pixels
    any moves     the same, each picture moved at random by up to 5 pixels: what is to be found

Reported: accuracy on 2,000 further pictures, centred and moved at random by up to 5 pixels.

Shape legend: N pictures, V classes, Z noise of a picture, I pictures.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from llava_kd.distill.teaching.pictures.augmentor import NOISE, Augmentor, next_phase
from llava_kd.distill.teaching.pictures.warps import NUMBERS, Pixels, Warps
from llava_kd.losses.divergence import FORWARD, divergence_rows
from llava_kd.losses.head_loss import head_loss
from llava_kd.search.findings.statistics import as_text, estimate, paired

CLASSES, PATTERN, SIDE, REACH = 10, 8, 18, 5
STEPS, BATCH, RATE = 2000, 32, 2e-3
LEARNED_RATE = 1e-2
LOWER, UPPER = 0.05, 0.3  # of four pairs tried on seed 0, which is left out
ARMS = ("labels", "distilled", "small moves", "learned", "any moves")
AS_THEY_ARE = Pixels(mean=(0.0,), std=(1.0,))
Change = Callable[[Tensor], Tensor]


def smooth_patterns(generator: torch.Generator) -> Tensor:
    coarse = torch.randn(CLASSES, 1, 4, 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(PATTERN, PATTERN), mode="bicubic").squeeze(1)
    return smooth / smooth.flatten(1).std(1).view(-1, 1, 1)


def pictures(number: int, patterns: Tensor, generator: torch.Generator, reach: int) -> tuple[Tensor, Tensor]:
    """[N, 1, SIDE, SIDE] with patterns up to `reach` pixels from the middle, and their classes."""
    classes_N = torch.randint(0, CLASSES, (number,), generator=generator)
    moves_N2 = torch.randint(-reach, reach + 1, (number, 2), generator=generator) if reach else None
    contrast_N11 = 0.7 + 0.6 * torch.rand(number, 1, 1, generator=generator)
    placed = torch.zeros(number, 1, SIDE, SIDE)
    first = (SIDE - PATTERN) // 2
    placed[:, 0, first : first + PATTERN, first : first + PATTERN] = patterns[classes_N] * contrast_N11
    if moves_N2 is not None:
        moved = [torch.roll(p, (int(y), int(x)), (1, 2)) for p, (y, x) in zip(placed, moves_N2, strict=True)]
        placed = torch.stack(moved)
    return placed + 0.3 * torch.randn(placed.shape, generator=generator), classes_N


class Teacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(32, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).amax((2, 3)))


def train_teacher(images: Tensor, classes_N: Tensor, generator: torch.Generator) -> Teacher:
    teacher = Teacher()
    optimiser = torch.optim.Adam(teacher.parameters(), lr=2e-3)
    for _ in range(8):
        for rows in torch.randperm(len(images), generator=generator).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(teacher(images[rows]), classes_N[rows]).backward()
            optimiser.step()
    return teacher.eval().requires_grad_(False)


def moved_by(reach: int, generator: torch.Generator) -> Change:
    warps = Warps(translate=reach / SIDE)

    def change(images: Tensor) -> Tensor:
        numbers = torch.zeros(len(images), NUMBERS)
        numbers[:, :2] = 2 * torch.rand(len(images), 2, generator=generator) - 1
        return warps(images, numbers, AS_THEY_ARE)

    return change


class Learned:
    """llava_kd's augmentor and phases around two models that are functions of pictures."""

    def __init__(self, student: nn.Module, teacher: nn.Module, seed: int) -> None:
        self._student, self._teacher = student, teacher
        self._augmentor = Augmentor(lr=LEARNED_RATE, seed=seed)
        self._warps = Warps(translate=REACH / SIDE)
        self._noise = torch.Generator().manual_seed(seed)
        self.learns, self.steps_learned = True, 0

    def __call__(self, images: Tensor) -> Tensor:
        """For the student: changed in its phase, as they are while the augmentor learns."""
        noise_IZ = torch.randn(len(images), NOISE, generator=self._noise)
        weights_P = self._augmentor.leaf()
        changed = self._warps(images, self._augmentor(images, noise_IZ, weights_P), AS_THEY_ARE)
        said, truth = self._student(changed).log_softmax(1), self._teacher(changed).log_softmax(1)
        disagreement = divergence_rows(said, truth, FORWARD).mean()
        learns = self.learns
        if learns:
            before = self._teacher(images).log_softmax(1)
            strayed = divergence_rows(truth, before, FORWARD).mean()
            (gradient_P,) = torch.autograd.grad(disagreement - strayed, weights_P)
            self._augmentor.ascend(gradient_P)
            self.steps_learned += 1
        self.learns = next_phase(
            learns=learns, disagreement=float(disagreement.detach()), lower=LOWER, upper=UPPER
        )
        return images if learns else changed.detach()


def train_student(
    arm: str, images: Tensor, classes_N: Tensor, teacher: nn.Module, seed: int
) -> tuple[nn.Module, float]:
    """And the share of steps in which the augmentor learned."""
    torch.manual_seed(seed)
    head = nn.Linear(128, CLASSES)
    body = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 128), nn.ReLU())
    student = nn.Sequential(*body, head)
    optimiser = torch.optim.Adam(student.parameters(), lr=RATE)
    order = torch.Generator().manual_seed(seed)
    learned = Learned(student, teacher, seed)
    changes: dict[str, Change] = {"small moves": moved_by(1, order), "any moves": moved_by(REACH, order)}
    change = learned if arm == "learned" else changes.get(arm, lambda images: images)
    ce, kl = (1.0, 0.0) if arm == "labels" else (0.1, 0.9)
    for _ in range(STEPS):
        rows = torch.randint(0, len(images), (BATCH,), generator=order)
        seen = change(images[rows])
        with torch.no_grad():
            teacher_NV = teacher(seen)
        optimiser.zero_grad()
        share_N = torch.full((BATCH,), 1 / BATCH)
        head_loss(
            body(seen), head.weight, classes_N[rows], student_bias_V=head.bias, ce_weight_N=ce * share_N,
            kl_weight_N=kl * share_N, teacher_NE=teacher_NV, teacher_head_UE=torch.eye(CLASSES),
        ).loss.backward()  # fmt: skip
        optimiser.step()
    return student, learned.steps_learned / STEPS


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, classes_N: Tensor) -> float:
    return 100 * float((model(images).argmax(1) == classes_N).double().mean())


def one_seed(seed: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    patterns = smooth_patterns(generator)
    training = pictures(4000, patterns, generator, 0)
    tests = {
        "centred": pictures(2000, patterns, generator, 0),
        "moved": pictures(2000, patterns, generator, REACH),
    }
    teacher = train_teacher(*training, generator)
    found = {f"teacher, {name}": accuracy(teacher, *test) for name, test in tests.items()}
    for arm in ARMS:
        student, share = train_student(arm, *training, teacher, seed)
        found |= {f"{arm}, {name}": accuracy(student, *test) for name, test in tests.items()}
        if arm == "learned":
            found["steps in which the augmentor learned, %"] = 100 * share
    return found


def report(runs: dict[int, dict[str, float]]) -> None:
    """The table, of each seed's figures."""
    values = {name: {seed: run[name] for seed, run in runs.items()} for name in next(iter(runs.values()))}
    print(f"{len(runs)} seeds; mean +- half the 95 % interval over them\n")
    for name in values:
        if name.startswith(("teacher", "steps")):
            print(f"{name}: {as_text(estimate(list(values[name].values())))}")
    print("\n| arm | moved, % | centred, % | moved, against small moves, paired |\n|---|---|---|---|")
    for arm in ARMS:
        gap = None if arm == "small moves" else paired(values[f"{arm}, moved"], values["small moves, moved"])
        each = [as_text(estimate(list(values[f"{arm}, {name}"].values()))) for name in ("moved", "centred")]
        print(f"| {arm} | {' | '.join(each)} | {as_text(gap, sign='+')} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 1")
    parser.add_argument("--out", type=Path, help="folder for results.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    runs: dict[int, dict[str, float]] = {}
    for seed in range(1, arguments.seeds + 1):
        runs[seed] = one_seed(seed)
        if arguments.out is not None:  # after each, so that a run that is cut short leaves something
            arguments.out.mkdir(parents=True, exist_ok=True)
            (arguments.out / "results.json").write_text(json.dumps(runs, indent=2) + "\n")
    report(runs)
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
