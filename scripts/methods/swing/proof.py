"""Ten codes in a student's data: what each policy for private tokens lets it remember of them.

    python scripts/methods/swing/proof.py [--seeds 3] [--out DIR]

A tiny LLaVA teacher learns sums of two numbers below ten, and ten three-digit codes that `llava-kd canary
insert` plants among them; it knows both by heart. A student of the same shape is then distilled on the same
data with `llava-kd train`, once an arm. The arms of a seed differ in the policy, and in whether there are
hard labels. Reported: exposure of the codes in bits by `llava-kd canary exposure`, all 1,000 ranked; chance
is 1.44, the most 9.97. And accuracy on the sums, which all arms trained on. Text alone: no picture is needed.

Two arms have a tagger that takes every number for private, the sums too.
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

KL, CE = {"response_kl": {"weight": 1.0}}, {"cross_entropy": {"weight": 1.0}}
SWING = {"temperature": 50.0}
NOISE = {**SWING, "noise": 0.5}
EXACT, LOOSE = {"record_spans": True}, {"spans": [{"regex": r"\d+"}]}
ARMS: dict[str, tuple[dict, dict | None]] = {  # terms, and the policy
    "KD": (KL, None),
    "KD + CE": (KL | CE, None),
    "swing": (KL, EXACT | SWING),
    "swing + noise": (KL, EXACT | NOISE),
    "swing + noise + CE, masked": (KL | CE, EXACT | NOISE),
    "swing + noise + CE, not masked": (KL | CE, EXACT | NOISE | {"cross_entropy": 1.0}),
    "drop": (KL | CE, EXACT | {"kl": 0.0}),
    "loose tagger: swing + noise + CE, masked": (KL | CE, LOOSE | NOISE),
    "loose tagger: drop": (KL | CE, LOOSE | {"kl": 0.0}),
}
NUMBERS, CANARIES, DIGITS, REPEATS = 10, 10, 3, 2


def write_data(folder: Path, seed: int) -> list[str]:
    """Sums, and sums with codes; the texts, for a tokenizer."""
    entries = [
        {
            "id": f"sum-{a}-{b}",
            "conversations": [
                {"from": "human", "value": f"What is {a} plus {b}?"},
                {"from": "gpt", "value": f"It is {a + b}."},
            ],
        }
        for a in range(NUMBERS)
        for b in range(NUMBERS)
    ]
    (folder / "sums.json").write_text(json.dumps(entries))
    words = ["canary", "insert", f"--data={folder / 'sums.json'}", f"--out={folder / 'planted.json'}"]
    run(*words, f"--canaries={CANARIES}", f"--digits={DIGITS}", f"--repeats={REPEATS}", f"--seed={seed}")
    planted = json.loads((folder / "planted.json").read_text())
    return [turn["value"] for entry in planted for turn in entry["conversations"]]


def run(*words: str) -> None:
    """A command of `llava-kd`, in this process; what it says is shown where it fails."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status = llava_kd(list(words))
        except SystemExit as error:  # a word that it does not know
            status = error.code
    if status != 0:
        raise SystemExit(f"llava-kd {' '.join(words)}:\n{said.getvalue()}")


def make_model(folder: Path, texts: list[str], seed: int) -> Path:
    """A stock LLaVA directory with random weights."""
    tokenizer = make_tokenizer(texts, vocab_size=400)
    processor = LlavaProcessor(
        image_processor=SiglipImageProcessor(size={"height": 16, "width": 16}),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="full",
    )
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16,
            patch_size=8,
        ),
        text_config=Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=4,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def train(folder: Path, name: str, start: Path, steps: int, seed: int, **more: object) -> Path:
    """One stage; its stock model."""
    tree = {
        "output_dir": str(folder / name),
        "student": {"checkpoint": str(start)},
        "data": {
            "path": str(folder / "planted.json"),
            "template": "vicuna",
            "max_length": 64,
            "num_workers": 0,
        },
        "optim": {"lr": 3.0e-3},
        "trainable": ["language_model"],
        "global_batch_size": 40,
        "micro_batch_size": 40,
        "max_steps": steps,
        "seed": seed,
        "engine": {"kind": "single", "precision": "fp32", "device": "cpu"},
        "log": {"every": 100, "progress": False, "diagnostics_every": 0},
        "checkpoint": {"every": 100_000, "keep": 1},
        **more,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    run("train", str(path))
    return folder / name / "model"


def measured(folder: Path, model: Path, name: str) -> dict[str, float]:
    out = folder / f"{name}.exposure.json"
    common = ["--device=cpu", "--template=vicuna", "--max_length=64", f"--model={model}"]
    run("canary", "exposure", f"--canaries={folder / 'planted.canaries.json'}", f"--out={out}", *common)
    out_of_eval = folder / f"{name}.eval"
    run(
        "eval",
        f"--model={model}",
        f"--data={folder / 'sums.json'}",
        f"--out={out_of_eval}",
        "--batch_size=100",
    )
    summary = json.loads((out_of_eval / "summary.json").read_text())
    return {
        "exposure": json.loads(out.read_text())["mean_exposure"],
        "accuracy": 100 * summary["accuracy"],
    }


def one_seed(folder: Path, seed: int, steps: int) -> dict[str, dict[str, float]]:
    folder.mkdir(parents=True, exist_ok=True)
    texts = write_data(folder, seed)
    teacher = train(
        folder, "teacher", make_model(folder / "start_t", texts, seed), 2 * steps, seed, objective=CE
    )
    start = make_model(folder / "start_s", texts, seed + 1000)
    found = {"teacher": measured(folder, teacher, "teacher")}
    for number, (arm, (terms, policy)) in enumerate(ARMS.items()):
        more = {"objective": terms, "teacher": {"checkpoint": str(teacher), "dtype": "float32"}}
        model = train(folder, f"arm{number}", start, steps, seed, **more, token_policy=policy)
        found[arm] = measured(folder, model, f"arm{number}")
        print(f"seed {seed}, {arm}: {found[arm]}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--steps", type=int, default=200, help="of a student; a teacher has twice as many")
    parser.add_argument("--out", type=Path, help="folder for results.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are small
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        runs = {
            seed: one_seed(Path(scratch) / str(seed), seed, arguments.steps)
            for seed in range(arguments.seeds)
        }
    print(
        f"{len(runs)} seeds; mean +- half the 95 % interval over them; chance is 1.44 bits, the most 9.97\n"
    )
    print("| arm | exposure, bits | against KD, paired | accuracy on sums, % |\n|---|---|---|---|")
    exposures = {
        arm: {seed: run[arm]["exposure"] for seed, run in runs.items()} for arm in ("teacher", *ARMS)
    }
    for arm, values in exposures.items():
        gap = None if arm in ("teacher", "KD") else paired(values, exposures["KD"])
        bits = as_text(estimate(list(values.values())), digits=2)
        right = as_text(estimate([run[arm]["accuracy"] for run in runs.values()]))
        against = "" if gap is None else f"{gap['mean']:+.2f}"
        print(f"| {arm} | {bits} | {against} | {right} |")
    print(f"\n{time.perf_counter() - began:.0f} s")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "results.json").write_text(json.dumps(runs, indent=2) + "\n")


if __name__ == "__main__":
    main()
