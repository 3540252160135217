"""Early exits at the stages of a student's ConvNet tower, against a ViT teacher's output.

Shape legend: I images, C channels, H height, W width, N rows, D width.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_batches import inputs, record
from tiny_objectives import furnished, objective_of
from tiny_runs import write_stage
from tiny_towers import make_language_model, make_tower
from torch import Tensor, nn
from torch.nn.functional import interpolate

from llava_kd.batch import Batch
from llava_kd.cli import main
from llava_kd.distill.objective import Losses, Objective
from llava_kd.distill.taught import Taught
from llava_kd.distill.teaching.live import Teacher
from llava_kd.distill.terms.inner.exit_logits import ExitLogits, StageExit, VisualExitLogits
from llava_kd.distill.terms.term import Reads, Term
from llava_kd.models.files.checkpoint import compose, load_stock, save_stock
from llava_kd.models.mllm import MLLM
from llava_kd.models.taps import tapped_widths
from llava_kd.models.towers.stages import check_tokens, on_visual_tokens
from llava_kd.models.towers.visual_grid import VisualGrid

COMMON = 264  # all rows of the student's head
ONE, TWO, TEXT, BAD = record(1), record(2, images=2), record(3, images=0), record(4, is_valid=False)
BATCH = Batch(student=inputs(ONE, [TEXT, TWO], BAD), record_ids=("a", "b", "c", "d"))
PARTS = ("vision_tower", "multi_modal_projector", "language_model")


@pytest.fixture(scope="module")
def convnet_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stages of 8 x 8, 4 x 4, 2 x 2 and 1 x 1; the second is read, as many tokens as the teacher's."""
    folder = tmp_path_factory.mktemp("convnet")
    parts = compose(
        vision_tower=make_tower("timm-convnext", folder / "tower"),
        language_model=str(make_language_model("qwen2", folder / "llm")),
        vision_feature_layer=-3,
    )
    save_stock(parts, folder / "model")
    return folder / "model"


@pytest.fixture
def student(convnet_dir: Path) -> MLLM:
    made = MLLM(load_stock(str(convnet_dir)).stock, trainable=PARTS)
    assert made.lm_head.weight.shape[0] == COMMON
    return made


@pytest.fixture(scope="module")
def teacher(teacher_dir: Path) -> Teacher:
    return Teacher(MLLM(load_stock(str(teacher_dir)).stock), shares_tower=False)


@pytest.fixture
def stage(tmp_path: Path, shapes_dir: Path, teacher_dir: Path) -> Callable[[str, Path], Path]:
    """The YAML of three steps that train a student's tower too."""

    def write(name: str, student: Path) -> Path:
        return write_stage(
            tmp_path / name, data=shapes_dir, student=student, teacher=teacher_dir, trainable=PARTS
        )

    return write


def run(objective: Objective, student: MLLM, teacher: Teacher, batch: Batch = BATCH) -> Losses:
    prediction = student(batch.student, student.image_features(batch.student))
    return objective(prediction, Taught(prediction=teacher(batch)), batch, objective.counts(batch))


def maps_of(student: MLLM, pixels_ICHW: Tensor, stage: int) -> Tensor:
    """[I, C, 4, 4] by timm's own functions and plain resizing."""
    maps_ICHW = student.stock.model.vision_tower.trunk.stem(pixels_ICHW)
    for module in student.stock.model.vision_tower.trunk.stages[: stage + 1]:
        maps_ICHW = module(maps_ICHW)
    return interpolate(maps_ICHW, size=(4, 4), mode="bilinear", antialias=True)


def exits_of(objective: Objective, name: str) -> list[StageExit]:
    found = objective.modules[name]
    assert isinstance(found, nn.ModuleList)
    return [exit_ for exit_ in found if isinstance(exit_, StageExit)]


