"""Questions asked while a stage trains: what they give, what they leave alone, and the best checkpoint."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file

from llava_kd.cli import main
from llava_kd.evaluation.slices import read_slice, score_slices
from llava_kd.models.files.checkpoint import load_stock
from llava_kd.training.checkpoint import Checkpoints, Saved

ENGINES = {
    "ddp": ["--engine.kind=ddp"],
    "fsdp2": ["--engine.kind=fsdp2"],
    "zero3": ["--engine.kind=deepspeed", "--engine.zero_stage=3"],
}


def lines(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def same_weights(a: Path, b: Path) -> bool:
    first, second = (load_file(output / "model" / "model.safetensors") for output in (a, b))
    return all(torch.equal(value, second[name]) for name, value in first.items())


def slices(shapes_dir: Path, *, every: int, count: int = 3) -> dict[str, object]:
    part = {"data": str(shapes_dir / "validation.json"), "num_questions": count}
    return {"every": every, "slices": {"val": part}, "max_new_tokens": 3, "batch_size": 2}


def scripted(monkeypatch: pytest.MonkeyPatch, *values: float) -> list[float]:
    """Accuracies that the evaluations give, one after the other: a tiny student gets nothing right."""
    asked: list[float] = []

    def score(*_: object, **__: object) -> dict[str, float]:
        asked.append(values[len(asked)])
        return {"slice/val": asked[-1], "slice/seconds": 0.0}

    monkeypatch.setattr("llava_kd.assembly.parts.slices.score_slices", score)
    return asked


def test_questions_are_asked_beside_training_and_change_nothing_in_it(
    stage, shapes_dir: Path, monkeypatch
) -> None:
    plain, asked = (
        stage("plain", max_steps=5),
        stage("asked", max_steps=5, evaluate=slices(shapes_dir, every=2)),
    )
    states = []

    def spy(*arguments: object, **more: object) -> dict[str, float]:
        before = torch.get_rng_state()
        figures = score_slices(*arguments, **more)  # type: ignore[arg-type]
        states.append(torch.equal(before, torch.get_rng_state()))
        return figures

    monkeypatch.setattr("llava_kd.assembly.parts.slices.score_slices", spy)
    assert main(["train", str(plain)]) == main(["train", str(asked)]) == 0
    plain, asked = plain.with_suffix(""), asked.with_suffix("")
    assert states == [True] * 3
    assert [line["step"] for line in lines(asked) if "slice/val" in line] == [2, 4, 5]
    assert [line["loss"] for line in lines(asked)] == [line["loss"] for line in lines(plain)]
    assert same_weights(plain, asked)


def test_the_figure_is_that_of_the_student_as_it_stands(stage, shapes_dir: Path, tmp_path: Path) -> None:
    """The last one is what the exported model scores, on truths that it answers itself."""
    first = stage("first", max_steps=3)
    assert main(["train", str(first)]) == 0
    done = load_stock(str(first.with_suffix("") / "model"))
    records = json.loads((shapes_dir / "validation.json").read_text())[:4]
    from llava_kd.evaluation.generation.generate import Generator

    generator = Generator(done.stock.eval(), done.processor, max_new_tokens=3)
    texts = generator.answer(read_slice("all", shapes_dir / "validation.json", count=4).questions)
    for record, text in zip(records[:3], texts, strict=False):
        record["conversations"][1]["value"] = text or "?"
    path = tmp_path / "own.json"
    path.write_text(json.dumps(records))
    expected = sum(bool(text) for text in texts[:3]) / 4
    evaluate = {
        "every": 3,
        "slices": {"own": {"data": str(path), "images": str(shapes_dir)}},
        "max_new_tokens": 3,
    }
    again = stage("again", max_steps=3, evaluate=evaluate)
    assert main(["train", str(again)]) == 0
    assert expected > 0
    assert lines(again.with_suffix(""))[-1]["slice/own"] >= expected


def test_a_line_is_written_where_questions_were_asked_and_their_time_is_in_no_rate(
    stage, shapes_dir: Path, monkeypatch
) -> None:
    import time

    def slow(*_: object, **__: object) -> dict[str, float]:
        time.sleep(30 * 0.1)
        return {"slice/val": 0.5, "slice/seconds": 3.0}

    monkeypatch.setattr("llava_kd.assembly.parts.slices.score_slices", slow)
    config = stage("run", distilled=False, max_steps=3, evaluate=slices(shapes_dir, every=2))
    assert main(["train", str(config), "--log.every=100", "--log.diagnostics_every=0"]) == 0
    logged = lines(config.with_suffix(""))
    assert [line["step"] for line in logged] == [2, 3]
    assert all(line["seconds_per_step"] * (2, 1)[k] < 3.0 for k, line in enumerate(logged))


def test_the_best_checkpoint_outlives_the_rotation_and_becomes_the_model(
    stage, shapes_dir: Path, monkeypatch, capsys
) -> None:
    changes = {"max_steps": 6, "evaluate": slices(shapes_dir, every=1)}
    keep = {"every": 2, "keep": 1, "best": "slice/val"}
    scripted(monkeypatch, *(0.1, 0.2, 0.9, 0.3, 0.9, 0.4) * 2)
    best = stage("best", checkpoint={**keep, "export": "best"}, **changes)
    assert main(["train", str(best)]) == 0
    said = capsys.readouterr().err
    best = best.with_suffix("")
    assert "step 3 is the best so far: slice/val 0.9000" in said
    assert "step 5 is the best" not in said
    assert Checkpoints(best / "checkpoints", keep=1).steps() == [3, 6]
    record = json.loads((best / "run.json").read_text())
    assert record["exported"] == {"step": 3, "figure": "slice/val", "value": 0.9}
    assert "step 3, the best by slice/val: 0.9000" in (best / "model" / "README.md").read_text()

    last = stage("last", checkpoint=keep, **changes)
    assert main(["train", str(last)]) == 0
    last = last.with_suffix("")
    assert json.loads((last / "run.json").read_text())["exported"] is None
    for output, step in ((best, 3), (last, 6)):
        state = load_file(output / "checkpoints" / f"step-{step:08d}" / "state.safetensors")
        model = load_file(output / "model" / "model.safetensors")
        name = "multi_modal_projector.linear_1.weight"
        written = next(value for key, value in model.items() if key.endswith(name))
        assert torch.equal(written, state[f"parameter/mllm.{name}"])


def test_the_best_so_far_survives_a_stop(stage, shapes_dir: Path, monkeypatch, capsys) -> None:
    config = stage(
        "run",
        max_steps=5,
        evaluate=slices(shapes_dir, every=1),
        checkpoint={"every": 100, "keep": 1, "best": "slice/val", "export": "best"},
    )
    values = scripted(monkeypatch, 0.8, 0.3, 0.5, 0.6, 0.2)
    score = values.append

    def stops(*_: object, **__: object) -> dict[str, float]:
        score((0.8, 0.3, 0.5, 0.6, 0.2)[len(values)])
        if len(values) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"slice/val": values[-1]}

    monkeypatch.setattr("llava_kd.assembly.parts.slices.score_slices", stops)
    assert main(["train", str(config)]) == 0
    output = config.with_suffix("")
    assert not (output / "model").exists()
    capsys.readouterr()
    assert main(["train", str(config)]) == 0
    assert "best so far" not in capsys.readouterr().err
    assert json.loads((output / "run.json").read_text())["exported"]["step"] == 1
    assert [line["slice/val"] for line in lines(output)] == [0.8, 0.3, 0.5, 0.6, 0.2]


def test_a_damaged_best_checkpoint_gives_way_to_the_next_best(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, best="slice/val")
    for step, value in ((1, 0.9), (2, 0.5), (3, 0.7)):
        saved = Saved(step=step, state={"w": torch.full((3,), float(step))}, figures={"slice/val": value})
        checkpoints.save(saved)
    assert checkpoints.steps() == [1, 2, 3]
    (tmp_path / "step-00000001" / "state.safetensors").write_bytes(b"cut")
    saved, problems = checkpoints.load_best()
    assert saved is not None
    assert saved.step == 3
    assert "step-00000001 cannot be read and is skipped" in problems[0]
    checkpoints.save(Saved(step=4, state={"w": torch.ones(3)}))
    assert checkpoints.steps() == [1, 3, 4]
    assert checkpoints.best(up_to=0) is None


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_gives_the_figures_and_weights_of_one_rank(
    stage, shapes_dir: Path, tmp_path: Path, engine: str
) -> None:
    if engine == "zero3":
        pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")
    config = stage("plain", max_steps=3, engine="auto")
    ranks.train(config, tmp_path / "plain", *ENGINES[engine], ranks=2)
    own = tmp_path / "own.json"
    records = json.loads((shapes_dir / "validation.json").read_text())[:5]
    model = load_stock(str(tmp_path / "plain" / "model"))
    from llava_kd.evaluation.generation.generate import Generator

    generator = Generator(model.stock.eval(), model.processor, max_new_tokens=3)
    texts = generator.answer(read_slice("all", shapes_dir / "validation.json", count=5).questions)
    for record, text in zip(records[:3], texts, strict=False):
        record["conversations"][1]["value"] = text or "?"
    own.write_text(json.dumps(records))
    part = read_slice("own", own, image_root=shapes_dir)
    expected = score_slices(model.stock, model.processor, [part], max_new_tokens=3)["slice/own"]
    evaluate = f"{{every: 2, slices: {{own: {{data: {own}, images: {shapes_dir}}}}}, max_new_tokens: 3}}"
    words = [*ENGINES[engine], f"--evaluate={evaluate}", "--checkpoint.best=slice/own"]
    ended = ranks.train(config, tmp_path / "asked", *words, ranks=2)
    assert expected > 0
    assert [line["step"] for line in lines(tmp_path / "asked") if "slice/own" in line] == [2, 3], ended.log
    assert lines(tmp_path / "asked")[-1]["slice/own"] == expected
    assert same_weights(tmp_path / "plain", tmp_path / "asked")


# What is refused ----


def test_a_best_that_no_slice_gives_is_refused_with_the_nearest(stage, shapes_dir: Path, capsys) -> None:
    config = stage("run", evaluate=slices(shapes_dir, every=2))
    assert main(["train", str(config), "--checkpoint.best=slice/vla"]) == 2
    said = capsys.readouterr().err
    assert "`checkpoint.best` is slice/vla, but neither `evaluate.slices`" in said
    assert "did you mean slice/val?" in said
    assert main(["train", str(config), "--checkpoint.export=best"]) == 2
    assert "set it to slice/NAME or loss/NAME" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["file", "image"])
def test_slices_that_cannot_be_asked_are_refused_before_any_model(
    stage, shapes_dir: Path, tmp_path: Path, capsys, monkeypatch, missing: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("llava_kd.assembly.train.student_in", refuse)
    part = {"data": str(shapes_dir / "validation.json"), "images": str(tmp_path)}
    if missing == "file":
        part = {"data": str(tmp_path / "none.json")}
    config = stage("run", evaluate={"every": 2, "slices": {"val": part}})
    assert main(["train", str(config)]) == 2
    said = capsys.readouterr().err
    assert ("no test file" if missing == "file" else "images are missing") in said
