"""A connector over the grid of visual tokens against two layers of its size, by the noise of the pictures.

    python scripts/methods/skd/proof.py [--seeds 3] [--out DIR]

Two tasks of ten classes, on pictures of 12 x 12. `patterns` is that of the proof in ../std_temperature, with
150 pictures for the student. In `pairs` two patches side by side, somewhere, hold two of four textures, and
which is on the left counts: a question about neighbours, with 600 pictures. The teacher of a task is a
ConvNet that learned 4,000 others. A frozen, random tower sees patches of 3 x 3, each alone, and gives 4 x 4
tokens of width 32 with their places; llava_kd's connector `conv_attention` or stock LLaVA's two layers, of
equal parameters, carry them to width 48; a linear head reads their mean. 600 steps of 0.1 cross-entropy +
0.9 divergence at temperature 4, or of cross-entropy alone. Tested on 2,000 others as they are and with more
noise: levels are standard deviations, where a pattern or texture has about 1, and every picture noise of 0.8
already, in pairs 0.4.

Shape legend: N pictures, T tokens, E tower width, D width behind the connector.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from transformers import LlavaConfig, Qwen2Config, SiglipVisionConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from llava_kd.losses.head_loss import head_loss
from llava_kd.models.projectors.conv_attention import ConvAttention, ConvAttentionConfig, sizes
from llava_kd.search.findings.statistics import as_text, estimate, paired

PATCH, GRID, TOWER, WIDTH = 3, 4, 32, 48
CONNECTORS = ("MLP", "conv_attention")
ARMS = {f"{name}{with_kd}": (name, bool(with_kd)) for name in CONNECTORS for with_kd in ("", " + KD")}
TASKS = ("patterns", "pairs")
LEVELS = (0.0, 0.5, 1.0, 2.0)
STEPS, BATCH, STD = 600, 50, 0.15


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


def pairs(number: int, textures: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """[N, 1, 12, 12] and which of ten ordered pairs of textures each shows."""
    ordered = torch.tensor([(a, b) for a in range(4) for b in range(4) if a != b][: PATTERNS.CLASSES])
    classes_N = torch.randint(0, len(ordered), (number,), generator=generator)
    rows_N = torch.randint(0, GRID, (number,), generator=generator).tolist()
    columns_N = torch.randint(0, GRID - 1, (number,), generator=generator).tolist()
    contrast_N = 0.5 + torch.rand(number, generator=generator)
    images = 0.4 * torch.randn(number, 1, GRID * PATCH, GRID * PATCH, generator=generator)
    for n, (row, column) in enumerate(zip(rows_N, columns_N, strict=True)):
        both = torch.cat(list(textures[ordered[classes_N[n]]]), dim=1)
        y, x = row * PATCH, column * PATCH
        images[n, 0, y : y + PATCH, x : x + 2 * PATCH] += contrast_N[n] * both
    return images, classes_N


def draw(task: str, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Pictures for the teacher, for the student and for the test."""
    if task == "patterns":
        make, what, few = PATTERNS.pictures, PATTERNS.smooth_patterns(generator), 150
    else:
        textures = torch.randn(4, PATCH, PATCH, generator=generator)
        textures = textures - textures.mean((1, 2), keepdim=True)
        make, what, few = pairs, textures / textures.flatten(1).std(1).view(-1, 1, 1), 600
    return [make(number, what, generator) for number in (4000, few, 2000)]


