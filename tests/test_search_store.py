"""The store of runs: what it keeps, what it refuses, what a kill leaves; likeness of data, places of runs."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_searches import data_set, entry

from llava_kd.search.store import database
from llava_kd.search.store.database import Store, StoreError
from llava_kd.search.store.entries import key_of
from llava_kd.search.store.features import Seen, describe, distance, question_type, similarity
from llava_kd.search.store.reading import read_entry
from llava_kd.search.store.standing import places, standings


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "deep" / "store.sqlite", patience_s=0.2)


def test_what_is_entered_comes_back(store: Store) -> None:
    one = entry(
        "1",
        settings={"optim.lr": 0.1, "teacher": None, "optim.betas": [0.9, 0.99]},
        scores={"slice/val": 0.5},
        steps=10,
        seconds=2.5,
        failure="it \u2028 broke",
    )
    store.add([one], [data_set("a")])
    assert store.entries() == [one]
    assert store.data_sets() == {"a": data_set("a")}


def test_a_run_that_is_entered_again_is_replaced(store: Store) -> None:
    store.add([entry("1", failure="not finished"), entry("2")])
    store.add([entry("1", scores={"slice/val": 0.5})])
    assert {one.key: one.failure for one in store.entries()} == {"1": None, "2": None}


def test_the_key_is_of_the_place_and_the_settings(tmp_path: Path, monkeypatch) -> None:
    tree = {"seed": 0, "optim": {"lr": 0.1}, "output_dir": "x", "log": {"every": 1}}
    monkeypatch.chdir(tmp_path)
    assert key_of(Path("run"), tree) == key_of(tmp_path / "run", {**tree, "log": {"every": 2}})
    assert key_of(Path("run"), tree) != key_of(Path("run"), {**tree, "seed": 1})
    assert key_of(Path("run"), tree) != key_of(Path("other"), tree)


# What is refused ----


def test_a_store_that_is_not_there_is_said(store: Store) -> None:
    with pytest.raises(StoreError, match="there is no store"):
        store.entries()
    assert not store.path.exists()


def test_a_store_of_another_version_is_refused_and_left_alone(store: Store) -> None:
    store.add([entry("1")])
    with sqlite3.connect(store.path) as connection:
        connection.execute("PRAGMA user_version = 2")
    before = store.path.read_bytes()
    for use in (store.entries, store.prepare, lambda: store.add([entry("2")])):
        with pytest.raises(StoreError, match=r"another version \(format 2, this one reads 1\)"):
            use()
    assert store.path.read_bytes() == before


def test_what_is_no_store_is_refused_and_left_alone(store: Store) -> None:
    store.path.parent.mkdir()
    store.path.write_text("a page of words, longer than the head of a database " * 9)
    for use in (store.entries, store.prepare):
        with pytest.raises(StoreError, match="is not a store"):
            use()
    store.path.unlink()
    with sqlite3.connect(store.path) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    for use in (store.entries, store.prepare):
        with pytest.raises(StoreError, match="another program"):
            use()
    store.path.write_bytes(b"")
    with pytest.raises(StoreError, match="is empty"):
        store.entries()


def test_a_folder_in_its_place_is_said(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    with pytest.raises(StoreError, match="cannot be used"):
        Store(tmp_path / "store").prepare()
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be created"):
        Store(tmp_path / "file" / "store").prepare()


def test_a_damaged_store_is_said(store: Store) -> None:
    store.add([entry(str(k), name="x" * 500) for k in range(100)])
    content = bytearray(store.path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    store.path.write_bytes(content)
    with pytest.raises(StoreError, match="cannot be used"):
        store.entries()


def test_a_store_that_another_process_holds_is_said_soon(store: Store) -> None:
    store.add([entry("1")])
    holder = sqlite3.connect(store.path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    since = time.monotonic()
    for use in (store.entries, store.prepare, lambda: store.add([entry("2")])):
        with pytest.raises(StoreError, match=r"locked by another process \(waited 0.2 s\)") as caught:
            use()
        assert "\n" not in str(caught.value)
    assert time.monotonic() - since < 5.0
    holder.execute("ROLLBACK")
    holder.close()
    store.add([entry("2")])
    assert len(store.entries()) == 2


def _writes(path: str) -> None:
    store = Store(path)
    for k in range(20):
        store.add([entry(f"{os.getpid()} {k}")])


def test_two_processes_write_at_once(store: Store) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_writes, args=(str(store.path),)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert len(store.entries()) == 40


# Pairs of runs, each pair in one transaction; what was written is told.
WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
from tiny_searches import entry
from llava_kd.search.store.database import Store
store = Store(sys.argv[1])
for k in range(10**6):
    store.add([entry(f"{k} first", name="x" * 20000), entry(f"{k} second")])
    print(k, flush=True)
"""


