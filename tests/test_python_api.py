"""The functions that the package offers: the page and the notebook run, and say what the commands say."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import llava_kd
from llava_kd import api
from llava_kd.cli import main

ROOT = Path(__file__).parents[1]


@pytest.fixture
def commands(monkeypatch) -> None:
    """`llava-kd` of this environment, from the folder that the recipes' paths are of."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


def test_the_package_is_light_until_a_name_is_used() -> None:
    heavy = (
        "import sys, llava_kd; llava_kd.load; print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["False", "False"]
    assert set(llava_kd.__all__) - {"__version__"} == set(api.NAMES)
    assert all(callable(getattr(llava_kd, name)) for name in api.NAMES)
    with pytest.raises(AttributeError, match="no attribute 'tarin'"):
        llava_kd.tarin  # noqa: B018


def test_the_page_runs(commands, tmp_path: Path, capsys) -> None:
    text = (ROOT / "docs/python.md").read_text().replace("runs/python", str(tmp_path))
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)
    text = "\n".join(blocks).replace('"max_steps": 20', '"max_steps": 2')
    exec(compile(text, "docs/python.md", "exec"), {})
    said = capsys.readouterr().out
    assert "0.003 1.0" in said
    assert (tmp_path / "eval/summary.json").is_file()
    assert "Training report" in (tmp_path / "report.html").read_text()


def test_the_notebook_runs(commands, tmp_path: Path) -> None:
    cells = json.loads((ROOT / "examples/quickstart.ipynb").read_text())["cells"]
    assert all(not cell.get("outputs") for cell in cells)
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    short = (
        text.replace('"runs/notebook"', repr(str(tmp_path))).replace("= 400", "= 40").replace("= 60", "= 2")
    )
    names: dict[str, object] = {}
    exec(compile(short, "quickstart.ipynb", "exec"), names)
    assert len(names["student"].metrics()) == 2  # type: ignore[attr-defined]
    assert names["summary"]["count"] == 10  # type: ignore[index]


def test_settings_are_what_the_command_reads(stage) -> None:
    config = stage("run")
    changes = {
        "optim.lr": 1e-5,
        "data.template": "vicuna",
        "student.lora": {"rank": 4},
        "log.progress": False,
    }
    words = ["--optim.lr=1e-5", "--data.template=vicuna", "--student.lora={rank: 4}", "--log.progress=false"]
    from llava_kd.assembly.settings import load

    assert llava_kd.load(config, changes) == load(config, words)
    assert llava_kd.load(config, {"teacher.cache": None}) == load(config)
    with pytest.raises(ValueError, match="learning_rate"):
        llava_kd.load(config, {"optim.learning_rate": 1})


def test_a_stage_that_is_interrupted_goes_on_with_the_same_call(stage) -> None:
    settings = llava_kd.load(stage("run", max_steps=80, log={"every": 1, "progress": False}))
    metrics = Path(settings.output_dir) / "metrics.jsonl"

    def interrupt() -> None:
        while not (metrics.is_file() and metrics.read_text().count("\n") > 2):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    run = llava_kd.train(settings)
    assert run.stopped == "SIGINT"
    with pytest.raises(FileNotFoundError, match="call train with the same settings to go on"):
        run.model  # noqa: B018
    reached = int(run.metrics()[-1]["step"])
    assert 2 < reached < 80
    with metrics.open("a") as file:
        file.write('{"step": 4')  # the run is writing
    assert int(run.metrics()[-1]["step"]) == reached
    shorter = llava_kd.load(Path(settings.output_dir).with_suffix(".yaml"), {"log.progress": False})
    assert shorter.max_steps == 80
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert llava_kd.train(settings).stopped is None
    assert [int(line["step"]) for line in run.metrics()] == list(range(1, 81))
    assert run.model.is_dir()


def test_a_chat_says_what_the_command_says(stage, shapes_dir: Path, capsys, monkeypatch) -> None:
    config = stage("run", max_steps=1)
    assert main(["train", str(config)]) == 0
    model = config.with_suffix("") / "model"
    image = next((shapes_dir / "images").iterdir())
    capsys.readouterr()
    words = [f"--model={model}", f"--image={image}", "--max_new_tokens=6", "Which color?"]
    assert main(["chat", *words]) == 0
    chat = llava_kd.Chat(model, image, max_new_tokens=6)
    assert chat.ask("Which color?") == capsys.readouterr().out.strip()
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"]
    with pytest.raises(ValueError, match="cannot read the image"):
        llava_kd.Chat(model, [shapes_dir / "none.png"])
