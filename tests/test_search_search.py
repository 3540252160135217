"""`llava-kd search` with trials that end at once, and to its end with real ones; runs entered by hand."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny_grids import FakeRuns, edit
from tiny_searches import SPACE, data_set, entry, write_records, write_search

from llava_kd.assembly.runs.slots import Slots
from llava_kd.assembly.searching.describing import data_set_in
from llava_kd.cli import main
from llava_kd.search.running.schedule import Job
from llava_kd.search.store.database import Store


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRuns:
    runs = FakeRuns().install(monkeypatch)
    runs.curve = lambda tree, step: score(tree)
    return runs


def score(tree: dict) -> float:
    """Best at a weight of 1."""
    return 1 - abs(tree["objective"]["response_kl"]["weight"] - 1)


def found(path: Path) -> dict:
    return json.loads((path.parent / "out" / "results.json").read_text())


def refusal(path: Path, capsys, *words: str) -> str:
    capsys.readouterr()
    assert main(["search", str(path), *words]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    return said


def test_a_search_spends_its_budget_and_says_what_it_found(tmp_path: Path, fake: FakeRuns, capsys) -> None:
    path = write_search(tmp_path)
    assert main(["search", str(path), "--jobs=1"]) == 0
    assert len(fake.trained) == 6
    results = found(path)
    best = max(results["trials"], key=lambda trial: trial["scores"]["slice/val"])
    assert results["best"] == best["number"] == results["trials"][0]["number"]
    assert [t["place"] for t in results["trials"]] == sorted(
        (t["place"] for t in results["trials"]), reverse=True
    )
    assert results["valid"] == {"ended": 6, "valid": 6}
    said = capsys.readouterr().out
    assert "[6 of 6]" in said
    assert f"the best is {best['number']:03d}" in said
    assert "llava-kd ablate" in said
    page = (path.parent / "out" / "results.md").read_text()
    assert page.count("\n| 00") == 6
    assert "`optim.lr`: 0.0001 to 0.1, log" in page


def test_a_trial_is_a_run_as_any_other(tmp_path: Path, fake: FakeRuns) -> None:
    path = write_search(tmp_path, budget={"trials": 1})
    assert main(["search", str(path), "--max_steps=20", "--jobs=1"]) == 0
    (tree,) = fake.trained
    assert tree["output_dir"] == str(tmp_path / "out/trials/000")
    assert tree["max_steps"] == 20
    assert tree == yaml.safe_load((tmp_path / "out/recipes/000.yaml").read_text())
    values = found(path)["trials"][0]["values"]
    assert tree["optim"]["lr"] == values["optim.lr"]
    assert tree["objective"]["response_kl"]["divergence"] == values["objective.response_kl.divergence"]


def test_every_trial_enters_the_store(tmp_path: Path, fake: FakeRuns) -> None:
    path = write_search(tmp_path)
    fake.broken = lambda tree: tree["output_dir"].endswith("003")
    assert main(["search", str(path), "--jobs=1"]) == 0
    store = Store(tmp_path / "store.sqlite")
    entries = {Path(one.name).name: one for one in store.entries()}
    assert sorted(entries) == [f"00{k}" for k in range(6)]
    assert "ended with status 2: the last words" in str(entries["003"].failure)
    assert entries["003"].scores == {}
    scores = {trial["number"]: trial["scores"] for trial in found(path)["trials"]}
    assert entries["001"].scores == scores[1]
    assert entries["001"].settings["optim.lr"] > 0
    assert entries["001"].settings["optim.max_grad_norm"] == 1.0, "defaults too"
    (data,) = store.data_sets().values()
    assert data.features["records"] == 4
    assert all(one.data == data.fingerprint for one in entries.values())


def test_a_trial_that_fails_is_said_and_the_search_goes_on(tmp_path: Path, fake: FakeRuns, capsys) -> None:
    path = write_search(tmp_path)
    fake.broken = lambda tree: tree["output_dir"].endswith(("000", "002"))
    assert main(["search", str(path), "--jobs=2"]) == 0
    assert found(path)["valid"] == {"ended": 6, "valid": 4}
    assert found(path)["trials"][-1]["state"] == "failed"
    said = capsys.readouterr().out
    assert "trial 002 failed: ended with status 2: the last words" in said
    assert "4 of 6 have a score" in said


def test_where_all_fail_it_gives_up(tmp_path: Path, fake: FakeRuns, capsys) -> None:
    path = write_search(tmp_path, budget={"trials": 50})
    fake.broken = lambda tree: True
    said = refusal(path, capsys, "--jobs=1")
    assert "all 5 trials failed. The first: ended with status 2: the last words" in said
    assert len(fake.trained) == 5


def test_a_trial_whose_settings_do_not_go_together_fails_without_a_run(
    tmp_path: Path, fake: FakeRuns, capsys
) -> None:
    """Each value fits the recipe; zero_stage 2 does not fit the engine single."""
    space = {"engine.zero_stage": [None, 2], "engine.kind": ["deepspeed", "single"]}
    path = write_search(tmp_path, space, budget={"trials": 4}, overrides={
        "evaluate": {"every": 5, "slices": {"val": {"data": "v.json"}}},
        "engine.kind": "deepspeed",
    })  # fmt: skip
    fake.curve = lambda tree, step: 0.5
    assert main(["search", str(path), "--jobs=1"]) == 0
    assert len(fake.trained) == 3
    (failed,) = [trial for trial in found(path)["trials"] if trial["state"] == "failed"]
    assert failed["failure"].startswith("refused: ")
    assert "only deepspeed has ZeRO stages" in failed["failure"]
    assert "4 trials" in capsys.readouterr().out


def test_a_search_goes_on_where_it_was(tmp_path: Path, fake: FakeRuns) -> None:
    whole = write_search(
        tmp_path, budget={"trials": 12}, output=str(tmp_path / "whole"), store=str(tmp_path / "w")
    )
    assert main(["search", str(whole), "--jobs=1"]) == 0
    fake.trained.clear()
    path = write_search(tmp_path, budget={"trials": 4})
    assert main(["search", str(path), "--jobs=1"]) == 0
    edit(path, lambda tree: tree.update(budget={"trials": 12}))
    assert main(["search", str(path), "--jobs=1"]) == 0
    assert len(fake.trained) == 12
    whole_record, record = (json.loads((tmp_path / o / "trials.json").read_text()) for o in ("whole", "out"))
    values = [[trial["values"] for trial in one["trials"]] for one in (whole_record, record)]
    assert values[0] == values[1], "as one that was not broken off"


def test_a_trial_that_was_broken_off_is_finished_first(tmp_path: Path, fake: FakeRuns) -> None:
    path = write_search(tmp_path, budget={"trials": 3})
    assert main(["search", str(path), "--jobs=1"]) == 0
    record = json.loads((tmp_path / "out/trials.json").read_text())
    record["trials"][1] |= {"state": "running", "scores": {}}
    (tmp_path / "out/trials.json").write_text(json.dumps(record))
    (tmp_path / "out/trials/001/run.json").unlink()
    fake.trained.clear()
    assert main(["search", str(path), "--jobs=1"]) == 0
    assert [tree["output_dir"][-3:] for tree in fake.trained] == ["001"]
    assert all(trial["state"] == "complete" for trial in found(path)["trials"])


def test_minutes_are_a_budget_too(tmp_path: Path, fake: FakeRuns) -> None:
    path = write_search(tmp_path, budget={"minutes": 0.01, "trials": 10_000})
    assert main(["search", str(path), "--jobs=1"]) == 0
    count = len(fake.trained)
    assert 1 <= count < 10_000
    assert main(["search", str(path), "--jobs=1"]) == 0
    assert len(fake.trained) == count, "spent is spent, in another call too"


def test_a_space_without_another_recipe_ends_the_search(tmp_path: Path, fake: FakeRuns) -> None:
    path = write_search(tmp_path, {"objective.response_kl.weight": [0.5, 1.0, 2.0]}, budget={"trials": 99})
    assert main(["search", str(path), "--jobs=1"]) == 0
    assert len(fake.trained) == 3


# What is refused ----


def test_another_space_is_refused_by_name(tmp_path: Path, fake: FakeRuns, capsys) -> None:
    path = write_search(tmp_path, budget={"trials": 2})
    assert main(["search", str(path), "--jobs=1"]) == 0
    count = len(fake.trained)
    edit(path, lambda tree: tree["space"].update({"optim.lr": {"from": 1e-3, "to": 0.1, "log": True}}))
    assert "contains another search: space: optim.lr 0.0001 to 0.1, log -> 0.001 to 0.1, log" in refusal(
        path, capsys
    )
    edit(path, lambda tree: tree["space"].update(SPACE) or tree["space"].update({"seed": [0, 1]}))
    assert "space: seed not there -> one of [0, 1]" in refusal(path, capsys)
    edit(path, lambda tree: tree["space"].pop("seed"))
    assert "recipe: max_steps 10 -> 20" in refusal(path, capsys, "--max_steps=20")
    edit(path, lambda tree: tree.update(seed=5))
    assert "seed 0 -> 5" in refusal(path, capsys)
    edit(path, lambda tree: tree.update(seed=0, prune=None, budget={"trials": 3}))
    assert main(["search", str(path), "--jobs=1"]) == 0, "its budget and its pruning may change"
    assert len(fake.trained) == count + 1


def test_an_unknown_setting_or_value_is_said_before_anything_is_trained(
    tmp_path: Path, fake: FakeRuns, capsys
) -> None:
    path = write_search(tmp_path, {"optim.lrr": {"from": 0.1, "to": 1.0}})
    said = refusal(path, capsys)
    assert "search.yaml: `space.optim.lrr` cannot be 0.1" in said
    assert "did you mean `lr`?" in said
    path = write_search(tmp_path, {"objective.response_kl.divergence": ["forward", "sideways"]})
    assert "`space.objective.response_kl.divergence` cannot be 'sideways'" in refusal(path, capsys)
    path = write_search(tmp_path, {"optim.lr": {"from": -1.0, "to": 1.0}})
    assert "`space.optim.lr` cannot be -1.0" in refusal(path, capsys)
    path = write_search(tmp_path, overrides={"evaluate": {"every": 0, "slices": {"val": {"data": "v.json"}}}})
    assert "evaluate.every" in refusal(path, capsys)
    assert fake.trained == []
    assert not (tmp_path / "out").exists()


def test_a_damaged_or_foreign_trials_file_is_refused(tmp_path: Path, fake: FakeRuns, capsys) -> None:
    path = write_search(tmp_path, budget={"trials": 1})
    assert main(["search", str(path), "--jobs=1"]) == 0
    file = tmp_path / "out/trials.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "version": 9}))
    assert "another version (format 9, this one reads 1)" in refusal(path, capsys)
    file.write_text("{")
    assert "trials.json is damaged" in refusal(path, capsys)


def test_a_store_that_cannot_be_used_is_said_first(tmp_path: Path, fake: FakeRuns, capsys) -> None:
    path = write_search(tmp_path)
    (tmp_path / "store.sqlite").write_text("no database, but longer than the head of one " * 9)
    assert "is not a store" in refusal(path, capsys)
    assert fake.trained == []


def test_a_store_that_is_held_for_a_while_gets_all_trials_in_the_end(
    tmp_path: Path, fake: FakeRuns, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sqlite3

    monkeypatch.setattr("llava_kd.search.store.database.PATIENCE_S", 0.05)
    monkeypatch.setattr(Store.__init__, "__kwdefaults__", {"patience_s": 0.05})
    path = write_search(tmp_path, budget={"trials": 3})
    Store(tmp_path / "store.sqlite").prepare()
    holder = sqlite3.connect(tmp_path / "store.sqlite", isolation_level=None)

    def hold(tree: dict) -> bool:
        if tree["output_dir"].endswith("000"):
            holder.execute("BEGIN EXCLUSIVE")
        if tree["output_dir"].endswith("002"):
            holder.execute("ROLLBACK")
        return False

    fake.broken = hold
    assert main(["search", str(path), "--jobs=1"]) == 0
    assert "not added to the store yet" in capsys.readouterr().out
    assert len(Store(tmp_path / "store.sqlite").entries()) == 3


def test_without_optuna_one_line_says_how_to_install_it(tmp_path: Path) -> None:
    path = write_search(tmp_path)
    code = (
        "import sys; sys.modules['optuna'] = None\n"
        "from llava_kd.cli import main\n"
        f"status = main(['search', {str(path)!r}])\n"
        "print(status, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "2 False\n"
    needs = "a search needs the package optuna: pip install 'llava_kd[search]'"
    assert done.stderr == f"llava-kd search: {needs}\n"


# From similar runs ----


def test_a_search_begins_from_the_best_of_similar_runs(tmp_path: Path, fake: FakeRuns, capsys) -> None:
    path = write_search(tmp_path, budget={"trials": 2})
    own = data_set_in(str(tmp_path / "instructions.json"), None)
    runs = [
        entry(
            str(k),
            "theirs",
            settings={
                "optim.lr": 0.01,
                "objective.response_kl.weight": k / 10,
                "objective.response_kl.divergence": "jsd",
            },
            scores={"slice/other": k / 10},
        )
        for k in range(12)
    ]
    Store(tmp_path / "store.sqlite").add(runs, [data_set("theirs", **own.features)])
    assert main(["search", str(path), "--jobs=1"]) == 0
    assert "starts from 12 runs of the store, on data theirs" in capsys.readouterr().out
    first, second = sorted(found(path)["trials"], key=lambda trial: trial["number"])
    assert first["origin"] == "similar run"
    assert first["values"]["objective.response_kl.weight"] == 1.1
    assert second["origin"] == "TPE", "similar runs count as trials that were seen"
    assert "Started from runs of the store" in (tmp_path / "out/results.md").read_text()
    edit(path, lambda tree: tree.update(budget={"trials": 3}))
    assert main(["search", str(path), "--jobs=1"]) == 0
    assert "starts from 12 runs" in capsys.readouterr().out, (
        "its own trials are in the store, and are not among them"
    )


# Runs by hand ----


def write_run(folder: Path, name: str, data: Path) -> Path:
    write_search(folder)
    tree = yaml.safe_load((folder / "taught.yaml").read_text())
    tree["data"]["path"] = str(data)
    run = folder / name
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump({**tree, "output_dir": str(run)}))
    (run / "metrics.jsonl").write_text('{"step": 10, "seconds_per_step": 1.0, "slice/val": 0.5}\n')
    return run


def test_runs_are_entered_by_hand(tmp_path: Path, capsys) -> None:
    data = write_records(tmp_path / "d.json", ["yes", "no"])
    one, two = (write_run(tmp_path, name, data) for name in ("one", "two"))
    (one / "run.json").write_text('{"steps": 10}')
    store = tmp_path / "s"
    assert main(["search", "add", str(one), str(two), f"--store={store}"]) == 0
    said = capsys.readouterr().out
    assert "one: slice/val 0.5" in said
    assert "two: not finished, after step 10" in said
    assert "2 runs are now in" in said
    assert {e.name: e.failure is None for e in Store(store).entries()} == {"one": True, "two": False}
    data.unlink()
    assert main(["search", "add", str(one), f"--store={store}"]) == 0
    assert "one: slice/val 0.5; its data cannot be read" in capsys.readouterr().out


def test_what_is_no_run_or_still_runs_is_not_entered(tmp_path: Path, capsys) -> None:
    run = write_run(tmp_path, "one", tmp_path / "instructions.json")
    store = tmp_path / "s"
    with (run / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert main(["search", "add", str(run), f"--store={store}"]) == 2
    assert "is still running, so nothing was added" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["search", "add", str(tmp_path / "empty"), f"--store={store}"]) == 2
    assert "is no run and holds none" in capsys.readouterr().err
    assert main(["search", "add"]) == 2
    assert "needs at least one run" in capsys.readouterr().err
    assert main(["search", "add", str(run), "--jobs=2"]) == 2
    assert "takes only runs and --store" in capsys.readouterr().err
    assert main(["search", "none.yaml"]) == 2
    assert "no search file none.yaml" in capsys.readouterr().err
    assert main(["search", "a.yaml", "b.yaml"]) == 2
    assert "`search` takes one search file" in capsys.readouterr().err


# With processes of their own ----

# A trial that writes a score every moment: 0.9 for the first five, 0.1 for the others, which save when asked.
TRIAL = """#!/bin/bash
out=$(sed -n 's/^output_dir: //p' "$2")
mkdir -p "$out"
number=$(basename "$out")
trap 'echo "$number" >> FOLDER/saved; exit 0' TERM
value=0.9; [ "$number" -ge 5 ] && value=0.1
for step in $(seq 1 5); do
  echo "{\\"step\\": $step, \\"seconds_per_step\\": 1.0, \\"slice/val\\": $value}" >> "$out/metrics.jsonl"
