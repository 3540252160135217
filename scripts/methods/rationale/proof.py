"""Rationales of a teacher that plants wrong steps: what students learn from them raw, filtered and corrected.

    python scripts/methods/rationale/proof.py [--seeds 3] [--first 0] [--out DIR]

A picture is two by two cells, each of one of five colours, under noise. Of a question, "How many cells are
red?", the rationale names the colour of each cell, a step a line, then the number. A tiny LLaVA learns 3,000
rationales with 30 % of the steps wrong (another colour, drawn) and the number that follows from what is said.
It then writes rationales about 400 other pictures, at temperature 1. A student of the same shape learns with
`llava-kd train`, equally many steps an arm, from

    raw         all of them (`llava-kd data answer label`)
    filtered    those without a wrong step (`llava-kd data rationale --rounds 0`, by their scene graphs)
    corrected   all that are right after three rounds of correction at most (`--rounds 3`)
    gold        the true rationales of all 400

Reported on 400 new pictures: steps that are right, and answers that are. Nothing was chosen by these figures.
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
from PIL import Image
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2Config,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from llava_kd.cli import main as llava_kd
from llava_kd.search.findings.statistics import as_text, estimate, paired

sys.path.insert(0, str(Path(__file__).parents[2] / "quickstart"))
from backbone_tokenizer import IMAGE_TOKEN, make_tokenizer  # pyright: ignore[reportMissingImports]

CELLS = ("top left", "top right", "bottom left", "bottom right")
RGB = {
    "red": (210, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 60, 200),
    "yellow": (220, 200, 50),
    "white": (230, 230, 230),
}
SIDE, NOISE, WRONG = 8, 40, 0.3
TEACHING, ASKED, TESTED = 3000, 400, 400
ARMS = ("raw", "filtered", "corrected", "gold")
Colours = tuple[str, ...]  # of the cells


def run(*words: object) -> None:
    """A command of `llava-kd`, in this process; what it says is shown where it fails."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = llava_kd([str(word) for word in words])
    if status != 0:
        raise SystemExit(f"llava-kd {' '.join(map(str, words))}:\n{said.getvalue()}")


def draw(cells: Colours, rng: random.Random) -> Image.Image:
    picture = Image.new("RGB", (2 * SIDE, 2 * SIDE))
    for k, colour in enumerate(cells):
        own = [value + rng.gauss(0, NOISE) for value in RGB[colour]]
        for place in range(SIDE * SIDE):
            x, y = k % 2 * SIDE + place % SIDE, k // 2 * SIDE + place // SIDE
            pixel = [min(255, max(0, round(value + rng.gauss(0, NOISE)))) for value in own]
            picture.putpixel((x, y), (pixel[0], pixel[1], pixel[2]))
    return picture


def rationale(said: Colours, asked: str) -> str:
    steps = [f"The {cell} cell is {colour}." for cell, colour in zip(CELLS, said, strict=True)]
    return "\n".join([*steps, f"Answer: {said.count(asked)}"])


def write_split(folder: Path, split: str, number: int, rng: random.Random, wrong: float = 0.0) -> list[dict]:
    """Pictures, SPLIT.json of questions and rationales, SPLIT.graphs.json of what is in them."""
    records, graphs = [], {}
    for n in range(number):
        cells = tuple(rng.choices(list(RGB), k=4))
        asked = rng.choice(cells) if rng.random() < 0.8 else rng.choice(list(RGB))
        others = [rng.choice([colour for colour in RGB if colour != own]) for own in cells]
        said = tuple(other if rng.random() < wrong else own for own, other in zip(cells, others, strict=True))
        name = f"{split}{n}"
        draw(cells, rng).save(folder / f"{name}.png")
        talk = [("human", f"<image>\nHow many cells are {asked}?"), ("gpt", rationale(said, asked))]
        turns = [{"from": speaker, "value": text} for speaker, text in talk]
        records.append({"id": name, "image": f"{name}.png", "conversations": turns})
        places = zip(CELLS, cells, strict=True)
        objects = [{"name": "cell", "attributes": {"place": cell, "colour": own}} for cell, own in places]
        graphs[name] = {"objects": objects}
    (folder / f"{split}.json").write_text(json.dumps(records))
    (folder / f"{split}.graphs.json").write_text(json.dumps(graphs))
    return records


