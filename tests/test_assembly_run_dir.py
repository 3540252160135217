"""The directory of a run: finished and put away, or finished and made longer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import torch
from safetensors.torch import load_file

from llava_kd.cli import main

# For root a mode is no obstacle: a mount of its own is.
READ_ONLY = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'
TWICE = """
import sys
from llava_kd.cli import main
print(main(["train", sys.argv[1]]), main(["train", sys.argv[1], "--seed=1"]))
"""


def test_a_finished_run_on_a_read_only_disk_is_complete(stage) -> None:
    config = stage("run", distilled=False, max_steps=1)
    assert main(["train", str(config)]) == 0
    output = config.with_suffix("")
    left = output / "checkpoints" / ".step-00000000.retired"  # as a kill leaves it
    left.mkdir()
    command = [sys.executable, "-c", TWICE, str(config)]
    if os.geteuid() == 0:
        command = ["unshare", "-m", "sh", "-c", READ_ONLY, "sh", str(output), *command]
    else:
        output.chmod(0o555)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["0", "2"], done.stderr
    *_, complete, other = done.stderr.splitlines()
    assert complete.endswith(f"{output} is complete: nothing to do; the student is {output / 'model'}")
    assert "already contains another run: seed: 0 -> 1" in other
    assert left.is_dir()


def test_a_finished_run_goes_on_when_it_is_to_be_longer(stage, capsys) -> None:
    """It ends as a run that is stopped there and whose settings say the longer run from then on."""
    config = stage("run", distilled=False, max_steps=2)
    output = config.with_suffix("")
    assert main(["train", str(config)]) == 0
    short = json.loads((output / "run.json").read_text())
    capsys.readouterr()
    assert main(["train", str(config), "--max_steps=4"]) == 0
    said = capsys.readouterr().err
    assert "was finished at step 2 and is extended" in said
    assert "resuming from step 2" in said
    logged = [json.loads(line) for line in (output / "metrics.jsonl").open()]
    assert [line["step"] for line in logged] == [1, 2, 3, 4]
    assert json.loads((output / "run.json").read_text())["steps"] == 4
    assert json.loads((output / "run-step-00000002.json").read_text()) == short
    assert main(["train", str(config), "--max_steps=4"]) == 0
    assert "is complete: nothing to do" in capsys.readouterr().err

    other = stage("other", distilled=False, max_steps=4)
    assert main(["train", str(other)]) == 0
    rates = [json.loads(line)["lr"] for line in (other.with_suffix("") / "metrics.jsonl").open()]
    assert [line["lr"] for line in logged[2:]] == rates[2:]  # the schedule of four steps


def test_a_kill_while_a_run_is_made_longer_changes_nothing(stage) -> None:
    config = stage("run", distilled=False, max_steps=1)
    output = config.with_suffix("")
    assert main(["train", str(config)]) == 0
    shutil.copytree(output, output.with_name("killed"))
    assert main(["train", str(config), "--max_steps=2"]) == 0
    # Killed when the settings were written, and before run.json was put aside.
    killed = output.with_name("killed")
    text = (killed / "config.yaml").read_text()
    (killed / "config.yaml").write_text(text.replace("max_steps: 1\n", "max_steps: 2\n"))
    words = ["train", str(config), "--max_steps=2", f"--output_dir={killed}"]
    assert main(words) == 0
    one, other = (load_file(path / "model" / "model.safetensors") for path in (output, killed))
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())


def test_a_run_is_made_longer_from_its_last_checkpoint_alone(stage, capsys) -> None:
    config = stage("run", distilled=False, max_steps=2)
    output = config.with_suffix("")
    assert main(["train", str(config)]) == 0
    assert main(["train", str(config), "--max_steps=1"]) == 2
    assert "already contains another run: max_steps: 2 -> 1" in capsys.readouterr().err
    assert main(["train", str(config), "--max_steps=3", "--seed=1"]) == 2
    assert "already contains another run: seed: 0 -> 1" in capsys.readouterr().err
    shutil.rmtree(output / "checkpoints")
    assert main(["train", str(config), "--max_steps=3"]) == 2
    said = capsys.readouterr().err
    assert "the checkpoint of that step is missing" in said
    assert f"student.checkpoint={output / 'model'}" in said
    assert (output / "run.json").is_file()
    assert (output / "model" / "config.json").is_file()