class Tower(nn.Module):
    """[N, 1, 12, 12] to [N, T, E]: what a patch holds, and where it is."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, TOWER, PATCH, stride=PATCH)
        nn.init.normal_(self.patches.weight, std=1 / PATCH, generator=generator)
        nn.init.normal_(self.patches.bias, std=0.5, generator=generator)  # pyright: ignore[reportArgumentType]
        self.places_TE = torch.randn(GRID * GRID, TOWER, generator=generator)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.gelu(self.patches(images)).flatten(2).transpose(1, 2) + self.places_TE


def connector(name: str, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    widths = {
        "vision_config": SiglipVisionConfig(hidden_size=TOWER),
        "text_config": Qwen2Config(hidden_size=WIDTH),
    }
    if name == "MLP":
        layers = LlavaMultiModalProjector(LlavaConfig(**widths))
        for parameter in layers.parameters():
            nn.init.normal_(parameter, std=STD * (parameter.dim() > 1), generator=generator)
        return layers
    found = sizes(TOWER, WIDTH)
    layers = ConvAttention(
        ConvAttentionConfig(
            **widths,
            projector_width=found.width,
            projector_gate_width=found.gate,
            projector_rows=GRID,
            projector_columns=GRID,
        )
    )
    layers.draw(generator, STD)
    return layers


class Student(nn.Module):
    def __init__(self, tower: Tower, name: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.head = nn.Linear(WIDTH, PATTERNS.CLASSES)
        self.norm = nn.RMSNorm(WIDTH)
        self.connector = connector(name, seed)
        self.tower = tower.requires_grad_(False)

    def states(self, images: Tensor) -> Tensor:
        return self.norm(self.connector(self.tower(images)).mean(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.states(images))


def train_student(
    arm: str, tower: Tower, few: tuple[Tensor, Tensor], teacher_NV: Tensor, seed: int
) -> Student:
    name, has_teacher = ARMS[arm]
    student = Student(tower, name, seed)
    optimiser = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=2e-3)
    order, eye_VV = torch.Generator().manual_seed(seed), torch.eye(PATTERNS.CLASSES)
    ce, kl = (0.1, 0.9) if has_teacher else (1.0, 0.0)
    images, classes_N = few
    for _ in range(STEPS * BATCH // len(images)):
        for rows in torch.randperm(len(images), generator=order).split(BATCH):
            optimiser.zero_grad()
            share_N = torch.full((len(rows),), 1 / len(rows))
            head_loss(
                student.states(images[rows]), student.head.weight, classes_N[rows],
                student_bias_V=student.head.bias, ce_weight_N=ce * share_N, kl_weight_N=kl * share_N,
                teacher_NE=teacher_NV[rows], teacher_head_UE=eye_VV, temperature=4.0,
            ).loss.backward()  # fmt: skip
            optimiser.step()
    return student


def one_seed(task: str, seed: int) -> dict[str, dict[str, float]]:
    """Accuracy of each arm at each level, the same noise for all."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    many, few, test = draw(task, generator)
    teacher = PATTERNS.train_teacher(*many, generator)
    tower = Tower(generator)
    drawn = torch.randn(test[0].shape, generator=generator)
    models = {"teacher": teacher}
    models |= {arm: train_student(arm, tower, few, teacher(few[0]), seed) for arm in ARMS}
    return {
        arm: {
            f"{level:g}": PATTERNS.accuracy(model.eval(), test[0] + level * drawn, test[1])
            for level in LEVELS
        }
        for arm, model in models.items()
    }


def show(runs: dict[int, dict[str, dict[str, float]]]) -> None:
    levels = [f"{level:g}" for level in LEVELS]
    head = " | ".join(f"noise {level}" for level in levels)

    def values(arm: str, level: str) -> dict[int, float]:
        return {seed: run[arm][level] for seed, run in runs.items()}

    print(f"\n| arm, accuracy in % | {head} |\n|---|{'---|' * len(levels)}")
    for arm in runs[0]:
        cells = [as_text(estimate(list(values(arm, level).values()))) for level in levels]
        print(f"| {arm} | {' | '.join(cells)} |")
    compared = [
        ("conv_attention", "MLP"),
        ("conv_attention + KD", "MLP + KD"),
        ("MLP + KD", "MLP"),
        ("conv_attention + KD", "conv_attention"),
    ]
    print(f"\n| paired difference, points | {head} |\n|---|{'---|' * len(levels)}")
    for one, other in compared:
        cells = [as_text(paired(values(one, level), values(other, level)), sign="+") for level in levels]
        print(f"| {one} against {other} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--out", type=Path, help="folder for results.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    counts = {name: sum(p.numel() for p in connector(name, 0).parameters()) for name in CONNECTORS}
    print(", ".join(f"{name}: {number:,} parameters" for name, number in counts.items()))
    print(f"{arguments.seeds} seeds; mean +- half the 95 % interval over them")
    found = {}
    for task in TASKS:
        found[task] = {seed: one_seed(task, seed) for seed in range(arguments.seeds)}
        print(f"\n{task}", flush=True)
        show(found[task])
    print(f"\n{time.perf_counter() - began:.0f} s")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        results = {"parameters": counts, "runs": found}
        (arguments.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
