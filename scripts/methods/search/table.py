"""Train every recipe of a small grid on four data sets, once, for searches to be replayed over.

    python scripts/methods/search/table.py [--out scripts/methods/search/table.json]

The pictures, the teacher and the student of scripts/methods/std_temperature/proof.py. A data set is ten
patterns of its own, 100 to 250 pictures for the student and a teacher of its own, of 1,500 pictures. A
student is trained for 60 epochs by SGD with momentum 0.9, once for each of 6 rates x 3 temperatures x 4
shares of the divergence x 2 kinds of it: 576 trainings in all, those of a data set side by side as one batch
of matrices, which changes nothing for any of them. The table holds accuracies on 2,000 further pictures, null
where weights are no numbers any more. One training a cell: what a search would see.

Shape legend: R recipes, N pictures of a batch, P pixels, D hidden units, V classes.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import time
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from llava_kd.losses.divergence import Divergence, divergence_rows

SPACE: dict[str, list] = {  # the learning rate is 10 ** (rate / 2 - 2)
    "rate": [0, 1, 2, 3, 4, 5],
    "temperature": [1, 2, 4],
    "share": [0.0, 0.5, 0.9, 1.0],
    "divergence": ["forward", "reverse"],
}
DATA = {"patterns 0": 150, "patterns 1": 100, "patterns 2": 200, "patterns 3": 250}
EPOCHS, BATCH, HIDDEN = 60, 50, 32


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


def first_weights(count: int) -> list[Tensor]:
    """The same start for every recipe."""
    torch.manual_seed(0)
    body, head = nn.Linear(PATTERNS.SIDE**2, HIDDEN), nn.Linear(HIDDEN, PATTERNS.CLASSES)
    one = [body.weight.T, body.bias.unsqueeze(0), head.weight.T, head.bias.unsqueeze(0)]
    return [w.detach().expand(count, -1, -1).clone().requires_grad_(True) for w in one]


def logits(weights: list[Tensor], images: Tensor) -> Tensor:
    """[R, N, V] of every recipe's student."""
    body_RPD, body_bias_R1D, head_RDV, head_bias_R1V = weights
    pixels_NP = images.flatten(1)
    hidden_RND = (torch.einsum("np,rpd->rnd", pixels_NP, body_RPD) + body_bias_R1D).relu()
    return torch.baddbmm(head_bias_R1V, hidden_RND, head_RDV)


def losses(recipes: list[dict], logits_RNV: Tensor, classes_N: Tensor, teacher_NV: Tensor) -> Tensor:
    """[R]: (1 - share) cross-entropy + share T^2 divergence, means over the pictures."""
    count, classes = len(classes_N), logits_RNV.shape[2]
    share_R = torch.tensor([recipe["share"] for recipe in recipes])
    t_R11 = torch.tensor([float(recipe["temperature"]) for recipe in recipes]).view(-1, 1, 1)
    own_RN = -logits_RNV.log_softmax(2)[:, range(count), classes_N]
    student_RNV = (logits_RNV / t_R11).log_softmax(2)
    teacher_RNV = (teacher_NV / t_R11).log_softmax(2)
    far_RN = torch.empty(len(recipes), count)
    for kind in SPACE["divergence"]:
        rows = [k for k, recipe in enumerate(recipes) if recipe["divergence"] == kind]
        student_NV, teacher_NV = (one[rows].reshape(-1, classes) for one in (student_RNV, teacher_RNV))
        far_RN[rows] = divergence_rows(student_NV, teacher_NV, Divergence(kind=kind)).view(len(rows), count)
    return (1 - share_R) * own_RN.mean(1) + share_R * (t_R11.view(-1) ** 2) * far_RN.mean(1)


def train(recipes: list[dict], few: tuple[Tensor, Tensor], teacher_NV: Tensor) -> list[Tensor]:
    images, classes_N = few
    rate_R11 = torch.tensor([10 ** (recipe["rate"] / 2 - 2) for recipe in recipes]).view(-1, 1, 1)
    weights, order = first_weights(len(recipes)), torch.Generator().manual_seed(0)
    speeds = [torch.zeros_like(w) for w in weights]
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images), generator=order).split(BATCH):
            loss_R = losses(recipes, logits(weights, images[rows]), classes_N[rows], teacher_NV[rows])
            for w, speed, slope in zip(
                weights, speeds, torch.autograd.grad(loss_R.sum(), weights), strict=True
            ):
                speed.mul_(0.9).add_(slope)
                w.data.sub_(rate_R11 * speed)
    return weights


def fill(seed: int, count: int) -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(100 + seed)
    torch.manual_seed(seed)
    patterns = PATTERNS.smooth_patterns(generator)
    many, few, test = (PATTERNS.pictures(number, patterns, generator) for number in (1500, count, 2000))
    teacher = PATTERNS.train_teacher(*many, generator)
    recipes = [dict(zip(SPACE, values, strict=True)) for values in itertools.product(*SPACE.values())]
    weights = train(recipes, few, teacher(few[0]))
    with torch.no_grad():
        found_RNV = logits(weights, test[0])
        right_R = (found_RNV.argmax(2) == test[1]).double().mean(1)
        right_R[~torch.isfinite(found_RNV).all(2).all(1)] = math.nan
    print(f"its teacher: {PATTERNS.accuracy(teacher, *test):.1f} %", flush=True)
    return [
        {**recipe, "score": None if math.isnan(value) else value}
        for recipe, value in zip(recipes, right_R.tolist(), strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("table.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began, table = time.perf_counter(), {}
    for seed, (name, count) in enumerate(DATA.items()):
        rows = fill(seed, count)
        table[name] = {"pictures": count, "rows": rows}
        scores = [float(str(row["score"])) for row in rows if row["score"] is not None]
        spent = time.perf_counter() - began
        print(
            f"{name}: {len(scores)} of {len(rows)} came to a score, the best {max(scores):.3f}, {spent:.0f} s"
        )
    record = {
        "command": "python scripts/methods/search/table.py",
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - began),
        "space": SPACE,
        "data": table,
    }
    arguments.out.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
