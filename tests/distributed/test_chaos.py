"""Kill -9 at numbered moments drawn from a seed, anywhere from the first write to the last; then go on."""

from __future__ import annotations

import json
import random
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file
from tiny_runs import write_stage

pytestmark = pytest.mark.distributed

PROJECTOR = {"template": "plain", "trainable": ("multi_modal_projector",)}
SCENES: dict[str, tuple[dict, int, list[str]]] = {
    "projector, one rank": (PROJECTOR, 1, []),
    "undistilled, one rank": ({"distilled": False}, 1, []),
    "distilled, one rank": ({}, 1, []),
    "projector, ddp": (PROJECTOR, 2, ["--engine.kind=ddp"]),
    "distilled, fsdp2": ({}, 2, ["--engine.kind=fsdp2"]),
    "undistilled, zero2": ({"distilled": False}, 2, ["--engine.kind=deepspeed", "--engine.zero_stage=2"]),
    "distilled, zero3": ({}, 2, ["--engine.kind=deepspeed", "--engine.zero_stage=3"]),
}
STEPS = 5


class Scene:
    """One stage under one engine; its undisturbed run says how many moments there are to be killed at."""

    def __init__(self, name: str, config: Path) -> None:
        _, self.count, self._overrides = SCENES[name]
        self._config = config
        self._undisturbed: tuple[Path, int] | None = None

    def start(self, output: Path, kill_at: dict[int, int]) -> ranks.Ended:
        words = ["train", str(self._config), f"--output_dir={output}", *self._overrides]
        logs = output.with_name(output.name + "-logs")
        return ranks.Ranks(words, logs, ranks=self.count, kill_at=kill_at).wait()

    def undisturbed(self) -> tuple[Path, int]:
        if self._undisturbed is None:
            output = self._config.with_suffix("")
            ended = self.start(output, {0: 0})
            assert set(ended.codes) == {0}, ended.log
            found = re.search(r"kill points passed: (\d+)", ended.logs[0])
            assert found is not None
            self._undisturbed = output, int(found.group(1))
        return self._undisturbed


@pytest.fixture(scope="module")
def scene(
    tmp_path_factory: pytest.TempPathFactory, shapes_dir: Path, student_dir: Path, teacher_dir: Path
) -> Callable[[str], Scene]:
    made: dict[str, Scene] = {}

    def get(name: str) -> Scene:
        if name not in made:
            root = tmp_path_factory.mktemp("chaos")
            changes = {"engine": "auto", "max_steps": STEPS, "checkpoint": {"every": 2, "keep": 1}}
            parts = {"data": shapes_dir, "student": student_dir, "teacher": teacher_dir}
            made[name] = Scene(name, write_stage(root / "whole", **parts, **changes, **SCENES[name][0]))
        return made[name]

    return get


def kill(scene: Scene, output: Path, chance: random.Random) -> None:
    """Start, or go on, and be killed at a moment that `chance` draws."""
    victim = chance.randrange(scene.count)
    moment = chance.randint(1, scene.undisturbed()[1])
    ended = scene.start(output, {victim: moment})
    if ended.codes[victim] == -signal.SIGKILL:
        others = [code for rank, code in enumerate(ended.codes) if rank != victim]
        assert all(code in (0, 1) for code in others), ended.log  # 0: the victim died after the last exchange
        for rank, code in enumerate(ended.codes):
            assert code != 1 or "another rank is gone" in ended.logs[rank], ended.log
    else:  # a resumed run has fewer moments than a whole one
        assert set(ended.codes) == {0}, ended.log


def assert_ends_like_the_undisturbed(scene: Scene, output: Path) -> None:
    ended = scene.start(output, {})
    assert set(ended.codes) == {0}, ended.log
    whole, _ = scene.undisturbed()
    assert tree(output) == tree(whole), "something was lost, or an orphan left"
    expected = load_file(whole / "model" / "model.safetensors")
    for name, tensor in load_file(output / "model" / "model.safetensors").items():
        if scene.count == 1:
            assert torch.equal(tensor, expected[name]), name
        else:
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)
    logged = [[json.loads(line) for line in (d / "metrics.jsonl").open()] for d in (whole, output)]
    assert [line["step"] for line in logged[1]] == list(range(1, STEPS + 1))
    for a, b in zip(*logged, strict=True):
        assert b["loss"] == (a["loss"] if scene.count == 1 else pytest.approx(a["loss"], rel=1e-6))


def tree(output: Path) -> set[str]:
    return {str(path.relative_to(output)) for path in output.rglob("*")}


def test_three_kills_in_a_row_change_nothing(scene, tmp_path: Path) -> None:
    chance = random.Random(1)
    one = scene("projector, one rank")
    for _ in range(3):
        kill(one, tmp_path / "run", chance)
    assert_ends_like_the_undisturbed(one, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(25))
def test_a_kill_at_a_random_moment_changes_nothing(scene, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    one = scene(list(SCENES)[seed % len(SCENES)])
    kill(one, tmp_path / "run", chance)
    assert_ends_like_the_undisturbed(one, tmp_path / "run")


def test_a_run_goes_on_under_other_engines_and_other_numbers_of_ranks(scene, tmp_path: Path) -> None:
    """One rank, then FSDP2 on two, then ZeRO-3 on two, then one rank again."""
    pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")
    one = scene("distilled, one rank")
    output = tmp_path / "run"
    legs = (
        ("one", 1, ["--engine.kind=single"], 2),
        ("fsdp2", 2, ["--engine.kind=fsdp2"], 3),
        ("zero3", 2, ["--engine.kind=deepspeed", "--engine.zero_stage=3", "--micro_batch_size=1"], 4),
        ("one", 1, ["--engine.kind=auto"], None),
    )
    whole, _ = one.undisturbed()
    for name, count, overrides, stop_after in legs:
        words = ["train", str(whole.with_suffix(".yaml")), f"--output_dir={output}", "--checkpoint.every=1"]
        kwargs = {} if stop_after is None else {"environment": {"STOP_AFTER": str(stop_after)}}
        ended = ranks.Ranks([*words, *overrides], tmp_path / f"{name}-logs", ranks=count, **kwargs).wait()
        assert set(ended.codes) == {0}, ended.log
        if stop_after is not None:
            assert f"after step {stop_after};" in ended.logs[0]
    logged = [[json.loads(line) for line in (d / "metrics.jsonl").open()] for d in (whole, output)]
    for a, b in zip(*logged, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    expected = load_file(whole / "model" / "model.safetensors")
    for name, tensor in load_file(output / "model" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)
