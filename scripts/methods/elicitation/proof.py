"""Little labelled data, and what a teacher's answers to more questions add to it.

    python scripts/methods/elicitation/proof.py [--seeds 3] [--first 0] [--out DIR]

The shipped teacher answers questions about pictures of shapes that it has not seen (`llava-kd data answer
label`), and of its answers the likelier three quarters are kept (`curate --by likelihood`). Of the records a
seed draws a few that are labelled by truth; the rest stand for unlabelled questions. The student of the
quickstart, taught captions once for all, then learns with `llava-kd train`, equally many steps an arm:

    labelled    the few
    taught      the few, and the rest as the teacher answers them
    curated     the few, and of those what is kept
    oracle      the few, and the rest with the true answers

Reported: accuracy on held-out questions, by `llava-kd eval`. Run again with the same --out, it goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

from llava_kd.cli import main as llava_kd
from llava_kd.search.findings.statistics import as_text, estimate, paired

BACKBONES = Path(__file__).parents[2] / "quickstart" / "backbones"
LABELLED, PICTURES, TESTED, KEPT = 100, 700, 600, 0.75
ARMS = ("labelled", "taught", "curated", "oracle")
Records = dict[str, dict]  # by id


def run(*words: object) -> None:
    """A command of `llava-kd`, in this process; what it says is shown where it fails."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = llava_kd([str(word) for word in words])
    if status != 0:
        raise SystemExit(f"llava-kd {' '.join(map(str, words))}:\n{said.getvalue()}")


def single_questions(shapes: Path) -> list[dict]:
    """Of every talk about a picture each question as a record of its own, with its true answer."""
    records = []
    for number, talk in enumerate(json.loads((shapes / "instructions.json").read_text())):
        turns = [turn["value"].removeprefix("<image>\n") for turn in talk["conversations"]]
        if len(turns) == 2:  # a description; the questions of a scene are several
            continue
        for k, (question, answer) in enumerate(zip(turns[::2], turns[1::2], strict=True)):
            said = [("human", f"<image>\n{question}"), ("gpt", answer)]
            talk_of_one = [{"from": speaker, "value": text} for speaker, text in said]
            records.append({"id": f"{number}-{k}", "image": talk["image"], "conversations": talk_of_one})
    return records


def answer_of(record: dict) -> str:
    return record["conversations"][1]["value"]


def read(path: Path) -> Records:
    return {record["id"]: record for record in json.loads(path.read_text())}


def elicit(folder: Path) -> dict[str, Records]:
    """The records with their true answers, with the teacher's, and those of its answers that are kept."""
    shapes = folder / "shapes"
    counts = {"num_train": PICTURES, "num_validation": 6, "num_test": TESTED, "seed": 2402}
    run("data", "shapes", f"--out={shapes}", *(f"--{name}={n}" for name, n in counts.items()))
    true = single_questions(shapes)
    (folder / "true.json").write_text(json.dumps(true))
    asked = [{**record, "conversations": record["conversations"][:1]} for record in true]
    (folder / "asked.json").write_text(json.dumps(asked))
    common = [f"--model={BACKBONES / 'teacher'}", f"--images={shapes}", "--batch_size=64"]
    answers = ["data", "answer"]
    run(*answers, "label", *common, f"--data={folder / 'asked.json'}", f"--out={folder / 'taught'}")
    taught = folder / "taught" / "records.json"
    kept = [f"--data={taught}", f"--out={folder / 'curated'}", "--by=likelihood", f"--keep={KEPT}"]
    run(*answers, "curate", *common, *kept)
    files = {"taught": taught, "curated": folder / "curated" / "records.json"}
    return {"true": read(folder / "true.json"), **{name: read(path) for name, path in files.items()}}


def train(out: Path, student: dict, data: dict, steps: int, seed: int) -> Path:
    """One stage of cross-entropy alone; its stock model."""
    tree = {
        "output_dir": str(out),
        "student": student,
        "data": {"max_length": 256, "num_workers": 0, "image_cache_mb": 256, **data},
        "objective": {"cross_entropy": {"weight": 1.0}},
        "trainable": ["multi_modal_projector", "language_model"],
        "optim": {"lr": 3.0e-3},
        "global_batch_size": 16,
        "micro_batch_size": 16,
        "max_steps": steps,
        "seed": seed,
        "engine": {"kind": "single", "precision": "fp32", "device": "cpu"},
        "log": {"every": 50, "progress": False, "diagnostics_every": 0},
        "checkpoint": {"every": 100_000, "keep": 1},
    }
    path = out.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree))
    run("train", path)
    return out / "model"


