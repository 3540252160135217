"""Train every recipe of a small grid on four data sets, once, for searches to be replayed over.

    python scripts/methods/search/table.py [--out scripts/methods/search/table.json]

The pictures, the teacher and the student of scripts/methods/std_temperature/proof.py. A data set is ten
patterns of its own, a number of pictures for the student (100 to 250) and a teacher of its own. The student is
trained for 30 epochs by SGD with llava_kd's head loss, once for each of 6 rates x 3 temperatures x 4 shares of
the divergence x 2 kinds of it: 576 trainings in all. The table holds accuracies on 2,000 further pictures, null
where the loss was no number. One training a cell: what a search would see.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import time
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from llava_kd.losses.divergence import Divergence
from llava_kd.losses.head_loss import head_loss

SPACE = {  # the rate is 10 ** (rate / 2 - 2)
    "rate": [0, 1, 2, 3, 4, 5],
    "temperature": [1, 2, 4],
    "share": [0.0, 0.5, 0.9, 1.0],
    "divergence": ["forward", "reverse"],
}
DATA = {"patterns 0": 150, "patterns 1": 100, "patterns 2": 200, "patterns 3": 250}
EPOCHS, BATCH = 30, 50


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


def train(recipe: dict[str, object], few: tuple[Tensor, Tensor], teacher_NV: Tensor) -> nn.Sequential | None:
    """None where the loss is no number any more."""
    torch.manual_seed(0)
    images, classes_N = few
    share, temperature = float(str(recipe["share"])), float(str(recipe["temperature"]))
    head = nn.Linear(32, PATTERNS.CLASSES)
    body = nn.Sequential(nn.Flatten(), nn.Linear(PATTERNS.SIDE**2, 32), nn.ReLU())
    rate = 10 ** (float(str(recipe["rate"])) / 2 - 2)
    optimiser = torch.optim.SGD([*body.parameters(), *head.parameters()], lr=rate, momentum=0.9)
    order, eye_VV = torch.Generator().manual_seed(0), torch.eye(PATTERNS.CLASSES)
    kind = Divergence(kind=recipe["divergence"])  # type: ignore[arg-type]
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images), generator=order).split(BATCH):
            optimiser.zero_grad()
            each_N = torch.full((len(rows),), 1 / len(rows))
            loss = head_loss(
                body(images[rows]), head.weight, classes_N[rows], student_bias_V=head.bias,
                ce_weight_N=(1 - share) * each_N, kl_weight_N=share * each_N, teacher_NE=teacher_NV[rows],
                teacher_head_UE=eye_VV, temperature=temperature, divergence=kind,
            ).loss  # fmt: skip
            if not torch.isfinite(loss):
                return None
            loss.backward()
            optimiser.step()
    return nn.Sequential(*body, head)


def fill(seed: int, count: int) -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(100 + seed)
    torch.manual_seed(seed)
    patterns = PATTERNS.smooth_patterns(generator)
    many, few, test = (PATTERNS.pictures(number, patterns, generator) for number in (4000, count, 2000))
    teacher = PATTERNS.train_teacher(*many, generator)
    logits_NV = teacher(few[0])
    rows: list[dict[str, object]] = []
    for values in itertools.product(*SPACE.values()):
        recipe = dict(zip(SPACE, values, strict=True))
        student = train(recipe, few, logits_NV)
        score = None if student is None else PATTERNS.accuracy(student, *test) / 100
        rows.append({**recipe, "score": score})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("table.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began, table = time.perf_counter(), {}
    for seed, (name, count) in enumerate(DATA.items()):
        table[name] = {"pictures": count, "rows": fill(seed, count)}
        scores = [row["score"] for row in table[name]["rows"] if row["score"] is not None]
        print(
            f"{name}: {len(scores)} of {len(table[name]['rows'])} came to a score, the best {max(scores):.3f}, "
            f"{time.perf_counter() - began:.0f} s",
            flush=True,
        )
    record = {
        "command": "python scripts/methods/search/table.py",
        "torch": torch.__version__,
        "space": SPACE,
        "seconds": round(time.perf_counter() - began),
        "data": table,
    }
    arguments.out.write_text(json.dumps(record, indent=None) + "\n")


if __name__ == "__main__":
    main()
