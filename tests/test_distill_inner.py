"""Hints, mutual information and early exits of stock models, from YAML to checkpoint and export.

Shape legend: N rows, D and E widths of student and teacher.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_batches import inputs, record
from tiny_llava import make_tiny_llava
from tiny_objectives import furnished, objective_of
from torch import Tensor, nn

from llava_kd.batch import Batch
from llava_kd.cli import main
from llava_kd.distill.learned_weights import learnable
from llava_kd.distill.objective import Losses, Objective
from llava_kd.distill.taught import Taught
from llava_kd.distill.teaching.live import Teacher
from llava_kd.distill.terms.inner.exit_logits import Exit, ExitLogits, VisualExitLogits
from llava_kd.distill.terms.inner.hint import Hint, VisualHint
from llava_kd.distill.terms.inner.mi_alpha import Critic, MIAlpha
from llava_kd.distill.terms.term import Term, Widths
from llava_kd.losses.inner.hint import hint_rows
from llava_kd.losses.inner.mutual_information import information_rows
from llava_kd.losses.reference import head_loss
from llava_kd.models.files.checkpoint import load_stock
from llava_kd.models.mllm import MLLM
from llava_kd.models.taps import tapped_widths

COMMON = 260
LAYER0, LAYER1 = "language_model.layers.0", "language_model.layers.1"
BATCH = Batch(
    student=inputs(record(1), record(2, images=2), record(3, images=0), record(4, is_valid=False)),
    record_ids=("a", "b", "c", "d"),
)
RESPONSE_N = BATCH.student.places.response_N


@pytest.fixture
def student(student_dir: Path) -> MLLM:
    return MLLM(load_stock(str(student_dir)).stock, trainable=("multi_modal_projector", "language_model"))


@pytest.fixture(scope="module")
def teacher(teacher_dir: Path) -> Teacher:
    return Teacher(MLLM(load_stock(str(teacher_dir)).stock), shares_tower=False)


def run(objective: Objective, student: MLLM, teacher: Teacher, batch: Batch = BATCH) -> Losses:
    prediction = student(batch.student, student.image_features(batch.student))
    return objective(prediction, Taught(prediction=teacher(batch)), batch, objective.counts(batch))


def stock_states(mllm: MLLM, layer: int) -> Tensor:
    """[B, T, D] behind a layer, of the stock model's own forward."""
    side = BATCH.student
    out = mllm.stock(
        input_ids=side.input_ids_BT,
        pixel_values=side.pixels_ICHW,
        attention_mask=(side.segment_ids_BT > 0).long(),
        output_hidden_states=True,
    )
    return out.hidden_states[layer + 1]


# Hints ----


@pytest.mark.parametrize("place", ["response", "visual"])
@torch.no_grad()
def test_hints_are_distances_of_the_stock_models_states_summed_over_pairs(
    student: MLLM, teacher_dir: Path, place: str
) -> None:
    """The teacher's last layer is norm'ed by the stock model: its first and its input are taken."""
    teacher = Teacher(MLLM(load_stock(str(teacher_dir)).stock.eval()), shares_tower=False)
    kind = Hint if place == "response" else VisualHint
    term = kind(student_taps=(LAYER0, f"{LAYER1}:input"), teacher_taps=(f"{LAYER0}:input", LAYER0))
    objective = furnished(objective_of(hint=term), student, teacher.mllm)
    maps = objective.modules["hint"]
    assert isinstance(maps, nn.ModuleList)
    rows_N = RESPONSE_N if place == "response" else BATCH.student.places.distilled_N
    ours_ND, first_NE, second_NE = (
        states.flatten(0, 1)[rows_N]
        for states in (
            stock_states(student, 0),
            stock_states(teacher.mllm, -1),
            stock_states(teacher.mllm, 0),
        )
    )
    expected = [
        (map_(ours_ND) - theirs_NE).square().mean(1).mean()
        for map_, theirs_NE in zip(maps, (first_NE, second_NE), strict=True)
    ]
    got = run(objective, student, teacher).means["hint"]
    torch.testing.assert_close(got, torch.stack(expected).sum(), rtol=1e-4, atol=1e-6)


def test_a_model_has_nothing_to_learn_from_its_own_states(student_dir: Path, student: MLLM) -> None:
    twin = Teacher(MLLM(load_stock(str(student_dir)).stock), shares_tower=False)
    for kind in ("mse", "cosine"):
        objective = objective_of(hint=Hint(kind=kind), visual_hint=VisualHint(kind=kind))
        objective = furnished(objective, student, twin.mllm)
        assert not objective.modules
        assert float(run(objective, student, twin).loss.detach()) == pytest.approx(0, abs=1e-6)


