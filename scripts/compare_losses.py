"""What scripts/compare_losses.sh runs: a few tiny steps of each shipped recipe in two checkouts.

Both read the data and the models of the second, so that only code and recipes differ. Only `llava-kd train`
is used: a checkout may be older than this file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

OF_THE_MOMENT = ("_s", "_share", "seconds_per_step", "elapsed")  # of the machine, not of what was computed
SHOWN = 12


@dataclass(frozen=True)
class Side:
    """One of the two checkouts, by the name that the user gave it."""

    name: str
    path: Path

    @staticmethod
    def parse(text: str) -> Side:
        name, path = text.rsplit("=", 1)
        return Side(name, Path(path).resolve())

    def recipes(self) -> set[str]:
        """Stage files by their path; a pipeline or an ablation has no objective of its own."""
        trees = {p: yaml.safe_load(p.read_text()) for p in (self.path / "scripts").rglob("*.yaml")}
        stages = [
            p for p, tree in trees.items() if isinstance(tree, dict) and {"objective", "optim"} <= tree.keys()
        ]
        return {str(path.relative_to(self.path)) for path in stages}

    def run(self, words: list[str]) -> None:
        """`llava-kd` of this checkout; what it printed is shown if it fails."""
        done = subprocess.run(
            [sys.executable, "-m", "llava_kd.cli", *words],
            cwd=self.path,
            env=os.environ | {"PYTHONPATH": str(self.path)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise SystemExit(f"llava-kd {' '.join(words)} failed at {self.name}:\n{done.stderr[-2000:]}")


@dataclass(frozen=True)
class Outcome:
    """What a few steps of a recipe gave: the logged figures of each step, and the weights at the end."""

    figures: list[dict[str, float]]
    weights: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Tiny:
    """What makes any recipe small: the quickstart's models, few records, small batches."""

    backbones: Path
    scratch: Path
    num_steps: int

    def overrides(self, recipe: Path, output: Path) -> list[str]:
        tree = yaml.safe_load(recipe.read_text())
        data, student = tree["data"], tree["student"]
        reads_captions = data.get("template") == "plain" or "captions" in str(data.get("path"))
        records = self.scratch / "data" / ("captions.json" if reads_captions else "instructions.json")
        words = [
            f"--output_dir={output}",
            f"--data.path={records}",
            f"--data.images={records.parent}",
            "--data.num_workers=0",
            "--data.max_length=512",
            f"--max_steps={self.num_steps}",
            "--global_batch_size=8",
            "--micro_batch_size=4",
            "--engine.device=cpu",
            "--log.every=1",
            "--log.progress=false",
        ]
        if student.get("checkpoint"):
            words.append(f"--student.checkpoint={self.scratch / 'student' / 'model'}")
        else:
            language_model = "teacher_llm" if "teacher_llm" in student["language_model"] else "student_llm"
            words.append(f"--student.vision_tower={self.backbones / 'vision_tower'}")
            words.append(f"--student.language_model={self.backbones / language_model}")
        if tree.get("teacher"):
            words.append(f"--teacher.checkpoint={self.backbones / 'teacher'}")
        return words

    def train(self, side: Side, recipe: str, output: Path) -> Outcome:
        path = side.path / recipe
        side.run(["train", str(path), *self.overrides(path, output)])
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        figures = [{n: v for n, v in line.items() if not n.endswith(OF_THE_MOMENT)} for line in lines]
        weights: dict[str, torch.Tensor] = {}
        for file in sorted((output / "model").glob("*.safetensors")):
            weights |= load_file(file)
        return Outcome(figures, weights)


def differences(first: Outcome, second: Outcome) -> list[str]:
    """What is not equal to the last bit, one line each; empty where all is."""
    found = []
    if len(first.figures) != len(second.figures):
        found.append(f"{len(first.figures)} -> {len(second.figures)} steps")
    for step, (a, b) in enumerate(zip(first.figures, second.figures, strict=False), start=1):
        names = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
        found += [f"step {step}: {name} {a.get(name)} -> {b.get(name)}" for name in names]
    for name in sorted(first.weights.keys() | second.weights.keys()):
        a, b = first.weights.get(name), second.weights.get(name)
        if a is None or b is None:
            found.append(f"weight {name} is only in the {'second' if a is None else 'first'}")
        elif (a.shape, a.dtype) != (b.shape, b.dtype):
            found.append(f"weight {name} {tuple(a.shape)} {a.dtype} -> {tuple(b.shape)} {b.dtype}")
        elif not torch.equal(a, b):
            found.append(f"weight {name} differs by up to {float((a.float() - b.float()).abs().max()):.3g}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sides", nargs=2, type=Side.parse, metavar="NAME=CHECKOUT")
    parser.add_argument("recipes", nargs="*", help="such as scripts/stage3_dft.yaml (default: all)")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_intermixed_args()
    sides, scratch = arguments.sides, arguments.scratch.resolve()
    there = [side.recipes() for side in sides]
    if unknown := sorted(set(arguments.recipes) - there[0] - there[1]):
        raise SystemExit(
            f"no recipe {', '.join(unknown)}; there are {', '.join(sorted(there[0] | there[1]))}"
        )

    made = ["--num_train", "64", "--num_validation", "4", "--num_test", "4"]
    sides[1].run(["data", "shapes", "--out", str(scratch / "data"), *made])
    tiny = Tiny(sides[1].path / "scripts/quickstart/backbones", scratch, arguments.steps)
    tiny.train(sides[1], "scripts/quickstart/stage1_dpt.yaml", scratch / "student")

    moved = 0
    for recipe in sorted(set(arguments.recipes) or there[0] | there[1]):
        if missing := [side.name for side, names in zip(sides, there, strict=True) if recipe not in names]:
            print(f"{recipe}: not in {missing[0]}, so not compared", flush=True)
            continue
        outputs = [scratch / f"runs{number}" / recipe.replace("/", "-") for number in range(2)]
        first, second = (tiny.train(side, recipe, out) for side, out in zip(sides, outputs, strict=True))
        found = differences(first, second)
        losses = ", ".join(f"{line['loss']:.6f}" for line in second.figures)
        print(f"{recipe}: {'MOVED' if found else 'equal'}; losses {losses}", flush=True)
        print("".join(f"  {line}\n" for line in found[:SHOWN]), end="", flush=True)
        moved += bool(found)
    print(f"{moved} recipes moved between {sides[0].name} and {sides[1].name}")
    return int(moved > 0)


if __name__ == "__main__":
    sys.exit(main())
