"""What each divergence does with a teacher of two modes and a student that can hold one.

    python scripts/methods/divergences/proof.py [--seeds 5] [--out DIR]

A teacher's next-token distribution has two humps over 64 columns; the student's head is of width 2, so that
its softmax is one hump, wide or narrow, wherever it likes. Each context has its own teacher and its own
student state, and the loss is llava_kd's head loss, as in training. Reported, over contexts and then seeds:

    precision   mass that the student puts where the teacher has 95 % of its own
    recall      mass that the teacher puts where the student has 95 % of its own
    modes       of the two, those that hold a tenth of the student's mass or more

Shape legend: N contexts of all seeds, V columns, D width.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from llava_kd.losses.divergence import KINDS, Divergence
from llava_kd.losses.head_loss import head_loss
from llava_kd.search.findings.statistics import Estimate, as_text, estimate

COLUMNS, CONTEXTS, STEPS, RATE = 64, 32, 1500, 0.05
MODE_WIDTH = 2.0
MIX = {"symmetric": 0.9, "skewed_forward": 0.1, "skewed_reverse": 0.1}  # those of DistiLLM; 0.5 elsewhere


def teachers(seed: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities [contexts, V], and the centres of both modes [contexts, 2]."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(CONTEXTS, 1, generator=generator)

    centres_N2 = torch.cat([uniform(8, 22), uniform(42, 56)], 1)
    share_N1 = uniform(0.35, 0.65)
    place_V = torch.arange(COLUMNS)
    humps = [(-(((place_V - centres_N2[:, [m]]) / MODE_WIDTH) ** 2) / 2).softmax(1) for m in (0, 1)]
    floor = 1e-4  # no column is impossible
    p_NV = (1 - floor) * (share_N1 * humps[0] + (1 - share_N1) * humps[1]) + floor / COLUMNS
    return p_NV.log(), centres_N2


def train(kind: str, teacher_NV: Tensor, seeds: list[int]) -> Tensor:
    """The student's probabilities, [N, V], after training on each row alone."""
    place_V = torch.linspace(-1, 1, COLUMNS)
    head_VD = torch.stack([place_V, -(place_V**2)], 1)
    starts = [torch.randn(CONTEXTS, generator=torch.Generator().manual_seed(1000 + s)) for s in seeds]
    slope_N = (0.1 * torch.cat(starts)).requires_grad_()
    log_curve_N = torch.zeros(len(teacher_NV), requires_grad=True)  # the hump is as wide as all the columns
    optimiser = torch.optim.Adam([slope_N, log_curve_N], lr=RATE)
    nothing_N, ones_N = torch.zeros(len(teacher_NV)), torch.ones(len(teacher_NV))
    eye_VV, targets_N = torch.eye(COLUMNS), torch.zeros(len(teacher_NV), dtype=torch.long)
    divergence = Divergence(kind, MIX.get(kind, 0.5))  # pyright: ignore[reportArgumentType]

    def states() -> Tensor:
        curve_N = log_curve_N.exp()
        return torch.stack([curve_N * slope_N, curve_N], 1)  # the hump's place is half of `slope_N`

    for _ in range(STEPS):
        optimiser.zero_grad()
        head_loss(
            states(), head_VD, targets_N, ce_weight_N=nothing_N, kl_weight_N=ones_N, teacher_NE=teacher_NV,
            teacher_head_UE=eye_VV, divergence=divergence,
        ).loss.backward()  # fmt: skip
        optimiser.step()
    return (states().detach() @ head_VD.T).softmax(1)


def most_likely(p_NV: Tensor, mass: float = 0.95) -> Tensor:
    """Whether a column is among the fewest that hold this mass."""
    sorted_NV, order_NV = p_NV.sort(dim=1, descending=True)
    is_in_NV = sorted_NV.cumsum(1) - sorted_NV < mass
    return torch.zeros_like(is_in_NV).scatter(1, order_NV, is_in_NV)


def measures(p_s_NV: Tensor, p_t_NV: Tensor, centres_N2: Tensor) -> dict[str, Tensor]:
    near_N2V = (torch.arange(COLUMNS) - centres_N2.unsqueeze(2)).abs() <= 3 * MODE_WIDTH
    return {
        "precision": (p_s_NV * most_likely(p_t_NV)).sum(1),
        "recall": (p_t_NV * most_likely(p_s_NV)).sum(1),
        "modes": ((p_s_NV.unsqueeze(1) * near_N2V).sum(2) >= 0.1).sum(1).float(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0")
    parser.add_argument("--out", type=Path, help="folder for results.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds, began = list(range(arguments.seeds)), time.perf_counter()
    made = [teachers(seed) for seed in seeds]
    teacher_NV, centres_N2 = torch.cat([t for t, _ in made]), torch.cat([c for _, c in made])
    results: dict[str, dict[str, Estimate]] = {}
    print(f"{CONTEXTS} contexts, {len(seeds)} seeds, {STEPS} steps; mean +- half the 95 % interval\n")
    print("| divergence | mix | precision | recall | modes |\n|---|---|---|---|---|")
    for kind in KINDS:
        found = measures(train(kind, teacher_NV, seeds), teacher_NV.exp(), centres_N2)
        results[kind] = {
            name: estimate([float(v) for v in values_N.view(len(seeds), CONTEXTS).double().mean(1)])
            for name, values_N in found.items()
        }
        figures = [as_text(value, digits=3) for value in results[kind].values()]
        print(f"| {kind} | {MIX.get(kind, 0.5)} | {' | '.join(figures)} |", flush=True)
    print(f"\n{time.perf_counter() - began:.0f} s")
    if not all(math.isfinite(value["mean"]) for row in results.values() for value in row.values()):
        raise SystemExit("a figure is not finite")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