done
echo "$number" >> FOLDER/began
if [ "$number" -lt LAST ]; then echo '{"steps": 5}' > "$out/run.json"; exit 0; fi
while :; do sleep 0.05; done
"""
COMMAND = """
import sys
import llava_kd.assembly.searching.search as module
module.CLI = ("bash", sys.argv[2])
from llava_kd.cli import main
raise SystemExit(main(["search", sys.argv[1], "--jobs=1"]))
"""


def started(path: Path, last: int) -> subprocess.Popen[str]:
    script = path.parent / "trial.sh"
    script.write_text(TRIAL.replace("FOLDER", str(path.parent)).replace("LAST", str(last)))
    words = [sys.executable, "-c", COMMAND, str(path), str(script)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(path: Path, process: subprocess.Popen[str], name: str) -> None:
    deadline = time.monotonic() + 240
    marks = path.parent / "began"
    while not marks.is_file() or name not in marks.read_text().split():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_trial_below_the_median_is_asked_to_save_and_end(tmp_path: Path) -> None:
    path = write_search(tmp_path, budget={"trials": 7}, prune={"trials": 5})
    process = started(path, 5)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    assert "005 (random; " in said
    assert "stopped below the median at step 5, slice/val 10.0 %" in said
    assert (tmp_path / "saved").read_text().split() == ["005", "006"]
    states = [trial["state"] for trial in found(path)["trials"]]
    assert states == ["complete"] * 5 + ["pruned"] * 2
    assert found(path)["valid"] == {"ended": 7, "valid": 7}
    stored = [one for one in Store(tmp_path / "store.sqlite").entries() if one.failure]
    assert [one.failure for one in stored] == ["stopped below the median"] * 2


def test_a_killed_search_keeps_what_it_had_and_goes_on(tmp_path: Path, fake: FakeRuns) -> None:
    path = write_search(tmp_path, budget={"trials": 4}, prune=None)
    process = started(path, 2)
    wait_for(path, process, "002")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(Store(tmp_path / "store.sqlite").entries()) == 2
    assert main(["search", str(path), "--jobs=1"]) == 0
    assert [tree["output_dir"][-3:] for tree in fake.trained] == ["002", "003"]
    assert len(Store(tmp_path / "store.sqlite").entries()) == 4


def test_a_signal_lets_trials_save_and_the_same_command_goes_on(tmp_path: Path) -> None:
    path = write_search(tmp_path, budget={"trials": 4}, prune=None)
    process = started(path, 1)
    wait_for(path, process, "001")
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "stopped by SIGTERM; run the same command again to continue" in said
    assert (tmp_path / "saved").read_text().split() == ["001"]
    record = json.loads((tmp_path / "out/trials.json").read_text())
    assert [trial["state"] for trial in record["trials"]] == ["complete", "running"]


# To its end, with real students ----


def test_three_real_trials_to_the_table_and_the_store(
    stage, shapes_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """In this process: starting Python anew for every trial would take the time of all of them."""
    stage("taught", max_steps=2)
    loss = {"held": {"path": str(shapes_dir / "validation.json"), "images": str(shapes_dir), "exchanged": 0}}
    path = tmp_path / "search.yaml"
    tree = {
        "recipe": "taught.yaml",
        "overrides": {"evaluate": {"every": 1, "losses": loss}},
        "space": {
            "optim.lr": {"from": "1e-4", "to": "1e-2", "log": True},
            "objective.response_kl.weight": {"from": 0.0, "to": 2.0},
        },
        "score": "loss/held",
        "budget": {"trials": 3},
        "store": str(tmp_path / "store.sqlite"),
        "output": str(tmp_path / "out"),
    }
    path.write_text(yaml.safe_dump(tree))

    def start(slots: Slots, job: Job, slot: int) -> int:
        return main(list(job.command[3:]))

    monkeypatch.setattr(Slots, "start", start)
    monkeypatch.setattr(Slots, "ended", lambda slots, status: status)
    assert main(["search", str(path), "--jobs=1"]) == 0
    results = found(path)
    losses = [trial["scores"]["loss/held"] for trial in results["trials"]]
    assert losses == sorted(losses), "of a loss the lowest is the best"
    assert len(set(losses)) == 3
    capsys.readouterr()
    assert main(["train", str(tmp_path / "out/recipes/000.yaml")]) == 0, "a trial is a run as any other"
    assert "is complete: nothing to do" in capsys.readouterr().err
    entries = Store(tmp_path / "store.sqlite").entries()
    assert sorted(one.scores["loss/held"] for one in entries) == losses
    (data,) = Store(tmp_path / "store.sqlite").data_sets().values()
    assert data.features["picture side"] > 0
    assert main(["search", "add", str(tmp_path / "out/trials"), f"--store={tmp_path / 'store.sqlite'}"]) == 0
    assert len(Store(tmp_path / "store.sqlite").entries()) == 3, "the trials are those that are there"
    assert os.path.isdir(tmp_path / "out/trials/000/model")
