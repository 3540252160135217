"""Two students of two architectures, each alone or each the other's teacher, with few pictures.

    python scripts/methods/peer/proof.py [--seeds 3] [--arms ...] [--out DIR]

Pictures of 12 x 12 belong to one of ten smooth patterns, moved, scaled in contrast and covered with noise. A
ConvNet and a small transformer over patches, 16 visual tokens each, learn 150 of them and are tested on 2,000
others. They stand in the places of two MLLMs: the losses, the terms, what selects and the exchange of sides
are llava_kd's own (`Student`, `Peer`, `Objective`), and an arm is nothing but its terms. The arms of a seed
begin at the same weights and see the same batches. Terms have weight 1 and temperature 1: nothing was tuned.

Shape legend: I pictures, C channels, H height, W width, N visual tokens, T tokens of a row, D width.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from llava_kd.batch import IGNORE_INDEX, Batch, Inputs
from llava_kd.distill.formulas import FORMULAS, Common
from llava_kd.distill.objective import Objective
from llava_kd.distill.student import Student
from llava_kd.distill.teaching.peer import Peer
from llava_kd.distill.terms.cross_entropy import CrossEntropy
from llava_kd.distill.terms.inner.hint import VisualHint
from llava_kd.distill.terms.inner.regions import VisualRegions
from llava_kd.distill.terms.response_kl import ResponseKL
from llava_kd.distill.terms.term import Term, Widths
from llava_kd.models.mllm import Prediction
from llava_kd.search.findings.statistics import as_text, estimate, paired

CLASSES, SIDE, FEW, BATCH, EPOCHS = 10, 12, 150, 75, 60
TOKENS, WIDTH = 16, 32
EARLY = "multi_modal_projector"  # the name by which terms tap the low layers
HFD = VisualHint(kind="cosine", map="always", student_taps=(EARLY,), teacher_taps=(EARLY,))
ARMS: dict[str, Mapping[str, Term]] = {
    "independent": {},
    "mutual": {"response_kl": ResponseKL()},
    "selective": {"response_kl": ResponseKL(trust="better")},
    "reversed": {"response_kl": ResponseKL(trust="worse")},
    "selective + HFD + regions": {
        "response_kl": ResponseKL(trust="better"),
        "visual_hint": HFD,
        "visual_regions": VisualRegions(map="always"),
    },
}
SIDES = ("ConvNet", "transformer")


class Model(nn.Module):
    """What a `Student` asks of an MLLM: low-layer features of pictures, and a prediction from them."""

    train_tower = True

    def __init__(self, low: nn.Module, body: nn.Module) -> None:
        super().__init__()
        self.low, self.body = low, body
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def image_features(self, inputs: Inputs) -> Tensor:
        return self.low(inputs.pixels_ICHW)

    def forward(self, inputs: Inputs, features_IND: Tensor) -> Prediction:
        states_IND = self.body(features_IND)
        answer_I1D = states_IND.mean(1, keepdim=True)
        hidden_ITD = self.norm(torch.cat([states_IND, answer_I1D, answer_I1D], dim=1))
        return Prediction(
            hidden_BTD=hidden_ITD,
            projected_IND=features_IND,
            head_VD=self.head.weight,
            bias_V=self.head.bias,
            tapped={EARLY: features_IND, "language_model": hidden_ITD},
        )


class Tokens(nn.Module):
    """[I, D, 4, 4] as [I, N, D]."""

    def forward(self, maps_IDHW: Tensor) -> Tensor:
        return maps_IDHW.flatten(2).transpose(1, 2)


class Blocks(nn.Module):
    """Places added, then a layer of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.places_ND = nn.Parameter(0.02 * torch.randn(TOKENS, WIDTH))
        self.layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, tokens_IND: Tensor) -> Tensor:
        return self.layer(tokens_IND + self.places_ND)


