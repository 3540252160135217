"""What `--dry_run` and `check` say: exact where it can be, and without touching what is there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llava_kd.assembly.planning import dry_run as build_plan
from llava_kd.assembly.planning.estimate import ModelSizes, memory, refuse_too_large, traffic
from llava_kd.assembly.settings import load
from llava_kd.assembly.stage import assemble
from llava_kd.cli import main
from llava_kd.data.pixels.compiled import resizer
from llava_kd.data.pixels.images import jpeg_decoder
from llava_kd.models.files.checkpoint import load_stock
from llava_kd.parallel.world import World

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


def test_a_dry_run_prints_the_plan_and_writes_nothing(stage, capsys) -> None:
    config = stage("run", engine="auto", global_batch_size=8)
    assert main(["train", str(config), "--dry_run", "--ranks=2"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "ranks 2, engine ddp, fp32" in said
    assert "global batch 8 = 2 ranks x 2 micro-batches of up to 2" in said
    assert "steps 3 " in said
    assert f"output {config.with_suffix('')}: new" in said
    assert not config.with_suffix("").exists()


def test_a_dry_run_says_the_loss_as_a_formula(stage, capsys) -> None:
    config = stage("run")
    words = [
        "--objective.cross_entropy.weight=2",
        "--objective.response_kl={weight: 0.5, temperature: 2, divergence: reverse}",
        "--objective.learned_weights={}",
    ]
    assert main(["train", str(config), "--dry_run", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "loss             2 * cross_entropy + 0.5 * response_kl + 1 * visual_kl + 0.5 * relation" in lines
    at = next(i for i, line in enumerate(lines) if line.startswith("  response_kl: "))
    assert lines[at + 1] == (
        "    = sum over response rows / response_tokens of the step; reads the teacher's logits (live, or a "
        "cache of the largest)"
    )
    assert lines[at + 2] == "    with temperature 2, divergence reverse, mix 0.5, trust all, listed 5"
    assert "  weights that are learned, starting from these values: response_kl, visual_kl, relation" in lines


def test_a_dry_run_resolves_every_tap_and_refuses_one_that_is_not_there(stage, capsys) -> None:
    plugins = [f"--plugins=[{Path(__file__).parent / 'layer_states_plugin.py'}]"]
    words = [*plugins, "--objective.layer_states.student_layer=language_model.layers.1.mlp"]
    config = stage("run")
    assert main(["train", str(config), "--dry_run", *words]) == 0
    said = capsys.readouterr().out
    assert "student's output of language_model.layers.1.mlp: Qwen2MLP, first matrix " in said
    assert "teacher's output of language_model.layers.0: Qwen2DecoderLayer, " in said
    assert (
        main(["train", str(config), "--dry_run", *plugins, "--objective.layer_states.student_layer=x.1"]) == 2
    )
    assert "layer_states reads the student: the tap 'x.1' must begin with one of" in capsys.readouterr().err


def test_a_dry_run_refuses_what_the_run_would(stage, capsys) -> None:
    config = stage("run", engine="auto")
    assert main(["train", str(config), "--dry_run", "--ranks=3"]) == 2
    assert "multiple of the number of ranks; got 3" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["slice", "parent", "template", "other run"])
def test_a_dry_run_says_what_training_would_say(stage, tmp_path: Path, capsys, fault: str) -> None:
    config = stage("run", distilled=False, max_steps=1)
    none = tmp_path / "none"
    words, expected = {
        "slice": ([f"--evaluate={{every: 1, slices: {{val: {{data: {none}.json}}}}}}"], "no test file"),
        "parent": ([f"--student.checkpoint={none}"], str(none)),
        "template": (["--data.template=vicuna_v9"], "vicuna_v9"),
        "other run": (["--seed=1"], "seed"),
    }[fault]
    if fault == "other run":
        assert main(["train", str(config)]) == 0
    capsys.readouterr()
    said = []
    for more in ([], ["--dry_run"]):
        assert main(["train", str(config), *words, *more]) == 2
        said.append(capsys.readouterr().err.splitlines()[-1])
    assert said[0] == said[1]
    assert expected in said[1]


def test_a_dry_run_refuses_an_output_that_cannot_be_made(stage, monkeypatch, capsys) -> None:
    config = stage("run", engine="auto")
    assert main(["train", str(config), "--dry_run", f"--output_dir={config}/deep/run"]) == 2
    assert f"run cannot be created: {config} is a file; name a directory" in capsys.readouterr().err
    monkeypatch.setattr("os.access", lambda *_: False)  # the superuser may write anywhere
    assert main(["train", str(config), "--dry_run"]) == 2
    assert f"cannot be created: {config.parent} is not writable" in capsys.readouterr().err


def test_sizes_from_the_configuration_alone_are_those_of_the_model(
    student_dir: Path, teacher_dir: Path
) -> None:
    for directory in (student_dir, teacher_dir):
        stock = load_stock(str(directory)).stock
        assert ModelSizes.of_directory(str(directory)) == ModelSizes.of(stock)
        assert sum(ModelSizes.of(stock).parameters.values()) == sum(p.numel() for p in stock.parameters())


@pytest.mark.parametrize(
    "trainable", [("multi_modal_projector",), ("multi_modal_projector", "language_model")]
)
def test_states_are_what_a_run_holds(
    stage, trainable: tuple[str, ...], student_dir: Path, teacher_dir: Path
) -> None:
    """Weights, gradients, optimiser and teacher of a real step, byte by byte."""
    config = load(stage("run", trainable=trainable, global_batch_size=2))
    student, teacher = load_stock(str(student_dir)), load_stock(str(teacher_dir))
    (Path(config.output_dir)).mkdir()
    trainer, engine = assemble(config, ALONE, student, teacher, say=lambda _: None)
    trained = [p for p in student.stock.parameters() if p.requires_grad]
    held = {
        "weights": sum(p.numel() * p.element_size() for p in student.stock.parameters()),
        "gradients": sum(p.numel() * 4 for p in trained),
        "optimiser": sum(t.numel() * 4 for name, t in engine.state().items() if "exp_avg" in name),
        "teacher": sum(p.numel() * p.element_size() for p in teacher.stock.parameters()),
    }
    found = memory(config, 1, ModelSizes.of(student.stock, config), ModelSizes.of(teacher.stock))
    assert {name: found[name] for name in held} == held
    assert trainer.num_steps == config.max_steps


def test_sharding_divides_what_it_should(stage, student_dir: Path) -> None:
    config = load(stage("run", distilled=False))
    sizes = ModelSizes.of_directory(str(student_dir), config)

    def held(kind: str, zero_stage: int | None = None, ranks: int = 4) -> dict[str, float]:
        engine = replace(config.engine, kind=kind, zero_stage=zero_stage, precision="bf16")
        return memory(replace(config, engine=engine), ranks, sizes, None)

    whole = held("ddp")
    assert held("fsdp2")["optimiser"] == held("deepspeed", 1)["optimiser"] == whole["optimiser"] / 4
    assert held("deepspeed", 2)["gradients"] == held("deepspeed", 1)["gradients"] / 4
    assert held("deepspeed", 3)["weights"] < held("deepspeed", 2)["weights"] < whole["weights"]
    assert held("ddp", ranks=8) == whole


def test_a_spread_teacher_leaves_a_share_of_its_layers(stage, student_dir: Path, teacher_dir: Path) -> None:
    config = load(stage("run"), ["--teacher.placement=fsdp"])
    student, teacher = ModelSizes.of_directory(str(student_dir)), ModelSizes.of_directory(str(teacher_dir))
    layers = teacher.layers * teacher.largest_unit
    rest = sum(teacher.parameters.values()) - layers
    assert memory(config, 1, student, teacher)["teacher"] == 4 * (rest + layers)
    assert memory(config, 4, student, teacher)["teacher"] == 4 * (rest + layers / 4)


def test_a_ring_sends_twice_the_gradients(stage, student_dir: Path) -> None:
    config = load(stage("run", engine="auto", trainable=("multi_modal_projector",)))
    sizes = ModelSizes.of_directory(str(student_dir), config)
    count = sizes.parameters["multi_modal_projector"]
    assert traffic(config, 1, sizes) == 0
    assert traffic(config, 4, sizes) == 2 * 0.75 * 4 * count


def test_a_spread_teacher_is_gathered_for_every_micro_batch(
    stage, student_dir: Path, teacher_dir: Path
) -> None:
    config = load(stage("run", engine="auto", global_batch_size=8), ["--teacher.placement=fsdp"])
    student, teacher = (
        ModelSizes.of_directory(str(student_dir), config),
        ModelSizes.of_directory(str(teacher_dir)),
    )
    gathered = traffic(config, 2, student, teacher) - traffic(config, 2, student)
    assert gathered == 2 * 0.5 * 4 * teacher.layers * teacher.largest_unit


def test_a_teacher_larger_than_the_device_is_refused_with_the_difference() -> None:
    with pytest.raises(
        ValueError, match=r"needs 15.00 GB .* has 10.00 GB: 5.00 GB too much .*teacher 14.00 GB"
    ):
        refuse_too_large({"weights": 1e9, "teacher": 14e9, "activations": 9e9}, 10e9)
    refuse_too_large({"weights": 1e9, "activations": 99e9}, 10e9)


def test_check_looks_at_vocabulary_towers_labels_and_records(stage, capsys) -> None:
    assert main(["check", str(stage("run", engine="auto")), "--records=5", "--ranks=2"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "towers the same: it runs once" in said
    assert "vocabulary 260 shared tokens" in said
    assert f"decoded by {jpeg_decoder()} and images are resized by {resizer()}, exactly" in said
    assert "sample 5 records, 0 bad" in said
    assert "is trained on" in said
    assert "ranks 2" in said


def test_the_plan_knows_a_run_that_is_there(tmp_path: Path) -> None:
    assert build_plan._state(tmp_path) == "new"
    (tmp_path / "checkpoints").mkdir()
    assert build_plan._state(tmp_path) == "resumes from the last checkpoint"
    (tmp_path / "run.json").write_text("{}")
    assert build_plan._state(tmp_path) == "complete, nothing to do"


QUICKSTART_TEACHER = Path(__file__).parent.parent / "scripts/quickstart/backbones/teacher"


def blind(directory: Path) -> Path:
    """The quickstart's teacher with a projector that gives the same for every picture."""
    parts = load_stock(str(QUICKSTART_TEACHER))
    for parameter in parts.stock.model.multi_modal_projector.parameters():
        parameter.data.zero_()
    parts.stock.save_pretrained(directory)
    parts.processor.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("sees", [True, False])
