"""Early exits at the stages of a ConvNet tower from a teacher whose tower is a ViT, with few pictures.

    python scripts/methods/inner_layers/tower_exits.py [--seeds 3] [--arms ...] [--out DIR]

Pictures of 48 x 48 hold one of ten smooth patterns, scaled in contrast, in one of four quarters, under noise.
Both models are LLaVAs with tiny towers and language models, begun from nothing, and are asked of every
picture which pattern it holds and where, in either order. The teacher, with a ViT, learns 4,000 of them; a
student, with a ConvNet of which three stages are read, gets 150 others and is tested on 1,000. The models,
the objective and its terms are llava_kd's own, and an arm is nothing but its terms. The arms of a seed begin
at the same weights and see the same batches. Terms have weight 1 and temperature 1: nothing was tuned.

Shape legend: I pictures, C channels, H height, W width, T tokens of a row.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, SiglipVisionConfig

from llava_kd.batch import IGNORE_INDEX, Batch, Inputs
from llava_kd.distill.formulas import FORMULAS, Common
from llava_kd.distill.objective import Objective
from llava_kd.distill.student import Student
from llava_kd.distill.teaching.from_teacher import FromTeacher
from llava_kd.distill.teaching.live import Teacher
from llava_kd.distill.terms.cross_entropy import CrossEntropy
from llava_kd.distill.terms.inner.exit_logits import ExitLogits, Form, VisualExitLogits
from llava_kd.distill.terms.inner.hint import VisualHint
from llava_kd.distill.terms.response_kl import ResponseKL
from llava_kd.distill.terms.term import Term, Widths
from llava_kd.distill.terms.visual_kl import VisualKL
from llava_kd.models.mllm import MLLM
from llava_kd.models.taps import tapped_widths
from llava_kd.models.towers.adapted import AdaptedTowerConfig
from llava_kd.models.towers.stages import on_visual_tokens
from llava_kd.models.towers.visual_grid import VisualGrid
from llava_kd.search.findings.statistics import as_text, estimate, paired

CLASSES, QUARTERS, SIDE, GRID = 10, 4, 48, 3
MANY, FEW, TEST, BATCH = 4000, 150, 1000, 50
TEACHER_EPOCHS, EPOCHS = 12, 60
IMAGE, ASKED, ANSWERS = 0, (1, 2), (3, 3 + CLASSES)  # tokens
VOCABULARY = 3 + CLASSES + QUARTERS
TOKENS = GRID * GRID
PLACES = (TOKENS, TOKENS + 2)  # of the two questions; an answer stands behind each
PARTS = ("vision_tower", "multi_modal_projector", "language_model")
PROJECTOR = ("multi_modal_projector",)
KD: Mapping[str, Term] = {"response_kl": ResponseKL(), "visual_kl": VisualKL()}


def exits(gamma: float, form: Form) -> dict[str, Term]:
    """Behind the two stages before the one that the projector reads."""
    answers = ExitLogits(layers=(), stages=(0, 1), gamma=gamma, form=form)
    pictures = VisualExitLogits(layers=(), stages=(0, 1), gamma=gamma, form=form)
    return {**KD, "exit_logits": answers, "visual_exit_logits": pictures}


ARMS: dict[str, Mapping[str, Term]] = {
    "no teacher": {},
    "KD": KD,
    "KD + hint mse": {**KD, "visual_hint": VisualHint(student_taps=PROJECTOR, teacher_taps=PROJECTOR)},
    "KD + exits, gamma 1": exits(1.0, "paper"),
    "KD + exits, gamma 1.5": exits(1.5, "paper"),
    "KD + exits, gamma 1.5, code": exits(1.5, "code"),
}


def model(vision: SiglipVisionConfig | AdaptedTowerConfig, layer: int, width: int, seed: int) -> MLLM:
    text = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=layer,
        vision_feature_select_strategy="full", image_seq_length=TOKENS,
    )  # fmt: skip
    torch.manual_seed(seed)
    return MLLM(LlavaForConditionalGeneration(config), trainable=PARTS).train()


def vit(seed: int) -> MLLM:
    vision = SiglipVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE,
        patch_size=SIDE // GRID, vision_use_head=False,
    )  # fmt: skip
    return model(vision, -1, 64, seed)


def convnet(seed: int) -> MLLM:
    """Maps of 12 x 12, 6 x 6 and 3 x 3; a fourth stage is not read."""
    arguments = {"dims": [16, 24, 32, 32], "depths": [1, 1, 1, 1], "patch_size": 2, "ls_init_value": None}
    vision = AdaptedTowerConfig(
        architecture="convnext_tiny", arguments=json.dumps(arguments), image_size=SIDE,
        patch_size=SIDE // GRID, hidden_size=32, feature_layer=-2,
    )  # fmt: skip
    return model(vision, -2, 32, seed)


def pictures(number: int, patterns: Tensor, generator: torch.Generator) -> Batch:
    """Both questions of every picture, in either order, and their answers."""
    kind_I = torch.randint(CLASSES, (number,), generator=generator)
    quarter_I = torch.randint(QUARTERS, (number,), generator=generator)
    half = SIDE // 2
    pixels_IHW = 0.6 * torch.randn(number, SIDE, SIDE, generator=generator)
    contrast_I = 0.5 + torch.rand(number, generator=generator)
    for i, (kind, quarter) in enumerate(zip(kind_I.tolist(), quarter_I.tolist(), strict=True)):
        row, column = half * (quarter // 2), half * (quarter % 2)
        pixels_IHW[i, row : row + half, column : column + half] += contrast_I[i] * patterns[kind]
    first_I = torch.randint(2, (number,), generator=generator)
    answers_I2 = torch.stack([ANSWERS[0] + kind_I, ANSWERS[1] + quarter_I], dim=1)
    ids_IT = torch.full((number, TOKENS + 4), IMAGE)
    labels_IT = torch.full_like(ids_IT, IGNORE_INDEX)
    for turn, place in enumerate(PLACES):
        asked_I1 = (first_I ^ turn).unsqueeze(1)
        ids_IT[:, place] = torch.tensor(ASKED)[asked_I1.squeeze(1)]
        ids_IT[:, place + 1] = labels_IT[:, place + 1] = answers_I2.gather(1, asked_I1).squeeze(1)
    inputs = Inputs(
        input_ids_BT=ids_IT,
        labels_BT=labels_IT,
        position_ids_BT=torch.arange(TOKENS + 4).expand(number, -1),
        segment_ids_BT=torch.ones_like(ids_IT),
        visual_BT=(torch.arange(TOKENS + 4) < TOKENS).expand(number, -1),
        pixels_ICHW=pixels_IHW.unsqueeze(1).expand(-1, 3, -1, -1),
        image_is_valid_I=torch.ones(number, dtype=torch.bool),
    )
    return Batch(student=inputs, record_ids=tuple(map(str, range(number))))


def some(batch: Batch, rows: Tensor) -> Batch:
    side = batch.student
    inputs = Inputs(
        input_ids_BT=side.input_ids_BT[rows],
        labels_BT=side.labels_BT[rows],
        position_ids_BT=side.position_ids_BT[rows],
        segment_ids_BT=side.segment_ids_BT[rows],
        visual_BT=side.visual_BT[rows],
        pixels_ICHW=side.pixels_ICHW[rows],
        image_is_valid_I=side.image_is_valid_I[rows],
    )
    return Batch(student=inputs, record_ids=tuple(batch.record_ids[i] for i in rows.tolist()))


def objective(terms: Mapping[str, Term], student: MLLM, teacher: MLLM | None) -> Objective:
    """Both sides have the same grid and the same vocabulary."""
    every = {"cross_entropy": CrossEntropy(), **terms}
    ours = [tap for term in every.values() for tap in term.reads.student_taps]
    theirs = [tap for term in every.values() for tap in term.reads.teacher_taps]
    student.watch_taps(ours)
    if teacher is not None:
        teacher.watch_taps(theirs)
    widths = Widths(
        student=student.lm_head.weight.shape[1],
        teacher=None if teacher is None else teacher.lm_head.weight.shape[1],
        student_taps=tapped_widths(student.stock, ours),
        teacher_taps={} if teacher is None else tapped_widths(teacher.stock, theirs),
    )
    made = {name: term.module(widths) for name, term in every.items()}
    grid = VisualGrid(rows=GRID, columns=GRID)
    align = functools.partial(on_visual_tokens, prefix=0, target=grid)
    return Objective(
        terms=every,
        common=Common(num_common=VOCABULARY, stage_align=align, formulas=FORMULAS["fast"]),
        modules={name: module for name, module in made.items() if module is not None},
    )


def train(
    mllm: MLLM, terms: Mapping[str, Term], teacher: MLLM | None, data: Batch, epochs: int, seed: int
) -> None:
    teaching = None if teacher is None else FromTeacher(Teacher(teacher, shares_tower=False))
    student = Student(mllm, objective(terms, mllm, teacher), teaching)
    moved = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(moved, lr=2e-3, weight_decay=0.0)
    number, order = len(data.record_ids), torch.Generator().manual_seed(seed)
    steps = epochs * -(-number // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.1)
    for _ in range(epochs):
        for rows in torch.randperm(number, generator=order).split(BATCH):
            batch = some(data, rows)
            optimiser.zero_grad()
            student.losses(student, batch, student.counts(batch))[0].backward()
            nn.utils.clip_grad_norm_(moved, 1.0)
            optimiser.step()
            schedule.step()


@torch.no_grad()
def accuracy(mllm: MLLM, data: Batch) -> float:
    """Right answers to both questions, in per cent."""
    side, mllm = data.student, mllm.eval()
    mllm.watch_taps([])
    prediction = mllm(side, mllm.image_features(side))
    said_I2 = (prediction.hidden_BTD[:, PLACES] @ prediction.head_VD.T).argmax(2)
    truth_I2 = side.labels_BT[:, [place + 1 for place in PLACES]]
    return 100 * float((said_I2 == truth_I2).double().mean())


def one_seed(seed: int, arms: Sequence[str]) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(CLASSES, 1, 4, 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(SIDE // 2, SIDE // 2), mode="bicubic").squeeze(1)
    patterns = smooth / smooth.flatten(1).std(1).view(-1, 1, 1)
    many, few, test = (pictures(number, patterns, generator) for number in (MANY, FEW, TEST))
    teacher = vit(seed)
    train(teacher, {}, None, many, TEACHER_EPOCHS, seed)
    found = {"teacher": accuracy(teacher, test)}
    print(f"seed {seed}, teacher: {found['teacher']:.1f}", file=sys.stderr, flush=True)
    for arm in arms:
        student = convnet(seed)
        train(student, ARMS[arm], teacher if ARMS[arm] else None, few, EPOCHS, seed)
        found[arm] = accuracy(student, test)
        print(f"seed {seed}, {arm}: {found[arm]:.1f}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--out", type=Path, help="folder for results.json")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="beside KD")
    arguments = parser.parse_args()
    arms = ["KD", *(arm for arm in arguments.arms if arm != "KD")]
    torch.set_num_threads(1)
    began = time.perf_counter()
    runs = {}
    for seed in range(arguments.seeds):
        runs[seed] = one_seed(seed, arms)
        print(f"seed {seed} is done, {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        if arguments.out is not None:
            arguments.out.mkdir(parents=True, exist_ok=True)
            (arguments.out / "results.json").write_text(json.dumps(runs, indent=2) + "\n")
    print(f"{len(runs)} seeds; mean +- half the 95 % interval over them\n")
    print("| arm | accuracy, % | against KD, paired |\n|---|---|---|")
    for arm in ["teacher", *arms]:
        values = {seed: run[arm] for seed, run in runs.items()}
        base = {seed: run["KD"] for seed, run in runs.items()}
        gap = None if arm == "KD" else paired(values, base)
        print(f"| {arm} | {as_text(estimate(list(values.values())))} | {as_text(gap, sign='+', none='')} |")
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
