"""Makes what the quickstart starts from: a tokenizer, a vision tower that sees, and two language models.

    python scripts/quickstart/make_backbones.py --out scripts/quickstart/backbones

writes OUT/vision_tower (SigLIP, with its image processor), OUT/teacher_llm and OUT/student_llm (Qwen2, each
with the one tokenizer). The trained teacher, OUT/teacher, is made from these by the project's own stages.
`--setting hard` makes those of the harder pictures, see scripts/hard/make.sh.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from backbone_llm import make_llm, texts, train_llm
from backbone_settings import SETTINGS, BackboneSetting
from backbone_tokenizer import make_tokenizer
from backbone_tower import (
    enlarge_features,
    label_accuracy,
    labelled_pictures,
    make_image_processor,
    make_tower,
    train_tower,
)
from transformers import PreTrainedModel, Qwen2Tokenizer

FEATURE_SCALE = 5.0
FEATURE_LAYER = -2  # the tower's layer that LLaVA reads
STORAGE = torch.bfloat16  # half the size in the repository; loaded in whatever type is asked for


def _halved(model: PreTrainedModel) -> PreTrainedModel:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(STORAGE)
    return model


def save_tower(
    out: Path, setting: BackboneSetting, *, steps: int, num_pictures: int, seed: int
) -> dict[str, object]:
    """Trains and writes the tower; returns how well it reads held-out pictures."""
    torch.manual_seed(seed)
    tower = make_tower(setting.tower)
    data = labelled_pictures(setting, num_pictures, seed=seed)
    directions = train_tower(tower, data, steps=steps, batch_size=64, learning_rate=1e-3, seed=seed)
    held_out = labelled_pictures(setting, max(num_pictures // 15, 20), seed=seed + 1)
    accuracy = label_accuracy(tower, directions[FEATURE_LAYER], held_out, layer=FEATURE_LAYER)
    enlarge_features(tower, FEATURE_SCALE)
    _halved(tower).save_pretrained(out / "vision_tower")
    make_image_processor(setting.tower).save_pretrained(out / "vision_tower")
    return dict(zip(setting.labels, accuracy, strict=True))


def save_llm(
    out: Path, setting: BackboneSetting, tokenizer: Qwen2Tokenizer, *, name: str, steps: int, seed: int
) -> None:
    torch.manual_seed(seed)
    model = make_llm(tokenizer, **asdict(setting.llms[name]))
    train_llm(
        model,
        tokenizer,
        stream=texts(setting.shapes, seed=seed),
        name=f"{name} language model",
        steps=steps,
        batch_size=16,
        learning_rate=2e-3,
    )
    _halved(model).save_pretrained(out / f"{name}_llm")
    tokenizer.save_pretrained(out / f"{name}_llm")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="directory to write; must be new or empty")
    parser.add_argument("--setting", choices=SETTINGS, default="easy", help="of the shapes data")
    parser.add_argument("--tower-steps", type=int, help="default: as many as the setting needs")
    parser.add_argument("--tower-pictures", type=int, help="default: as many as the setting needs")
    parser.add_argument("--teacher-steps", type=int, default=300, help="text steps of the teacher's LLM")
    parser.add_argument("--student-steps", type=int, default=600, help="text steps of the student's LLM")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"--out must be new or empty; {args.out} holds files. Choose another or empty it.")
    torch.set_num_threads(args.threads)

    start = time.monotonic()
    setting = SETTINGS[args.setting]
    args.tower_steps = args.tower_steps or setting.tower_steps
    args.tower_pictures = args.tower_pictures or setting.tower_pictures
    words = itertools.islice(texts(setting.shapes, seed=args.seed), 2000)
    tokenizer = make_tokenizer(words, vocab_size=setting.vocab_size)
    reading = save_tower(
        args.out, setting, steps=args.tower_steps, num_pictures=args.tower_pictures, seed=args.seed
    )
    save_llm(args.out, setting, tokenizer, name="teacher", steps=args.teacher_steps, seed=args.seed)
    save_llm(args.out, setting, tokenizer, name="student", steps=args.student_steps, seed=args.seed)
    made = {
        "arguments": {name: value for name, value in vars(args).items() if name != "out"},
        "seconds": round(time.monotonic() - start),
        "tower_accuracy_on_held_out_pictures": reading,
    }
    (args.out / "made.json").write_text(json.dumps(made, indent=1) + "\n")
    print(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
