"""Answers of ten words of which two need the picture: a student with and without more weight for these.

    python scripts/methods/visual_dependency/proof.py [--seeds 3] [--out DIR]

Pictures of 12 x 12 belong to one of ten smooth patterns under noise. An answer follows one of twenty frames,
whose words are known from the frame and the place; at two places stands a word of the pattern. A perceptron
that learns 4,000 such pictures teaches one of a quarter of its width on 300 others, by forward divergence
through llava_kd's head loss. The arms of a seed differ in the weights alone, which are llava_kd's, from the
teacher's readings with the picture and with grey. Reported: accuracy at the two places and at the others, on 2,000
further pictures, and the paired differences to equal weights.

Shape legend: N words, R records, S pixels, D width, V words known.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from llava_kd.losses.head_loss import head_loss
from llava_kd.losses.targets.dependency import scores, weights
from llava_kd.losses.targets.mixture import Voice
from llava_kd.search.findings.statistics import as_text, estimate, paired

CLASSES, SIDE, FRAMES, WORDS, VOCABULARY = 10, 12, 20, 10, 60
STEPS = 400
ARMS: dict[str, tuple[str, float, float] | None] = {  # score, top and mass; None weighs all alike
    "equal weights": None,
    "va, half of the mass": ("va", 0.2, 0.5),
    "vds, top 0.3 alone": ("vds", 0.3, 1.0),
}


class Answers:
    """Pictures, and of each word its record, frame, place, label, and whether it needs the picture."""

    def __init__(self, number: int, patterns: Tensor, frames: Tensor, generator: torch.Generator) -> None:
        kind_R = torch.randint(CLASSES, (number,), generator=generator)
        frame_R = torch.randint(FRAMES, (number,), generator=generator)
        self.pixels_RS = patterns[kind_R] + 1.5 * torch.randn(number, SIDE * SIDE, generator=generator)
        self.record_N = torch.arange(number).repeat_interleave(WORDS)
        self.place_N = torch.arange(WORDS).repeat(number)
        self.frame_N = frame_R[self.record_N]
        said_N = frames[self.frame_N, self.place_N]
        self.needs_N = said_N < 0
        # The second of the two words is another name of the same pattern.
        name_N = kind_R[self.record_N] + CLASSES * (self.place_N % 2)
        self.labels_N = torch.where(self.needs_N, name_N, said_N)


class Speaker(nn.Module):
    """A picture, a frame and a place to the state that the head reads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.eyes = nn.Sequential(nn.Linear(SIDE * SIDE, width), nn.ReLU())
        self.frame, self.place = nn.Embedding(FRAMES, width), nn.Embedding(WORDS, width)
        self.body = nn.Sequential(nn.Linear(3 * width, width), nn.ReLU())
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, answers: Answers, rows_N: Tensor, *, is_grey: bool = False) -> Voice:
        pixels_NS = answers.pixels_RS[answers.record_N[rows_N]] * (not is_grey)
        parts = [
            self.eyes(pixels_NS),
            self.frame(answers.frame_N[rows_N]),
            self.place(answers.place_N[rows_N]),
        ]
        return Voice(self.body(torch.cat(parts, 1)), self.head.weight, self.head.bias)


def train(
    model: Speaker, answers: Answers, teacher: Speaker | None, arm: tuple[str, float, float] | None, seed: int
) -> Speaker:
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    order = torch.Generator().manual_seed(seed)
    number = len(answers.pixels_RS)
    for _ in range(STEPS):
        first_R1 = WORDS * torch.randperm(number, generator=order)[:30].sort().values.unsqueeze(1)
        rows_N = (first_R1 + torch.arange(WORDS)).flatten()
        said, labels_N = model(answers, rows_N), answers.labels_N[rows_N]
        share_N = torch.full((len(rows_N),), 1 / len(rows_N))
        taught = {}
        if teacher is not None:
            seen, unseen = (teacher(answers, rows_N, is_grey=grey) for grey in (False, True))
            weight_N = torch.ones_like(share_N)
            if arm is not None:
                found = scores(seen, unseen, labels_N)
                score_N = found.va_N if arm[0] == "va" else found.vds_N
                every_N = torch.ones_like(labels_N).bool()
                weight_N = weights(
                    score_N, answers.record_N[rows_N], every_N, number, top=arm[1], mass=arm[2]
                )
            taught = {"teacher_NE": seen.hidden_NE, "teacher_head_UE": seen.head_UE}
            taught |= {"teacher_bias_U": seen.bias_U, "kl_weight_N": share_N * weight_N}
        ce_N = share_N if teacher is None else 0 * share_N
        loss = head_loss(
            said.hidden_NE, said.head_UE, labels_N, student_bias_V=said.bias_U, ce_weight_N=ce_N, **taught
        ).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(model: Speaker, answers: Answers) -> tuple[float, float]:
    """In %, at words that need the picture, and at the others."""
    said = model(answers, torch.arange(len(answers.labels_N)))
    right_N = ((said.hidden_NE @ said.head_UE.T + said.bias_U).argmax(1) == answers.labels_N).double()
    return tuple(100 * float(right_N[of_N].mean()) for of_N in (answers.needs_N, ~answers.needs_N))  # type: ignore[return-value]


def one_seed(seed: int) -> dict[str, tuple[float, float]]:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    coarse = torch.randn(CLASSES, 1, 4, 4, generator=generator)
    patterns = nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic").flatten(1)
    frames = torch.randint(2 * CLASSES, VOCABULARY, (FRAMES, WORDS), generator=generator)
    frames[:, 3:5] = -1
    many, few, test = (Answers(n, patterns, frames, generator) for n in (4000, 300, 2000))
    teacher = train(Speaker(64), many, None, None, seed)
    found = {"teacher": accuracy(teacher, test)}
    for arm, setting in ARMS.items():
        torch.manual_seed(seed)
        found[arm] = accuracy(train(Speaker(16), few, teacher, setting, seed), test)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--out", type=Path, help="folder for results.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    runs = {seed: one_seed(seed) for seed in range(arguments.seeds)}
    print(f"{len(runs)} seeds; mean +- half the 95 % interval over them; in brackets against equal weights\n")
    print("| arm | words that need the picture, % | other words, % |\n|---|---|---|")
    for arm in runs[0]:
        cells = []
        for part in (0, 1):
            values, equal = (
                {s: run[name][part] for s, run in runs.items()} for name in (arm, "equal weights")
            )
            gap = (
                ""
                if arm in ("teacher", "equal weights")
                else f" ({as_text(paired(values, equal), sign='+')})"
            )
            cells.append(as_text(estimate(list(values.values()))) + gap)
        print(f"| {arm} | {cells[0]} | {cells[1]} |")
    print(f"\n{time.perf_counter() - began:.0f} s")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "results.json").write_text(json.dumps(runs, indent=2) + "\n")


if __name__ == "__main__":
    main()