class Convolutions(nn.Module):
    """Two more convolutions over the grid of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.ReLU()
        )
        self.tokens = Tokens()

    def forward(self, tokens_IND: Tensor) -> Tensor:
        return self.tokens(self.layers(tokens_IND.transpose(1, 2).unflatten(2, (4, 4))))


def convnet() -> Model:
    low = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, WIDTH, 3, stride=3), nn.ReLU(), Tokens()
    )
    return Model(low, Convolutions())


def transformer() -> Model:
    return Model(nn.Sequential(nn.Conv2d(1, WIDTH, 3, stride=3), Tokens()), Blocks())


def pictures(number: int, patterns: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """[I, 1, SIDE, SIDE] and their classes."""
    classes_I = torch.randint(0, CLASSES, (number,), generator=generator)
    moves_I2 = torch.randint(-2, 3, (number, 2), generator=generator).tolist()
    moved = [torch.roll(patterns[c], tuple(m), (0, 1)) for c, m in zip(classes_I, moves_I2, strict=True)]
    contrast = 0.5 + torch.rand(number, 1, 1, generator=generator)
    noise = 0.8 * torch.randn(number, SIDE, SIDE, generator=generator)
    return (torch.stack(moved) * contrast + noise).unsqueeze(1), classes_I


def batch_of(images_ICHW: Tensor, classes_I: Tensor) -> Batch:
    """Rows of the visual tokens, a prompt of one token, and the class as the answer."""
    number, length = len(images_ICHW), TOKENS + 2
    labels_IT = torch.full((number, length), IGNORE_INDEX)
    labels_IT[:, -1] = classes_I
    visual_IT = (torch.arange(length) < TOKENS).expand(number, -1)
    inputs = Inputs(
        input_ids_BT=torch.zeros(number, length, dtype=torch.long),
        labels_BT=labels_IT,
        position_ids_BT=torch.arange(length).expand(number, -1),
        segment_ids_BT=torch.ones(number, length, dtype=torch.long),
        visual_BT=visual_IT,
        pixels_ICHW=images_ICHW,
        image_is_valid_I=torch.ones(number, dtype=torch.bool),
    )
    return Batch(student=inputs, record_ids=tuple(map(str, range(number))))


def objective(terms: Mapping[str, Term]) -> Objective:
    """Both sides have the same widths and the same grid, so that one side's is the other's."""
    widths: dict[str, int] = {EARLY: WIDTH, "language_model": WIDTH}
    sizes = Widths(student=WIDTH, teacher=WIDTH, student_taps=widths, teacher_taps=widths)
    every = {"cross_entropy": CrossEntropy(), **terms}
    made = {name: term.module(sizes) for name, term in every.items()}
    return Objective(
        terms=every,
        common=Common(num_common=CLASSES, formulas=FORMULAS["fast"]),
        modules={name: module for name, module in made.items() if module is not None},
    )


@torch.no_grad()
def accuracy(model: Model, images_ICHW: Tensor, classes_I: Tensor) -> float:
    inputs = batch_of(images_ICHW, classes_I).student
    prediction = model(inputs, model.image_features(inputs))
    said_I = model.head(prediction.hidden_BTD[:, TOKENS]).argmax(1)
    return 100 * float((said_I == classes_I).double().mean())


def one_arm(terms: Mapping[str, Term], few: tuple[Tensor, Tensor], seed: int) -> tuple[Model, Model]:
    torch.manual_seed(seed)
    first, second = convnet(), transformer()
    turned = {name: term.mirrored() for name, term in terms.items()}
    student = Student(first, objective(terms), Peer(second, objective(turned)))  # pyright: ignore
    optimiser = torch.optim.Adam(student.parameters(), lr=3e-3, fused=True)
    order = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for rows in torch.randperm(FEW, generator=order).split(BATCH):
            batch = batch_of(few[0][rows], few[1][rows])
            optimiser.zero_grad()
            student.losses(student, batch, student.counts(batch))[0].backward()
            optimiser.step()
    return first, second


def one_seed(seed: int, arms: Sequence[str]) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(CLASSES, 1, 4, 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic").squeeze(1)
    patterns = smooth / smooth.flatten(1).std(1).view(-1, 1, 1)
    few, test = (pictures(number, patterns, generator) for number in (FEW, 2000))
    found = {}
    for arm in arms:
        for side, model in zip(SIDES, one_arm(ARMS[arm], few, seed), strict=True):
            found[f"{arm}, {side}"] = accuracy(model, *test)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--out", type=Path, help="folder for results.json")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS)[:4], help="beside independent")
    arguments = parser.parse_args()
    arms = ["independent", *(arm for arm in arguments.arms if arm != "independent")]
    torch.set_num_threads(1)
    began = time.perf_counter()
    runs = {}
    for seed in range(arguments.seeds):
        runs[seed] = one_seed(seed, arms)
        print(f"seed {seed} is done, {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        if arguments.out is not None:
            arguments.out.mkdir(parents=True, exist_ok=True)
            (arguments.out / "results.json").write_text(json.dumps(runs, indent=2) + "\n")
    print(f"{len(runs)} seeds; mean +- half the 95 % interval over them; accuracy in per cent\n")
    print("| arm | " + " | ".join(f"{side} | against independent, paired" for side in SIDES) + " |")
    print("|---|" + "---|" * 2 * len(SIDES))
    for arm in arms:
        cells = [arm]
        for side in SIDES:
            values = {seed: run[f"{arm}, {side}"] for seed, run in runs.items()}
            base = {seed: run[f"independent, {side}"] for seed, run in runs.items()}
            gap = None if arm == "independent" else paired(values, base)
            cells += [as_text(estimate(list(values.values()))), as_text(gap, sign="+", none="")]
        print(f"| {' | '.join(cells)} |")
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