@torch.no_grad()
def test_rows_of_a_teacher_with_another_text_are_its_own_and_those_that_differ_are_left_out(
    student: MLLM, teacher: Teacher
) -> None:
    """The teacher's row begins with a record of no target, and its third target is another token."""
    shifted = inputs([record(9, images=0, answer=0), record(1)])
    rows_N, own_N = shifted.places.response_N, inputs(record(1)).places.response_N
    assert not torch.equal(rows_N, own_N)
    labels_BT = shifted.labels_BT.clone()
    labels_BT.view(-1)[rows_N[2] + 1] = 7
    batch = Batch(student=inputs(record(1)), teacher=replace(shifted, labels_BT=labels_BT), record_ids=("a",))
    hint = Hint(student_taps=(LAYER0,), teacher_taps=(LAYER1,), kind="cosine")
    objective = objective_of(num_common=COMMON, hint=hint, exit_logits=ExitLogits())
    objective = furnished(objective, student, teacher.mllm)
    got = run(objective, student, teacher, batch).means
    own, theirs = student(batch.student, student.image_features(batch.student)), teacher(batch)
    kept = torch.tensor([0, 1, 3, 4])
    (map_,) = objective.modules["hint"].children()
    ours_ND = own.tapped[LAYER0].flatten(0, 1)[own_N[kept]]
    expected = hint_rows(map_(ours_ND), theirs.tapped[LAYER1].flatten(0, 1)[rows_N[kept]], "cosine").sum() / 5
    torch.testing.assert_close(got["hint"], expected)
    (exit_,) = objective.modules["exit_logits"].children()
    of_exit = head_loss(
        exit_(ours_ND), own.head_VD, batch.student.targets_BT.flatten()[own_N[kept]],
        ce_weight_N=torch.ones(4), kl_weight_N=torch.ones(4), num_common=COMMON,
        teacher_NE=theirs.hidden_BTD.flatten(0, 1)[rows_N[kept]], teacher_head_UE=theirs.head_VD,
    ).loss  # fmt: skip
    torch.testing.assert_close(got["exit_logits"], of_exit / 5)


@torch.no_grad()
def test_visual_states_on_another_grid_are_carried_to_the_students_tokens(
    student: MLLM, teacher: Teacher
) -> None:
    """By a map that anyone may check: each image's tokens in reverse. One image could not be read."""
    objective = objective_of(align=lambda features_IME: features_IME.flip(1), visual_hint=VisualHint())
    objective = furnished(objective, student, teacher.mllm)
    (map_,) = objective.modules["visual_hint"].children()
    got = run(objective, student, teacher).means["visual_hint"]
    own, theirs = student(BATCH.student, student.image_features(BATCH.student)), teacher(BATCH)
    images = len(BATCH.student.image_is_valid_I)
    ours, other = (
        p.hidden_BTD.flatten(0, 1)[BATCH.student.places.visual_N].view(images, 16, -1) for p in (own, theirs)
    )
    rows_IN = (map_(ours) - other.flip(1)).square().mean(2)
    torch.testing.assert_close(got, rows_IN[BATCH.student.image_is_valid_I].mean())


def test_a_projectors_output_is_a_tap_of_visual_tokens(student: MLLM, teacher: Teacher) -> None:
    tap = ("multi_modal_projector",)
    term = VisualHint(student_taps=tap, teacher_taps=tap)
    assert term.reads.before_decoder
    objective = furnished(objective_of(visual_hint=term), student, teacher.mllm)
    (map_,) = objective.modules["visual_hint"].children()
    losses = run(objective, student, teacher)
    with torch.no_grad():
        ours, theirs = (m.project(m.image_features(BATCH.student)) for m in (student, teacher.mllm))
        rows_IN = (map_(ours) - theirs).square().mean(2)
        expected = rows_IN[BATCH.student.image_is_valid_I].mean()
    torch.testing.assert_close(losses.means["visual_hint"], expected)
    losses.loss.backward()
    grads = [p.grad for p in student.language_model.parameters()]
    assert not any(bool(g.any()) for g in grads if g is not None)


def test_a_batch_without_images_carries_no_stand_in_of_the_projector(student: MLLM, teacher: Teacher) -> None:
    """Its one token is of no grid, and its own map still gets a gradient, of zero."""
    shapes = []

    def align(features_IME: Tensor) -> Tensor:
        shapes.append(len(features_IME))
        return features_IME

    tap = ("multi_modal_projector",)
    objective = objective_of(align=align, visual_hint=VisualHint(student_taps=tap, teacher_taps=tap))
    objective = furnished(objective, student, teacher.mllm)
    batch = Batch(student=inputs(record(3, images=0)), record_ids=("a",))
    losses = run(objective, student, teacher, batch)
    losses.loss.backward()
    assert shapes == [0]
    grads = [p.grad for p in objective.modules["visual_hint"].parameters()]
    assert all(g is not None and not g.any() for g in grads)