@pytest.mark.parametrize("moment", range(4))
def test_a_kill_leaves_whole_transactions(store: Store, moment: int) -> None:
    words = [sys.executable, "-c", WRITER, str(store.path), str(Path(__file__).parent)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    time.sleep(0.013 * moment)
    process.send_signal(signal.SIGKILL)
    told = 3 + len(process.stdout.read().split())
    process.wait()
    keys = {one.key for one in Store(store.path).entries()}
    assert len(keys) in (2 * told, 2 * told + 2), "all that was told, and at most one pair more"
    assert all(f"{key.split()[0]} second" in keys for key in keys)
    store.add([entry("after")])
    assert len(store.entries()) == len(keys) + 1


def test_a_write_that_fails_leaves_nothing_of_itself(store: Store) -> None:
    store.add([entry("1")])
    with pytest.raises(StoreError):
        store.add([entry("2")], [data_set("a"), data_set(None)])  # type: ignore[arg-type]
    assert [one.key for one in store.entries()] == ["1"]


def test_the_store_needs_no_torch() -> None:
    code = (
        "import sys; import llava_kd.search.store.database, llava_kd.search.store.reading, "
        "llava_kd.search.recommending.words, llava_kd.search.proposing.space; "
        "print({'torch', 'transformers', 'optuna'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_patience_is_short() -> None:
    assert database.PATIENCE_S <= 5


# A run directory ----


def write_run(directory: Path, *, is_complete: bool = True) -> dict:
    directory.mkdir(parents=True)
    lines = [
        {"step": 5, "seconds_per_step": 1.0, "slice/val": 0.25, "loss/held": 2.0},
        {"step": 10, "seconds_per_step": 2.0, "slice/val": 0.5, "slice/seconds": 3.0},
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if is_complete:
        (directory / "run.json").write_text(json.dumps({"steps": 10}))
    return {"seed": 3, "optim": {"lr": 0.1}, "output_dir": str(directory), "micro_batch_size": 2}


def test_a_finished_run_has_its_last_scores(tmp_path: Path) -> None:
    tree = write_run(tmp_path / "run")
    (tmp_path / "run/eval/test").mkdir(parents=True)
    (tmp_path / "run/eval/test/summary.json").write_text(
        json.dumps({"accuracy": 0.75, "by_type": {}, "count": 4})
    )
    (tmp_path / "run/eval/gqa").mkdir()
    (tmp_path / "run/eval/gqa/summary.json").write_text(json.dumps({"benchmark": "gqa", "value": 50.0}))
    found = read_entry(tmp_path / "run", tree, name="run", data="a")
    assert found.failure is None
    assert found.scores == {"slice/val": 0.5, "loss/held": 2.0, "eval/eval/test": 0.75}
    assert (found.steps, found.seconds) == (10, 15.0)
    assert found.settings == {"seed": 3, "optim.lr": 0.1}


def test_a_run_that_broke_off_says_where_and_why(tmp_path: Path) -> None:
    tree = write_run(tmp_path / "run", is_complete=False)
    (tmp_path / "run/logs").mkdir()
    (tmp_path / "run/logs/rank00000.log").write_text("begins\nloss is NaN\n")
    found = read_entry(tmp_path / "run", tree, name="run", data="a")
    assert found.failure == "not finished, after step 10: loss is NaN"
    given = read_entry(tmp_path / "run", tree, name="run", data="a", failure="killed")
    assert given.failure == "killed"
    (tmp_path / "run/metrics.jsonl").unlink()
    assert "before its first step" in str(read_entry(tmp_path / "run", tree, name="r", data=None).failure)


# Features ----


def test_features_by_hand() -> None:
    records = [
        Seen(talk=[("<image>\nIs it red?", "Yes."), ("How many are there?", "12")], num_pictures=1),
        Seen(talk=[("Describe it in words", "a red car")], num_pictures=0),
        Seen(talk=[("What is it?", "yes")], num_pictures=1),
    ]
    found = describe(records, [(30, 10), (20, 20), (40, 10)])
    assert found["records"] == 3
    assert found["answers a record"] == pytest.approx(4 / 3)
    assert found["pictures a record"] == pytest.approx(2 / 3)
    assert found["words an answer"] == pytest.approx(6 / 4)
    assert found["answers of one word"] == 0.75
    assert found["distinct answers"] == 0.75
    assert found["yes or no"] == 0.5
    assert found["numbers"] == 0.25
    assert found["picture side"] == pytest.approx(20.0)
    assert found["longer side by shorter"] == 3.0
    kinds = {name: value for name, value in found.items() if name.startswith("asks: ") and value}
    assert kinds == dict.fromkeys(("asks: yes or no", "asks: how many", "asks: request", "asks: what"), 0.25)


def test_data_without_an_answer_have_no_features() -> None:
    with pytest.raises(ValueError, match="must contain answers"):
        describe([Seen(talk=[], num_pictures=1)], [])


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("<image>", "other"),
        ("How MANY dogs?", "how many"),
        ("How?", "other"),
        ("how is it", "how"),
        ("Is it?", "yes or no"),
        ("Please", "other"),
    ],
)
def test_types_of_questions(question: str, kind: str) -> None:
    assert question_type(question) == kind


def test_the_same_data_are_alike_and_others_less() -> None:
    one = data_set("a").features
    assert distance(one, one) == 0.0
    assert similarity(one, one) == 1.0
    near, far = {**one, "words an answer": 2.0}, {**one, "words an answer": 80.0, "asks: what": 0.0}
    assert 0 < distance(one, near) == distance(near, one) < distance(one, far) <= 1
    assert similarity(one, near) > similarity(one, far)


# Places ----


def test_places_are_of_the_order_alone() -> None:
    assert places([1.0, 100.0, 2.0, 2.0]) == [0.125, 0.875, 0.5, 0.5]
    assert places([7.0]) == [0.5]


def test_no_figure_counts_more_for_its_scale() -> None:
    """One run is better by far on a figure of a large scale, the other by little on two of small ones."""
    one = entry("1", scores={"eval/large": 1400.0, "slice/a": 0.50, "slice/b": 0.50})
    two = entry("2", scores={"eval/large": 100.0, "slice/a": 0.51, "slice/b": 0.51})
    found = standings([one, two])
    assert found["2"] > found["1"]
    assert found["1"] == pytest.approx((0.75 + 0.25 + 0.25) / 3)


def test_of_a_loss_less_is_better() -> None:
    found = standings([entry("1", scores={"loss/v": 2.0}), entry("2", scores={"loss/v": 3.0})])
    assert found["1"] > found["2"]


def test_runs_are_placed_among_those_on_the_same_data() -> None:
    runs = [
        entry("1", "a", scores={"slice/v": 0.9}),
        entry("2", "a", scores={"slice/v": 0.8}),
        entry("3", "b", scores={"slice/v": 0.2}),
        entry("4", "b", scores={"slice/v": 0.1}),
    ]
    assert standings(runs) == {"1": 0.75, "2": 0.25, "3": 0.75, "4": 0.25}


def test_what_cannot_be_compared_has_no_place() -> None:
    runs = [
        entry("alone", "a", scores={"slice/v": 0.9}),
        entry("failed", "b", scores={"slice/v": 0.9}, failure="x"),
        entry("1", "b", scores={"slice/v": 0.8}),
        entry("unread", None, scores={"slice/v": 0.8}),  # type: ignore[arg-type]
    ]
    assert standings(runs) == {}
