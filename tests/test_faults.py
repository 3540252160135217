"""One process: what a run refuses, what it passes over, and what it leaves behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file, save_file
from tiny_llava import make_tiny_llava

from llava_kd.assembly import train as build_train
from llava_kd.assembly.parts import teacher as build_teacher
from llava_kd.cli import main
from llava_kd.parallel.world import World
from llava_kd.training import checkpoint
from llava_kd.training.checkpoint import Checkpoints, Saved, checksum

EVERY = {"every": 1, "keep": 3}


@pytest.fixture
def stopped(stage, capsys: pytest.CaptureFixture[str]) -> Path:
    """YAML of a run of 3 steps that ended after step 2, with the checkpoints of steps 1 and 2."""
    config = stage("run", distilled=False, checkpoint=EVERY)
    assert main(["train", str(config), "--max_steps=3"]) == 0
    output = config.with_suffix("")
    (output / "run.json").unlink()
    shutil.rmtree(output / "model")
    shutil.rmtree(output / "checkpoints" / "step-00000003")
    capsys.readouterr()
    return config


def error(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["train", *words]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1, text
    return text


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model fails the test."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(build_train, "student_in", refuse)
    monkeypatch.setattr(build_teacher, "load_stock", refuse)


@pytest.mark.parametrize("refused", [False, True], ids=["", "it cannot be removed"])
def test_a_kill_between_the_last_checkpoint_and_the_removal_of_the_one_before_leaves_no_orphan(
    stage, monkeypatch: pytest.MonkeyPatch, capsys, refused: bool
) -> None:
    """One that the system does not let go of keeps nobody from the end of the run."""

    class Killed(BaseException):
        pass

    def kill(_: Path) -> None:
        raise Killed

    config = stage("run", distilled=False, checkpoint={"every": 1, "keep": 2})
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_remove", lambda _, directory: kill(directory))
        with pytest.raises(Killed):
            main(["train", str(config), "--max_steps=3"])
    checkpoints = Checkpoints(config.with_suffix("") / "checkpoints", keep=2)
    assert checkpoints.steps() == [1, 2, 3]
    rename = os.rename

    def read_only(source: Path, target: Path, **more: object) -> None:
        if refused and str(target).endswith(".retired"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(source))
        rename(source, target, **more)

    monkeypatch.setattr(os, "rename", read_only)
    assert main(["train", str(config), "--max_steps=3"]) == 0
    assert checkpoints.steps() == ([1, 2, 3] if refused else [2, 3])
    said = capsys.readouterr().err
    assert ("stays, because it cannot be removed: [Errno 30] Read-only file system" in said) == refused
    assert "done: the student is" in said


@pytest.mark.parametrize("what", ["cut", "flipped", "no state", "no json", "not a format"])
def test_a_damaged_newest_checkpoint_is_passed_over_by_name(stopped: Path, capsys, what: str) -> None:
    newest = stopped.with_suffix("") / "checkpoints" / "step-00000002"
    state = newest / "state.safetensors"
    data = bytearray(state.read_bytes())
    if what == "cut":
        state.write_bytes(data[: len(data) // 2])
    elif what == "flipped":
        data[-3] ^= 1
        state.write_bytes(data)
    elif what == "no state":
        state.unlink()
    else:
        (newest / "trainer.json").write_text("{" if what == "no json" else "{}")
    assert main(["train", str(stopped)]) == 0
    text = capsys.readouterr().err
    assert f"{newest} cannot be read and is skipped" in text
    assert "resuming from step 1" in text


def test_a_checkpoint_of_a_newer_version_is_refused_before_any_model(
    stopped: Path, capsys, no_models
) -> None:
    meta = stopped.with_suffix("") / "checkpoints" / "step-00000002" / "trainer.json"
    newer = {**json.loads(meta.read_text()), "format": checkpoint.FORMAT_VERSION + 1}
    meta.write_text(json.dumps({**newer, "checksum": checkpoint.meta_checksum(newer)}))
    assert "upgrade llava_kd" in error(capsys, str(stopped))


def test_another_recipe_is_refused_before_any_model_and_the_change_named(stopped, capsys, no_models) -> None:
    text = error(capsys, str(stopped), "--optim.lr=0.5", "--engine.precision=bf16")
    assert "optim.lr: 0.001 -> 0.5" in text
    assert "engine.precision: fp32 -> bf16" in text
    assert "choose a new output_dir" in text


def test_how_it_is_computed_may_change(stopped: Path, capsys) -> None:
    words = ["--micro_batch_size=1", "--log.every=2", "--checkpoint.keep=1", "--engine.kind=auto"]
    assert main(["train", str(stopped), *words]) == 0
    assert "resuming from step 2" in capsys.readouterr().err


def test_frozen_parts_that_changed_under_a_run_are_refused(stage, tmp_path: Path, capsys) -> None:
    student = make_tiny_llava(tmp_path / "student", hidden=32, tied=True)
    config = stage("run", distilled=False, trainable=("multi_modal_projector",), checkpoint=EVERY)
    words = [str(config), f"--student.checkpoint={student}"]
    assert main(["train", *words]) == 0
    (config.with_suffix("") / "run.json").unlink()
    weights = load_file(student / "model.safetensors")
    name = next(name for name in weights if "language_model" in name and "norm" in name)
    weights[name][0] += 1e-3
    save_file(weights, student / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    assert main(["train", *words]) == 2
    assert "was trained with another frozen part of the student" in capsys.readouterr().err


def test_data_that_changed_under_a_run_are_refused(stage, shapes_dir: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "copy.json"
    records = json.loads((shapes_dir / "instructions.json").read_text())
    path.write_text(json.dumps(records))
    config = stage("run", distilled=False, checkpoint=EVERY)
    assert main(["train", str(config), f"--data.path={path}"]) == 0
    (config.with_suffix("") / "run.json").unlink()
    path.write_text(json.dumps(records[1:]))
    assert main(["train", str(config), f"--data.path={path}"]) == 2
    assert "was trained with another data or tokenizer" in capsys.readouterr().err


def test_json_lines_cut_at_a_line_end_are_refused_by_a_run_that_knew_them(
    stage, shapes_dir: Path, tmp_path: Path, capsys
) -> None:
    """The shorter file is a whole one: only who has counted the records before can tell."""
    path, cache = tmp_path / "records.jsonl", tmp_path / "cache"
    records = json.loads((shapes_dir / "instructions.json").read_text())
    lines = [json.dumps(record) + "\n" for record in records]
    path.write_text("".join(lines))
    config = stage("run", max_steps=1, checkpoint=EVERY)
    data = f"--data.path={path}"
    assert main(["cache-teacher", str(config), data, f"--out={cache}"]) == 0
    assert main(["train", str(config), data]) == 0
    (config.with_suffix("") / "run.json").unlink()
    path.write_text("".join(lines[:-1]))
    capsys.readouterr()
    assert main(["train", str(config), data]) == 2
    assert "was trained with another data or tokenizer" in capsys.readouterr().err
    other = stage("other", max_steps=1)
    assert main(["train", str(other), data, f"--teacher.cache={cache}"]) == 2
    assert f"{cache} was written with other inputs (" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["/proc/run", "file/run"], ids=["read-only", "below a file"])
def test_an_output_dir_that_cannot_be_written_is_refused_before_any_model(
    stage, tmp_path: Path, capsys, no_models, where: str
) -> None:
    (tmp_path / "file").write_text("")
    output = where if where.startswith("/") else str(tmp_path / where)
    text = error(capsys, str(stage("run")), f"--output_dir={output}")
    assert f"output_dir {output} cannot be written" in text


def test_a_world_that_does_not_divide_the_batch_is_refused_before_any_model(
    stage, no_models, monkeypatch
) -> None:
    from llava_kd.assembly.runs.run_dir import check_world
    from llava_kd.assembly.settings import load

    world = World(rank=0, size=3, device=torch.device("cpu"))
    with pytest.raises(
        ValueError, match=r"multiple of the number of ranks; got 3 ranks: start 2 ranks, or .* to 6"
    ):
        check_world(load(stage("run", engine="ddp")), world)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "deepspeed"])
def test_an_engine_of_several_ranks_is_refused_on_one(stage, capsys, no_models, kind: str) -> None:
    text = error(capsys, str(stage("run", engine=kind)))
    assert f"engine.kind is {kind}, which needs several ranks, but one runs; use auto" in text


def test_two_engines_at_once_are_refused(stage, capsys) -> None:
    text = error(capsys, str(stage("run", engine="ddp")), "--engine.zero_stage=2")
    assert "only deepspeed has ZeRO stages; set" in text


def test_a_second_process_in_the_same_output_dir_is_refused(stage, capsys, no_models) -> None:
    import fcntl

    config = stage("run")
    output = config.with_suffix("")
    output.mkdir()
    with (output / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert "another process is running" in error(capsys, str(config))


def test_two_engines_on_one_command_line_are_refused(stage, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["train", str(stage("run")), "--engine.kind=ddp", "--engine.kind=fsdp2"])
    assert (
        "only one engine can be used; got --engine.kind=ddp and --engine.kind=fsdp2: name"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "2"}, "RANK must be below WORLD_SIZE; got 2 of 2"),
        ({"RANK": "0"}, "WORLD_SIZE is 2 but MASTER_ADDR and MASTER_PORT is not set; start with torchrun"),
    ],
)
def test_ranks_that_could_only_wait_are_refused(stage, monkeypatch, capsys, variables, said) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WORLD_SIZE": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", str(stage("run", engine="auto"))]) == 2
    assert said in capsys.readouterr().err


def test_a_port_in_use_is_named(stage, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        environment = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        words = ["train", str(stage("run", engine="ddp"))]
        ended = ranks.Ranks(words, tmp_path / "logs", environment=environment).wait(30)
    assert ended.codes == (2,), ended.log
    assert f"cannot open 127.0.0.1:{port}" in ended.log
    assert "MASTER_PORT" in ended.log


def test_a_full_disk_leaves_the_other_checkpoints_and_no_scratch(tmp_path: Path, monkeypatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(Saved(step=1, state={"w": torch.ones(3)}))

    def full(_state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(ValueError, match=r"step 2 cannot be written .* No space left"):
        checkpoints.save(Saved(step=2, state={"w": torch.zeros(3)}))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    saved, problems = checkpoints.load_newest()
    assert saved is not None
    assert saved.step == 1
    assert problems == []


def test_what_a_killed_process_left_is_swept(stopped: Path, capsys) -> None:
    output = stopped.with_suffix("")
    for name in (".model.partial", ".model.retired", "checkpoints/.step-00000009.partial"):
        (output / name).mkdir()
        (output / name / "half").write_text("x")
    (output / ".config.yaml.partial").write_text("x")
    assert main(["train", str(stopped)]) == 0
    left = [path for path in output.rglob(".*") if path.name != ".lock"]
    assert left == []


def test_a_run_killed_before_its_settings_were_written_starts_anew(stage) -> None:
    config = stage("run", distilled=False, max_steps=1)
    output = config.with_suffix("")
    output.mkdir()
    (output / ".config.yaml.partial").write_text("out")
    (output / ".lock").write_text("")
    assert main(["train", str(config)]) == 0


def test_the_checksum_is_of_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "f"
    data = bytearray((1 << 24) + 5)
    path.write_bytes(data)
    before = checksum(path)
    data[-1] ^= 1
    path.write_bytes(data)
    assert checksum(path) != before
