"""What a student learns from its own answers, and what from the data's, at equal steps of stage 3.

    python scripts/methods/on_policy/proof.py [--seeds 3] [--out DIR]

The quickstart's tower, student and shipped teacher on its shapes. A seed trains one student by stages 1 (once
for all seeds) and 2; from it every arm goes on for as many steps, of as many records, with visual_kl and
relation as in the paper:

    paper             cross_entropy and forward response_kl on the data's answers
    paper, reverse    the same with the reverse divergence, which the arms below have too
    offline           reverse response_kl alone, on answers that the stage-2 student drew once; teacher cached
    live, 0.5         as `paper, reverse`, but half of the steps are on answers that it draws as it is

Reported: greedy answers that are right of held-out questions, in percent, and CPU seconds of the whole arm,
with the answers and the cache of the offline one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

from llava_kd.cli import main as llava_kd
from llava_kd.data.shapes.writing import write_shapes
from llava_kd.search.findings.statistics import as_text, estimate, paired

ROOT = Path(__file__).parents[3]
BACKBONES = ROOT / "scripts" / "quickstart" / "backbones"
CE = {"cross_entropy": {"weight": 1.0}}
VISUAL = {"visual_kl": {"weight": 1.0}, "relation": {"weight": 0.5}}
FORWARD, REVERSE = ({"response_kl": {"weight": 1.0, "divergence": kind}} for kind in ("forward", "reverse"))
LIVE = {"share": 0.5, "temperature": 1.0, "max_new_tokens": 16}
ARMS: dict[str, dict] = {
    "paper": {"objective": CE | FORWARD | VISUAL},
    "paper, reverse": {"objective": CE | REVERSE | VISUAL},
    "offline": {"objective": REVERSE | VISUAL},
    "live, 0.5": {"objective": CE | REVERSE | VISUAL, "on_policy": LIVE},
}
BASE = "paper"


def run(*words: str) -> None:
    """A command of `llava-kd`, in this process; what it says is shown where it fails."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = llava_kd(list(words))
    if status != 0:
        raise SystemExit(f"llava-kd {' '.join(words)}:\n{said.getvalue()}")