def test_a_check_says_whether_the_models_look_at_the_pictures(
    stage, shapes_dir: Path, tmp_path: Path, capsys, sees: bool
) -> None:
    model = QUICKSTART_TEACHER if sees else blind(tmp_path / "blind")
    words = [f"--teacher.checkpoint={model}", "--teacher.dtype=float32", f"--student.checkpoint={model}"]
    words += [f"--data.path={shapes_dir / 'instructions.json'}", "--data.template=vicuna"]
    assert main(["check", str(stage("run")), *words, "--pictures=8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    said = [line for line in lines if line.startswith("pictures ")]
    assert len(said) == 2
    gains = [float(line.split("another one: ")[1].split()[0]) for line in said]
    assert all(gain > 1 if sees else gain == 0 for gain in gains)
    warnings = [line for line in lines if "uses the picture" in line and line.startswith("  warning  ")]
    assert len(warnings) == (0 if sees else 2)


def test_a_check_scores_no_pictures_where_none_are_asked_for_or_none_are_there(
    stage, shapes_dir: Path, tmp_path: Path, capsys
) -> None:
    config = stage("run")
    assert main(["check", str(config), "--pictures=0"]) == 0
    assert "pictures " not in capsys.readouterr().out
    words = [{"from": "human", "value": "Say a word."}, {"from": "gpt", "value": "Gladly."}]
    (path := tmp_path / "words.json").write_text(
        json.dumps([{"id": str(i), "conversations": words} for i in range(3)])
    )
    assert main(["check", str(config), f"--data.path={path}", f"--data.images={shapes_dir}"]) == 0
    assert "teacher: fewer than 2 of the sampled records have a picture" in capsys.readouterr().out