def by_definition(logits_NV: Tensor, teacher_NV: Tensor, labels_N: Tensor | None, gamma: float) -> Tensor:
    """The sum of -w log q over rows, of the paper's form, less the entropy of the teacher."""
    log_q_NV, p_NV = logits_NV[:, :COMMON].log_softmax(1), teacher_NV[:, :COMMON].softmax(1)
    w_NV = p_NV.clone()
    if labels_N is not None:
        every_N = torch.arange(len(labels_N))
        w_NV[every_N, labels_N] = (1 + p_NV[every_N, labels_N]) ** gamma
    return (p_NV * p_NV.log() - w_NV * log_q_NV).sum()


@pytest.mark.parametrize("losses", ["reference", "fast"])
@torch.no_grad()
def test_visual_exits_read_the_maps_of_the_stages_pooled_onto_the_grid(
    student: MLLM, teacher: Teacher, losses: str
) -> None:
    term = VisualExitLogits(layers=(), stages=(1, 0), gamma=1.5, width=8)
    objective = objective_of(num_common=COMMON, losses=losses, visual_exit_logits=term)
    objective = furnished(objective, student, teacher.mllm)
    got = run(objective, student, teacher).means["visual_exit_logits"]
    theirs = teacher(BATCH)
    rows_N = BATCH.student.places.distilled_N
    teacher_NV = theirs.hidden_BTD.flatten(0, 1)[rows_N] @ theirs.head_VD.T
    total = torch.zeros(())
    for exit_, stage in zip(exits_of(objective, "visual_exit_logits"), term.stages, strict=True):
        maps_ICHW = maps_of(student, BATCH.student.pixels_ICHW, stage)[BATCH.student.image_is_valid_I]
        rows_NC = maps_ICHW.permute(0, 2, 3, 1).reshape(len(rows_N), -1)
        total += by_definition(exit_(rows_NC) @ student.lm_head.weight.T, teacher_NV, None, 1.5)
    torch.testing.assert_close(got, total / len(rows_N), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gamma", [1.0, 1.5])
@torch.no_grad()
def test_exits_at_answers_read_the_mean_map_of_their_record_and_the_words_before_them(
    student: MLLM, teacher: Teacher, gamma: float
) -> None:
    """At gamma 1 it is cross-entropy and KD; a record without a picture teaches no stage."""
    term = ExitLogits(layers=(), stages=(0,), gamma=gamma, width=8)
    objective = furnished(objective_of(num_common=COMMON, exit_logits=term), student, teacher.mllm)
    (exit_,) = exits_of(objective, "exit_logits")
    got = run(objective, student, teacher).means["exit_logits"]
    theirs, side = teacher(BATCH), BATCH.student
    embed = student.language_model.get_input_embeddings()
    begins = {0: (0, 0), 1: (1, 0), 2: (1, len(TEXT.ids))}
    total, start = torch.zeros(()), 0
    for number, one in enumerate((ONE, TEXT, TWO)):
        pixels_ICHW = side.pixels_ICHW[start : start + len(one.pixels_ICHW)]
        start += len(pixels_ICHW)
        if len(pixels_ICHW) == 0:
            continue
        picture_C = maps_of(student, pixels_ICHW, 0).mean((0, 2, 3))
        for place in range(len(one.ids) - 1):
            label = one.labels[place + 1]
            if label < 0:
                continue
            words_ND = embed(one.ids[: place + 1][~one.visual[: place + 1]])
            read = picture_C.unsqueeze(0), torch.cat([words_ND[-1], words_ND.mean(0)]).unsqueeze(0)
            row, begin = begins[number]
            logits_1V = (theirs.hidden_BTD[row, begin + place] @ theirs.head_VD.T).unsqueeze(0)
            ours_1V, label_1 = exit_(*read) @ student.lm_head.weight.T, label.unsqueeze(0)
            added = by_definition(ours_1V, logits_1V, label_1, gamma)
            if gamma == 1:
                log_q_1V, p_1V = ours_1V[:, :COMMON].log_softmax(1), logits_1V[:, :COMMON].softmax(1)
                kd = (p_1V * (p_1V.log() - log_q_1V)).sum()
                torch.testing.assert_close(added, kd - log_q_1V[0, label])
            total += added
    torch.testing.assert_close(got, total / len(side.places.response_N), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_neither_packing_nor_the_teachers_own_rows_change_what_an_exit_reads(
    student: MLLM, teacher: Teacher
) -> None:
    """Rows that the teacher answers otherwise are left out, of stages as of layers."""
    made = objective_of(
        num_common=COMMON,
        exit_logits=ExitLogits(stages=(0, 1), gamma=1.5),
        visual_exit_logits=VisualExitLogits(stages=(1,), form="code", gamma=1.5),
    )
    objective = furnished(made, student, teacher.mllm)
    cut = replace(BATCH, student=inputs(ONE, TEXT, TWO, BAD))
    whole, apart = (run(objective, student, teacher, batch).means for batch in (BATCH, cut))
    for name in made.terms:
        torch.testing.assert_close(whole[name], apart[name], rtol=1e-5, atol=1e-6)

    side = inputs(TWO, ONE)
    labels_BT = side.labels_BT.clone()
    labels_BT[0, len(TWO.ids) - 5 :] += 1  # all of the first record's answer
    batch = Batch(student=side, teacher=replace(side, labels_BT=labels_BT), record_ids=("a", "b"))
    alone = Batch(student=inputs(ONE), record_ids=("b",))
    some = run(objective, student, teacher, batch).means["exit_logits"]
    torch.testing.assert_close(2 * some, run(objective, student, teacher, alone).means["exit_logits"])


@pytest.mark.parametrize(
    "term", [ExitLogits(layers=(), stages=(1,)), VisualExitLogits(layers=(), stages=(1,))], ids=["r", "v"]
)
def test_an_exit_of_a_stage_moves_the_tower_up_to_it_and_nothing_else(
    student: MLLM, teacher: Teacher, term: Term
) -> None:
    objective = furnished(objective_of(num_common=COMMON, losses="fast", term=term), student, teacher.mllm)
    run(objective, student, teacher).loss.backward()

    def moves(module: nn.Module) -> bool:
        return any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())

    trunk = student.stock.model.vision_tower.trunk
    assert [moves(stage) for stage in trunk.stages] == [True, True, False, False]
    assert moves(trunk.stem)
    assert moves(objective.modules["term"])
    assert not any(moves(m) for m in (student.language_model, student.lm_head, student.multi_modal_projector))
    assert term.reads.before_decoder


def test_a_batch_of_text_alone_gives_each_weight_a_gradient_of_zero(student: MLLM, teacher: Teacher) -> None:
    made = objective_of(
        num_common=COMMON,
        exit_logits=ExitLogits(layers=(), stages=(0,)),
        visual_exit_logits=VisualExitLogits(layers=(), stages=(0,)),
    )
    objective = furnished(made, student, teacher.mllm)
    losses = run(objective, student, teacher, Batch(student=inputs(TEXT), record_ids=("c",)))
    assert float(losses.loss.detach()) == 0
    losses.loss.backward()
    own = [p for module in objective.modules.values() for p in module.parameters()]
    tower = [p for p in student.vision_tower.parameters() if p.requires_grad]
    assert tower
    for parameter in (*own, *tower):
        assert parameter.grad is not None
        assert not parameter.grad.any()


# What is refused ----


def test_stages_of_other_features_than_the_last_are_refused(student: MLLM) -> None:
    student.watch_taps(["vision_tower.hidden_states.0"])
    features_INE = student.image_features(BATCH.student)
    student(BATCH.student, features_INE)
    with pytest.raises(ValueError, match="call image_features before each forward"):
        student(BATCH.student, features_INE)
    student.image_features(BATCH.student)
    with pytest.raises(ValueError, match="and these features are others"):
        student(BATCH.student, features_INE)


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        ("vision_tower.hidden_states.4", "stage 4 is deeper than the tower: this 'llava_kd_tower' has hidden "
         "states 0 to 3"),
        ("vision_tower.hidden_states.2", "stage 2 lies behind hidden state 1, which the student reads "
         "(vision_feature_layer -3)"),
        ("vision_tower.hidden_states.last", "and its number, from 0; got"),
        ("vision_tower.trunk.stages.0", "or be vision_tower.hidden_states.0 or another number"),
    ],
)  # fmt: skip
def test_a_stage_that_teaches_nothing_is_refused_by_name(student: MLLM, tap: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        student.watch_taps([tap])
    if "trunk" not in tap:
        with pytest.raises(ValueError, match=re.escape(message)):
            tapped_widths(student.stock, [tap])


def test_maps_of_other_proportions_prefix_tokens_and_a_teachers_stages_are_refused() -> None:
    grid = VisualGrid(rows=4, columns=4)
    with pytest.raises(ValueError, match="17 tokens, which is no grid of the proportions 4 x 4"):
        on_visual_tokens(torch.zeros(1, 17, 8), prefix=0, target=grid)
    assert on_visual_tokens(torch.zeros(1, 17, 8), prefix=1, target=grid).shape == (1, 16, 8)
    with pytest.raises(ValueError, match="begin with 1 prefix tokens"):
        check_tokens(replace(grid, prefix=1))
    with pytest.raises(ValueError, match="from the student's tower only"):
        Reads(teacher="model", teacher_taps=("vision_tower.hidden_states.0",))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--objective.exit_logits={layers: [], stages: [9]}"], "exit_logits reads the student: stage 9 is "
         "deeper than the tower"),
        (["--objective.exit_logits={stages: [0]}", "--trainable=[language_model]"], "to a frozen tower"),
        (["--objective.exit_logits={layers: []}"], "both are empty; name at least one"),
        (["--objective.visual_exit_logits={stages: [1, 1]}"], "`stages` of exits must differ; got 1, 1"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused_by_name(
    stage, convnet_dir: Path, capsys, words: list[str], message: str
) -> None:
    config = stage("wrong", convnet_dir)
    assert main(["train", str(config), *words]) == 2
    assert message in capsys.readouterr().err


# A whole run ----

WORDS = [
    "--objective.exit_logits={layers: [0], stages: [0, 1], gamma: 1.5, width: 16}",
    "--objective.visual_exit_logits={layers: [], stages: [0], width: 16}",
    "--checkpoint.every=1",
]


def state(run_dir: Path, step: int) -> dict[str, Tensor]:
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def test_exits_of_stages_train_resume_bit_for_bit_and_are_not_exported(
    stage, convnet_dir: Path, capsys
) -> None:
    config = stage("run", convnet_dir)
    assert main(["train", str(config), *WORDS, "--dry_run"]) == 0
    assert "student's output of vision_tower.hidden_states.1: AdaptedTower" in capsys.readouterr().out
    assert main(["train", str(config), *WORDS]) == 0
    output = config.with_suffix("")
    first, last = (state(output, step) for step in (2, 3))
    for name in ("exit_logits.1.down.weight", "exit_logits.2.norm_of_words.weight",
                 "visual_exit_logits.0.up.bias"):  # fmt: skip
        key = f"parameter/terms.{name}"
        assert not torch.equal(first[key], last[key]), name
    line = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
    assert all(math.isfinite(line[name]) for name in ("exit_logits", "visual_exit_logits"))
    exported = load_file(output / "model" / "model.safetensors")
    assert exported.keys() == load_file(convnet_dir / "model.safetensors").keys()

    (output / "run.json").unlink()
    shutil.rmtree(output / "checkpoints" / "step-00000003")
    assert main(["train", str(config), *WORDS]) == 0
    again = state(output, 3)
    assert again.keys() == last.keys()
    assert all(torch.equal(again[key], last[key]) for key in last)