def settings(folder: Path, name: str, data: Path, steps: int, seed: int, **more: object) -> Path:
    """The YAML of a stage."""
    tree = {
        "output_dir": str(folder / name),
        "data": {
            "path": str(data), "images": str(data.parent), "template": "vicuna", "max_length": 256,
            "num_workers": 0, "image_cache_mb": 256,
        },
        "objective": CE,
        "optim": {"lr": 2.0e-3},
        "trainable": ["multi_modal_projector", "language_model"],
        "global_batch_size": 16,
        "micro_batch_size": 16,
        "max_steps": steps,
        "seed": seed,
        "engine": {"kind": "single", "precision": "fp32", "device": "cpu"},
        "log": {"every": 50, "progress": False, "diagnostics_every": 0},
        "checkpoint": {"every": 100_000, "keep": 1},
        **more,
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def train(path: Path) -> Path:
    """The stage's model."""
    run("train", str(path))
    return path.with_suffix("") / "model"


def first_stage(folder: Path, data: Path, steps: int) -> Path:
    """Captions teach the student to see, once for all seeds."""
    parts = {
        "vision_tower": str(BACKBONES / "vision_tower"),
        "language_model": str(BACKBONES / "student_llm"),
    }
    path = settings(folder, "stage1", data / "captions.json", steps, 0, student=parts, optim={"lr": 3e-3})
    tree = yaml.safe_load(path.read_text())
    tree["data"]["template"] = "plain"
    path.write_text(yaml.safe_dump(tree))
    return train(path)


def own_answers(folder: Path, student: Path, data: Path, seed: int) -> Path:
    """The student's answers to every question of the data, as data."""
    out = folder / "answers"
    words = ["--data", str(data), "--images", str(data.parent), "--model", str(student), "--out", str(out)]
    drawn = ["--relabel", "--temperature", "1", "--seed", str(seed), "--max_new_tokens", "16"]
    run("data", "answer", "label", *words, *drawn, "--batch_size", "64", "--device", "cpu")
    return out / "records.json"


def accuracy(model: Path, data: Path) -> float:
    out = model.parent / "eval"
    words = ["--model", str(model), "--data", str(data / "test.json"), "--out", str(out)]
    run("eval", *words, "--batch_size", "64")
    return 100 * json.loads((out / "summary.json").read_text())["accuracy"]


def one_arm(folder: Path, name: str, number: int, student: Path, data: Path, seed: int, steps: int) -> dict:
    began = time.process_time()
    teacher: dict[str, object] = {"checkpoint": str(BACKBONES / "teacher"), "dtype": "float32"}
    records = data / "instructions.json"
    if name == "offline":
        answered = own_answers(folder, student, records, seed)
        more = {"student": {"checkpoint": str(student)}, "teacher": teacher, **ARMS[name]}
        path = settings(folder, f"arm{number}", answered, steps, seed, **more)
        tree = yaml.safe_load(path.read_text())
        tree["data"]["images"] = str(data)
        path.write_text(yaml.safe_dump(tree))
        run("cache-teacher", str(path), "--out", str(folder / "cache"))
        tree["teacher"]["cache"] = str(folder / "cache")
        path.write_text(yaml.safe_dump(tree))
    else:
        more = {"student": {"checkpoint": str(student)}, "teacher": teacher, **ARMS[name]}
        path = settings(folder, f"arm{number}", records, steps, seed, **more)
    model = train(path)
    seconds = time.process_time() - began
    return {"accuracy": accuracy(model, data), "seconds": seconds}


def one_seed(folder: Path, start: Path, data: Path, seed: int, steps: int) -> dict[str, dict[str, float]]:
    folder.mkdir(parents=True)
    path = settings(
        folder, "stage2", data / "instructions.json", 2 * steps, seed, student={"checkpoint": str(start)}
    )
    student = train(path)
    found = {"stage 2": {"accuracy": accuracy(student, data)}}
    print(f"seed {seed}, stage 2: {found['stage 2']}", file=sys.stderr, flush=True)
    for number, name in enumerate(ARMS):
        found[name] = one_arm(folder, name, number, student, data, seed, steps)
        print(f"seed {seed}, {name}: {found[name]}", file=sys.stderr, flush=True)
    return found


def report(runs: dict[int, dict[str, dict[str, float]]]) -> None:
    """The table, of each seed's figures."""
    print(f"{len(runs)} seeds; mean +- half the 95 % interval over them\n")
    print(f"| arm | right, % | against {BASE}, paired | CPU seconds |\n|---|---|---|---|")
    right = {name: {seed: run[name]["accuracy"] for seed, run in runs.items()} for name in ("stage 2", *ARMS)}
    for name, values in right.items():
        gap = None if name in (BASE, "stage 2") else paired(values, right[BASE])
        spent = None if name == "stage 2" else estimate([run[name]["seconds"] for run in runs.values()])
        mean = as_text(estimate(list(values.values())))
        print(f"| {name} | {mean} | {as_text(gap, sign='+')} | {as_text(spent, digits=0)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--steps", type=int, default=150, help="of an arm; stage 2 has twice as many")
    parser.add_argument("--scenes", type=int, default=800, help="pictures with questions to train on")
    parser.add_argument("--questions", type=int, default=600, help="held-out ones")
    parser.add_argument("--out", type=Path, help="folder for results.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are small
    began = time.perf_counter()
    runs: dict[int, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_shapes(
            folder / "data",
            num_train=arguments.scenes,
            num_validation=6,
            num_test=arguments.questions,
            seed=5,
            progress=False,
        )
        start = first_stage(folder, folder / "data", arguments.steps)
        for seed in range(arguments.seeds):
            runs[seed] = one_seed(folder / str(seed), start, folder / "data", seed, arguments.steps)
            if arguments.out is not None:  # after each, so that a run that is cut short leaves something
                arguments.out.mkdir(parents=True, exist_ok=True)
                (arguments.out / "results.json").write_text(json.dumps(runs, indent=2) + "\n")
    report(runs)
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