# Mutual information ----


@pytest.mark.parametrize("most_rows", [1024, 4])
def test_information_is_the_bound_of_the_critics_scores_group_by_group(
    student: MLLM, teacher: Teacher, most_rows: int
) -> None:
    term = MIAlpha(student_taps=(LAYER0,), teacher_taps=(LAYER1,), alpha=0.3, most_rows=most_rows)
    objective = furnished(objective_of(mi_alpha=term), student, teacher.mllm)
    (critic,) = objective.modules["mi_alpha"].children()
    assert isinstance(critic, Critic)
    with torch.no_grad():
        got = run(objective, student, teacher).means["mi_alpha"]
        ours = student(BATCH.student, student.image_features(BATCH.student)).tapped[LAYER0]
        theirs = teacher(BATCH).tapped[LAYER1]
        x, y, log_q = critic(ours.flatten(0, 1)[RESPONSE_N], theirs.flatten(0, 1)[RESPONSE_N])
        groups = -(-len(x) // most_rows)
        assert groups > 1 or most_rows == 1024
        total = torch.zeros(())
        for g in range(groups):
            mine = torch.arange(g, len(x), groups)
            assert 2 <= len(mine) <= most_rows
            total += information_rows(x[mine] @ y[mine].T, log_q[mine], alpha=0.3).sum()
    torch.testing.assert_close(got, -total / len(x))


def test_information_depends_on_the_cut_into_micro_batches_and_says_so(
    student: MLLM, teacher: Teacher
) -> None:
    records = [record(1), record(2), record(3)]
    parts = [Batch(student=inputs(*some), record_ids=("r",)) for some in (records, records[:1], records[1:])]
    values = {}
    for term in (MIAlpha(), Hint()):
        objective = furnished(objective_of(term=term), student, teacher.mllm)
        counts = objective.counts(parts[0])
        whole, *cut = (
            objective(student(b.student, student.image_features(b.student)), Taught(prediction=teacher(b)),
                      b, counts).loss.detach()
            for b in parts
        )  # fmt: skip
        values[type(term)] = bool(torch.isclose(whole, torch.stack(cut).sum(), rtol=1e-4))
        assert values[type(term)] != term.compares_rows
    assert values == {MIAlpha: False, Hint: True}


def test_its_weight_is_never_learned_for_it_goes_below_zero() -> None:
    assert learnable({"mi_alpha": MIAlpha(), "hint": Hint(), "exit_logits": ExitLogits(weight=0.0)}) == [
        "hint"
    ]


def test_without_a_baseline_there_are_no_weights_of_one() -> None:
    widths = Widths(
        student=4, teacher=6, student_taps={"language_model": 4}, teacher_taps={"language_model": 6}
    )
    with_one, without = (MIAlpha(alpha=a).module(widths) for a in (0.9, 1.0))
    assert any("baseline" in name for name, _ in with_one.named_parameters())
    assert not any("baseline" in name for name, _ in without.named_parameters())


def test_a_critic_learns_the_information_of_what_it_is_shown() -> None:
    """Own weights alone, on states of which half the numbers are shared.

    The scores of linear maps lack squares of x, which the best critic of Gaussians has: they find a part.
    """
    generator = torch.Generator().manual_seed(0)
    rho, width = 0.9, 4
    truth = -width / 2 * torch.tensor(1 - rho**2).log()
    torch.manual_seed(0)
    critic = Critic(2 * width, 2 * width, 32, has_baseline=True)
    optimiser = torch.optim.Adam(critic.parameters(), lr=3e-3)
    found = []
    for _ in range(400):
        shared, *own = torch.randn(4, 128, width, generator=generator)
        x = torch.cat([shared, own[0]], dim=1)
        y = torch.cat([rho * shared + (1 - rho**2) ** 0.5 * own[1], own[2]], dim=1)
        ours, theirs, log_q = critic(x, y)
        information = information_rows(ours @ theirs.T, log_q, alpha=0.5).mean()
        optimiser.zero_grad()
        (-information).backward()
        optimiser.step()
        found.append(float(information.detach()))
    last = sum(found[-50:]) / 50
    assert found[0] < 0.3
    assert 1 < last < float(truth)


# Exits ----


@pytest.mark.parametrize("form", ["paper", "code"])
@pytest.mark.parametrize("losses", ["reference", "fast"])
def test_an_exit_at_gamma_one_is_cross_entropy_and_kd_of_its_states(
    student: MLLM, teacher: Teacher, form, losses: str
) -> None:
    term = ExitLogits(layers=(1, 0), form=form, width=8)
    objective = objective_of(num_common=COMMON, losses=losses, exit_logits=term)
    objective = furnished(objective, student, teacher.mllm)
    exits = objective.modules["exit_logits"]
    assert isinstance(exits, nn.ModuleList)
    for exit_ in exits:
        assert isinstance(exit_, Exit)
        nn.init.normal_(exit_.up.weight)
    got = run(objective, student, teacher).means["exit_logits"]
    with torch.no_grad():
        own, theirs = student(BATCH.student, student.image_features(BATCH.student)), teacher(BATCH)
        total = torch.zeros(())
        for exit_, tap in zip(exits, (LAYER1, LAYER0), strict=True):
            total += head_loss(
                exit_(own.tapped[tap].flatten(0, 1)[RESPONSE_N]), own.head_VD,
                BATCH.student.targets_BT.flatten()[RESPONSE_N],
                ce_weight_N=torch.full((len(RESPONSE_N),), float(form == "paper")),
                kl_weight_N=torch.ones(len(RESPONSE_N)),
                teacher_NE=theirs.hidden_BTD.flatten(0, 1)[RESPONSE_N], teacher_head_UE=theirs.head_VD,
                num_common=COMMON,
            ).loss  # fmt: skip
    torch.testing.assert_close(got, total / len(RESPONSE_N), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("term", [ExitLogits(layers=(0,)), VisualExitLogits(layers=(0,))], ids=["r", "v"])
def test_an_exit_moves_the_layers_before_it_and_neither_those_behind_nor_the_head(
    teacher: Teacher, tmp_path: Path, term: Term
) -> None:
    """Of an untied head, which the embeddings do not move."""
    stock = load_stock(str(make_tiny_llava(tmp_path / "untied", hidden=32, layers=3))).stock
    student = MLLM(stock, trainable=("multi_modal_projector", "language_model"))
    objective = furnished(
        objective_of(num_common=COMMON, losses="fast", exit_logits=term), student, teacher.mllm
    )
    run(objective, student, teacher).loss.backward()

    def moves(module: nn.Module) -> bool:
        return any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())

    layers = student.language_model.layers
    assert [moves(layer) for layer in layers] == [True, False, False]
    assert not moves(student.lm_head)
    assert moves(student.multi_modal_projector)
    assert moves(objective.modules["exit_logits"])


# What is refused ----


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("hint={student_taps: [language_model, language_model.norm]}", "must be as many; got 2 "),
        ("hint={student_taps: [multi_modal_projector]}", "shows visual tokens alone"),
        ("hint={map: never}", "`objective.hint`: language_model of the student is 32 wide and language_model "
         "of the teacher 48; set `map` to auto"),
        ("hint={student_taps: [language_model.layers.9]}", "hint reads the student: the tap 'language_model."
         "layers.9' names no module"),
        ("mi_alpha={teacher_taps: [language_model.layers.9]}", "mi_alpha reads the teacher: the tap"),
        ("hint={student_taps: []}", "`objective.hint.student_taps` is empty; name at least one"),
        ("mi_alpha={alpha: 1.5}", "`objective.mi_alpha.alpha` must be from 0 to 1; got 1.5"),
        ("exit_logits={layers: [0, 7]}", "exit_logits reads the student: the tap 'language_model.layers.7' "
         "names no module"),
        ("exit_logits={layers: [1, 1]}", "`layers` of exits must differ; got 1, 1"),
        ("exit_logits={layers: [-1]}", "`objective.exit_logits.layers[0]` must not be negative; got -1"),
        ("learned_weights={lr: 0.1}", "no weight to learn, because cross_entropy, mi_alpha do not read"),
        ("exit_logits={gamma: 0}", "`objective.exit_logits.gamma` must be more than 0; got 0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(stage, capsys, words: str, message: str) -> None:
    off = [f"--objective.{name}=null" for name in ("response_kl", "visual_kl", "relation")]
    more = [*off, "--objective.mi_alpha={}"] if "learned" in words else []
    assert main(["train", str(stage("wrong")), *more, f"--objective.{words}"]) == 2
    assert message in capsys.readouterr().err


def test_a_tap_without_a_row_a_token_is_refused(student: MLLM) -> None:
    tap = "language_model.rotary_emb"
    widths = tapped_widths(student.stock, [LAYER0, tap])
    assert widths[LAYER0] == 32
    shown = Widths(student=32, teacher=48, student_taps={}, teacher_taps={LAYER0: 48})
    with pytest.raises(ValueError, match=r"language_model\.layers\.0' shows no states"):
        Hint(student_taps=(LAYER0,), teacher_taps=(LAYER0,)).module(shown)


def test_widths_are_found_without_drawing_a_number_or_moving_a_weight(student: MLLM) -> None:
    before = torch.random.get_rng_state()
    found = tapped_widths(
        student.stock, [f"{LAYER0}.mlp.up_proj", f"{LAYER0}:input", "multi_modal_projector"]
    )
    assert found == {f"{LAYER0}.mlp.up_proj": 64, f"{LAYER0}:input": 32, "multi_modal_projector": 32}
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(p.grad is None for p in student.parameters())
    assert any(p.requires_grad for p in student.parameters())


# A whole run ----

WORDS = [
    f"--objective.hint={{weight: 0.5, student_taps: [{LAYER0}], teacher_taps: [{LAYER1}]}}",
    "--objective.visual_hint={kind: cosine, student_taps: [multi_modal_projector], "
    "teacher_taps: [multi_modal_projector]}",
    f"--objective.mi_alpha={{weight: 0.5, student_taps: [{LAYER0}], teacher_taps: [{LAYER0}]}}",
    "--objective.exit_logits={layers: [0], gamma: 1.5, width: 16}",
    "--checkpoint.every=1",
]


def state(run_dir: Path, step: int) -> dict[str, Tensor]:
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def test_own_weights_train_resume_bit_for_bit_and_are_not_exported(stage, tmp_path: Path) -> None:
    whole, half = stage("whole", max_steps=3), stage("half", max_steps=3)
    assert main(["train", str(whole), *WORDS]) == 0
    first, last = (state(whole.with_suffix(""), step) for step in (2, 3))
    for name in ("hint.0.weight", "mi_alpha.0.of_student.weight", "mi_alpha.0.baseline.2.bias",
                 "visual_hint.0.bias", "exit_logits.0.down.weight"):  # fmt: skip
        key = f"parameter/terms.{name}"
        assert not torch.equal(first[key], last[key]), name
    exported = load_file(whole.with_suffix("") / "model" / "model.safetensors")
    assert not any("terms" in key for key in exported)

    assert main(["train", str(half), *WORDS]) == 0
    output = half.with_suffix("")
    (output / "run.json").unlink()
    for file in (output / "checkpoints" / "step-00000003").iterdir():
        file.unlink()
    (output / "checkpoints" / "step-00000003").rmdir()
    assert main(["train", str(half), *WORDS]) == 0
    again = state(output, 3)
    assert again.keys() == last.keys()
    assert all(torch.equal(again[key], last[key]) for key in last)
    packed = ["--data.packing.max_tokens=512", f"--output_dir={tmp_path / 'packed'}"]
    assert main(["train", str(half), *WORDS, *packed]) == 0
    line = json.loads((tmp_path / "packed" / "metrics.jsonl").read_text().splitlines()[-1])
    assert all(math.isfinite(line[name]) for name in ("hint", "visual_hint", "mi_alpha", "exit_logits"))


def test_under_bf16_with_a_bf16_teacher_it_trains_to_numbers(stage) -> None:
    config = stage("half", max_steps=2)
    words = ["--engine.precision=bf16", "--teacher.dtype=bfloat16", "--trainable=[multi_modal_projector]"]
    assert main(["train", str(config), *WORDS, *words]) == 0
    lines = (config.with_suffix("") / "metrics.jsonl").read_text().splitlines()
    for name in ("hint", "visual_hint", "mi_alpha", "exit_logits", "loss"):
        assert math.isfinite(json.loads(lines[-1])[name]), name


def test_a_dry_run_names_the_modules_and_that_the_micro_batch_counts(stage, capsys) -> None:
    assert main(["train", str(stage("dry")), *WORDS, "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert f"student's output of {LAYER0}: Qwen2DecoderLayer" in said
    assert "student's output of multi_modal_projector" in said
    assert "compares rows with each other within a micro-batch" in said


def test_a_cache_of_hidden_states_serves_exits_and_none_serves_taps_of_the_teacher(stage) -> None:
    assert replace(ExitLogits(), layers=(0,)).reads.teacher == "states"
    config = stage("cached")
    with pytest.raises(ValueError, match="need the model itself"):
        replace(Hint().reads, teacher="states")
    assert main(["train", str(config), WORDS[0], "--teacher.cache=somewhere"]) == 2