def make_model(folder: Path, texts: list[str], seed: int) -> Path:
    """A stock LLaVA directory with random weights, which sees a cell in a token."""
    tokenizer = make_tokenizer(texts, vocab_size=400)
    processor = LlavaProcessor(
        image_processor=SiglipImageProcessor(size={"height": 2 * SIDE, "width": 2 * SIDE}),
        tokenizer=tokenizer,
        patch_size=SIDE,
        vision_feature_select_strategy="full",
    )
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            image_size=2 * SIDE, patch_size=SIDE,
        ),
        text_config=Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=4,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(seed)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def train(folder: Path, name: str, start: Path, data: Path, steps: int, seed: int) -> Path:
    """One stage of cross-entropy alone; its stock model."""
    tree = {
        "output_dir": str(folder / name),
        "student": {"checkpoint": str(start)},
        "data": {
            "path": str(data),
            "images": str(folder),
            "template": "vicuna",
            "max_length": 128,
            "num_workers": 0,
            "image_cache_mb": 64,
        },
        "objective": {"cross_entropy": {"weight": 1.0}},
        "optim": {"lr": 3.0e-3},
        "trainable": ["multi_modal_projector", "language_model"],
        "global_batch_size": 40,
        "micro_batch_size": 40,
        "max_steps": steps,
        "seed": seed,
        "engine": {"kind": "single", "precision": "fp32", "device": "cpu"},
        "log": {"every": 100, "progress": False, "diagnostics_every": 0},
        "checkpoint": {"every": 100_000, "keep": 1},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    run("train", path)
    return folder / name / "model"


def made(folder: Path, teacher: Path, seed: int) -> dict[str, Path]:
    """The training file of each arm."""
    common = [f"--model={teacher}", f"--data={folder / 'asked.json'}", f"--images={folder}"]
    common += ["--batch_size=100", "--max_new_tokens=64", "--temperature=1", f"--seed={seed}"]
    run("data", "answer", "label", *common, "--relabel", f"--out={folder / 'raw'}")
    evidence = [f"--scene_graphs={folder / 'asked.graphs.json'}", "--prompt="]
    for arm, rounds in (("filtered", 0), ("corrected", 3)):
        run("data", "rationale", *common, *evidence, f"--rounds={rounds}", f"--out={folder / arm}")
    files = {arm: folder / arm / "records.json" for arm in ARMS if arm != "gold"}
    return {**files, "gold": folder / "asked.json"}


def right(texts: dict[str, str], true: list[dict]) -> dict[str, float]:
    """Of the steps that a rationale should have, and of its answers, the share that is right."""
    steps, answers = [], []
    for record in true:
        if record["id"] in texts:
            *own, answer = record["conversations"][1]["value"].splitlines()
            said = [line.strip() for line in texts[record["id"]].splitlines()]
            steps += [step in said for step in own]
            answers.append(bool(said) and said[-1] == answer)
    return {"steps, %": 100 * sum(steps) / len(steps), "answers, %": 100 * sum(answers) / len(answers)}


def answers_of(path: Path) -> dict[str, str]:
    return {one["id"]: one["conversations"][1]["value"] for one in json.loads(path.read_text())}


def one_seed(folder: Path, seed: int, steps: int) -> dict[str, dict[str, float]]:
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"cells {seed}")
    taught = write_split(folder, "taught", TEACHING, rng, wrong=WRONG)
    asked, tested = write_split(folder, "asked", ASKED, rng), write_split(folder, "tested", TESTED, rng)
    texts = [turn["value"] for record in taught for turn in record["conversations"]]
    start = make_model(folder / "start_t", texts, seed)
    teacher = train(folder, "teacher", start, folder / "taught.json", 2 * steps, seed)
    start = make_model(folder / "start_s", texts, seed + 1000)
    found = {}
    for arm, path in made(folder, teacher, seed).items():
        model = train(folder, f"student_{arm}", start, path, steps, seed)
        out = folder / f"{arm}.eval"
        asking = ["--batch_size=100", "--max_new_tokens=64", f"--images={folder}"]
        run("eval", f"--model={model}", f"--data={folder / 'tested.json'}", f"--out={out}", *asking)
        lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
        of_data, taught_by = right(answers_of(path), asked), answers_of(path)
        found[arm] = {
            "records": len(taught_by),
            "right steps of the data, %": of_data["steps, %"],
            "right answers of the data, %": of_data["answers, %"],
            **right({line["id"]: line["answer"] for line in lines}, tested),
        }
        print(f"seed {seed}, {arm}: {json.dumps(found[arm])}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--steps", type=int, default=300, help="of a student; a teacher has twice as many")
    parser.add_argument("--out", type=Path, help="folder for results.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are small
    began = time.perf_counter()
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    with tempfile.TemporaryDirectory() as scratch:
        runs = {seed: one_seed(Path(scratch) / str(seed), seed, arguments.steps) for seed in seeds}
    print(
        f"{len(runs)} seeds from {arguments.first}; mean +- half the 95 % interval; (paired, against raw)\n"
    )
    figures = list(runs[arguments.first]["raw"])
    print(f"| rationales | {' | '.join(figures)} |\n|{'---|' * (1 + len(figures))}")
    results: dict[str, object] = {"seeds": runs}
    for arm in ARMS:
        cells = []
        for figure in figures:
            values, raw = ({s: found[a][figure] for s, found in runs.items()} for a in (arm, "raw"))
            told, gap = estimate(list(values.values())), paired(values, raw)
            is_gap = arm != "raw" and figure in ("steps, %", "answers, %")
            cells.append(as_text(told) + (f" ({as_text(gap, sign='+')})" if is_gap else ""))
            results[f"{arm}: {figure}"] = {"over seeds": told, "against raw": gap}
        print(f"| {arm} | {' | '.join(cells)} |")
    print(f"\n{time.perf_counter() - began:.0f} s")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