def one_seed(folder: Path, found: dict[str, Records], start: Path, seed: int, steps: int) -> dict[str, float]:
    """The accuracy of each arm."""
    true, own = found["true"], folder / f"seed{seed}"
    own.mkdir(exist_ok=True)
    few = set(random.Random(f"labelled {seed}").sample(sorted(true), LABELLED))
    more = {"labelled": {}, "taught": found["taught"], "curated": found["curated"], "oracle": true}
    accuracy = {}
    for arm in ARMS:
        records = [true[name] for name in sorted(few)]
        records += [record for name, record in more[arm].items() if name not in few]
        path = own / f"{arm}.json"
        path.write_text(json.dumps(records))
        data = {"path": str(path), "images": str(folder / "shapes"), "template": "vicuna"}
        model = train(own / arm, {"checkpoint": str(start)}, data, steps, seed)
        accuracy[arm] = score(folder, model, own / f"{arm}.eval")
        print(
            f"seed {seed}, {arm}: {len(records)} records, {accuracy[arm]:.1f} %", file=sys.stderr, flush=True
        )
    return accuracy


def score(folder: Path, model: Path, out: Path) -> float:
    run(
        "eval",
        f"--model={model}",
        f"--data={folder / 'shapes/test.json'}",
        f"--out={out}",
        "--batch_size=100",
    )
    return 100 * json.loads((out / "summary.json").read_text())["accuracy"]


def right(answers: Records, true: Records) -> float:
    return (
        100
        * sum(answer_of(true[name]) == answer_of(record) for name, record in answers.items())
        / len(answers)
    )


def prove(folder: Path, arguments: argparse.Namespace) -> dict:
    found = elicit(folder)
    captions = {
        "path": str(folder / "shapes/captions.json"),
        "images": str(folder / "shapes"),
        "template": "plain",
    }
    student = {
        "vision_tower": str(BACKBONES / "vision_tower"),
        "language_model": str(BACKBONES / "student_llm"),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "full",
    }
    start = train(folder / "start", student, captions, arguments.start, seed=0)
    told = {
        "questions": len(found["true"]),
        "labelled": LABELLED,
        "steps": arguments.steps,
        "taught, % right": right(found["taught"], found["true"]),
        "curated, % right": right(found["curated"], found["true"]),
        "curated": len(found["curated"]),
        "teacher, %": score(folder, BACKBONES / "teacher", folder / "teacher.eval"),
    }
    print(json.dumps(told), file=sys.stderr, flush=True)
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    runs = {seed: one_seed(folder, found, start, seed, arguments.steps) for seed in seeds}
    return {**told, "seeds": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--steps", type=int, default=200, help="of every arm")
    parser.add_argument("--start", type=int, default=100, help="steps on captions, once for all arms")
    parser.add_argument("--out", type=Path, help="folder for results.json and all that is made")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are small
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        results = prove(folder.absolute(), arguments)
    runs = results["seeds"]
    print(f"{json.dumps({name: value for name, value in results.items() if name != 'seeds'})}\n")
    print(f"{len(runs)} seeds from {arguments.first}; mean +- half the 95 % interval\n")
    print("| arm | accuracy, % | standard error | against labelled, paired | against taught, paired |")
    print("|---|---|---|---|---|")
    values = {arm: {seed: run[arm] for seed, run in runs.items()} for arm in ARMS}
    for arm in ARMS:
        told = estimate(list(values[arm].values()))
        error = "-" if told["error"] is None else f"{told['error']:.1f}"
        gaps = [
            "" if arm == base else as_text(paired(values[arm], values[base]), sign="+")
            for base in ("labelled", "taught")
        ]
        print(f"| {arm} | {as_text(told)} | {error} | {' | '.join(gaps)} |")
        results[arm] = told
    print(f"\n{time.perf_counter() - began:.0f} s")
    if arguments.out is not None:
        (arguments.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
