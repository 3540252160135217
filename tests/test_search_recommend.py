"""`llava-kd recommend`: recipes for new data, the evidence for them, and what is too little of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tiny_searches import data_set, entry, write_records

from llava_kd.assembly.searching.describing import data_set_in
from llava_kd.cli import main
from llava_kd.search.recommending.ranking import recommend
from llava_kd.search.recommending.words import words
from llava_kd.search.store.database import Store
from llava_kd.search.store.entries import Entry

RATES = [10 ** (-4 + 3 * k / 11) for k in range(12)]


def history(data: str, best: float, scale: float = 1.0, score: str = "slice/v") -> list[Entry]:
    """Twelve runs, the better the nearer their rate is to `best`; paths and seeds are each run's own."""
    return [
        entry(
            f"{data} {k}",
            data,
            settings={"optim.lr": rate, "seed": k, "data.path": f"{data}{k}", "max_steps": 10},
            scores={score: scale * -abs(math.log10(rate / best))},
            seconds=3.0,
        )
        for k, rate in enumerate(RATES)
    ]


def test_the_recipe_that_was_best_on_similar_data_comes_first() -> None:
    sets = {"a": data_set("a"), "b": data_set("b", **{"words an answer": 60.0, "asks: what": 0.0})}
    runs = [*history("a", 1e-3), *history("b", 1e-1)]
    found = recommend(runs, sets, data_set("new").features)
    assert found.alike["data a"] == 1.0 > found.alike["data b"]
    best = found.advice[0]
    assert set(best.settings) == {"optim.lr"}, "paths and seeds are no recipe, nor what all runs share"
    assert abs(math.log10(float(str(best.settings["optim.lr"])) / 1e-3)) < 0.3
    assert best.evidence[0].data == "data a"
    assert best.evidence[0].near == 1.0
    assert best.seconds == 3.0
    other = recommend(runs, sets, sets["b"].features).advice[0]
    assert float(str(other.settings["optim.lr"])) > 1e-2


def test_no_scale_dominates() -> None:
    """The same order on scores a thousand times larger gives the same places, and so the same advice."""
    sets = {"a": data_set("a"), "b": data_set("b")}
    small = recommend([*history("a", 1e-3), *history("b", 1e-2)], sets, data_set("n").features)
    large = recommend([*history("a", 1e-3, scale=1000), *history("b", 1e-2)], sets, data_set("n").features)
    assert [one.place for one in small.advice] == [one.place for one in large.advice]


def test_places_of_a_loss_are_turned_round() -> None:
    sets = {"a": data_set("a"), "b": data_set("b")}
    runs = [*history("a", 1e-3, -1.0, "loss/v"), *history("b", 1e-3, -1.0, "loss/v")]
    best = recommend(runs, sets, data_set("n").features).advice[0]
    assert abs(math.log10(float(str(best.settings["optim.lr"])) / 1e-3)) < 0.3


def test_leaving_each_data_set_out_says_how_good_the_advice_is() -> None:
    sets = {name: data_set(name) for name in "ab"}
    alike = recommend([*history("a", 1e-3), *history("b", 1e-3)], sets, data_set("n").features).check
    against = recommend([*history("a", 1e-4), *history("b", 1e-1)], sets, data_set("n").features).check
    assert alike.keys() == {"data a", "data b"}
    assert min(alike.values()) > 0.9
    assert max(against.values()) < -0.9


def test_a_single_run_proves_little() -> None:
    sets = {"a": data_set("a"), "b": data_set("b")}
    settings = {**history("a", 1.0)[0].settings, "optim.lr": 1.0}
    lone = entry("lone", "a", settings=settings, scores={"slice/v": 9.0})
    found = recommend([*history("a", 1e-3), *history("b", 1e-3), lone], sets, data_set("n").features)
    by_rate = {float(str(one.settings["optim.lr"])): one for one in found.advice}
    assert by_rate[1.0].weight < found.advice[0].weight
    assert by_rate[1.0].place < 0.8, "its own place is the highest, 0.96"
    assert by_rate[1.0].place < found.advice[0].place


def test_failed_runs_are_counted_and_give_no_evidence() -> None:
    sets = {"a": data_set("a"), "b": data_set("b")}
    broken = entry("x", "a", settings={"optim.lr": 1e-3}, scores={"slice/v": 9.0}, failure="it broke")
    found = recommend([*history("a", 1e-3), *history("b", 1e-3), broken], sets, data_set("n").features)
    assert (found.num_runs, found.num_failed) == (24, 1)
    assert all(proof.run != "run x" for one in found.advice for proof in one.evidence)


def test_too_small_a_store_is_said() -> None:
    few = "12 runs with scores that can be compared, on 1 datasets"
    with pytest.raises(ValueError, match=few):
        recommend(history("a", 1e-3), {"a": data_set("a")}, data_set("n").features)
    with pytest.raises(ValueError, match=r"0 runs .* on 0 datasets"):
        recommend([], {}, data_set("n").features)


def test_data_that_look_like_nothing_there_are_said() -> None:
    sets = {"a": data_set("a"), "b": data_set("b")}
    far = data_set("n", **{"words an answer": 900.0, "records": 9e9, "asks: what": 0.0}).features
    with pytest.raises(ValueError, match=r"the nearest is data a, with similarity 0\.0"):
        recommend([*history("a", 1e-3), *history("b", 1e-3)], sets, far)


def test_runs_that_differ_in_nothing_recommend_nothing() -> None:
    runs = [
        entry(f"{d} {k}", d, settings={"optim.lr": 0.1, "seed": k}, scores={"slice/v": k / 20})
        for d in "ab"
        for k in range(12)
    ]
    with pytest.raises(ValueError, match="have the same settings"):
        recommend(runs, {d: data_set(d) for d in "ab"}, data_set("n").features)


def test_a_recipe_is_written_as_train_takes_it() -> None:
    shown = words({"optim.lr": 0.001, "teacher": None, "divergence": "jsd", "x": {"a": 1}})
    assert shown == "--optim.lr=0.001 --teacher=null --divergence=jsd --x='{a: 1}'"


def test_the_command(tmp_path: Path, capsys) -> None:
    data = write_records(tmp_path / "new.json", ["red", "blue"] * 20)
    features = data_set_in(str(data), None).features
    store = tmp_path / "store.sqlite"
    runs = [*history("a", 1e-3), *history("b", 1e-3)]
    Store(store).add(runs, [data_set("a", **features), data_set("b", **{**features, "records": 900.0})])
    words = ["recommend", str(data), f"--store={store}", "--top=2", f"--out={tmp_path / 'found.json'}"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "from 24 runs with scores (0 more failed); datasets by similarity: data a 1.00, data b 0." in said
    assert "1. expected rank 0." in said
    assert "--optim.lr=0.00" in said
    assert "3. " not in said
    assert "and 10 more recipes (--top)" in said
    assert "rank correlation" in said
    record = json.loads((tmp_path / "found.json").read_text())
    assert len(record["advice"]) == 12
    assert record["features"]["records"] == 40


def test_the_command_refuses_in_one_line(tmp_path: Path, capsys) -> None:
    data = write_records(tmp_path / "new.json", ["red"])

    def said(*words: str) -> str:
        assert main(["recommend", *words]) == 2
        text = capsys.readouterr().err
        assert len(text.splitlines()) == 1
        return text

    store = tmp_path / "s"
    assert f"there is no store {store}" in said(str(data), f"--store={store}")
    Store(store).add(history("a", 1e-3), [data_set("a")])
    assert "the store is too small to recommend from" in said(str(data), f"--store={store}")
    assert "no data file" in said(str(tmp_path / "none.json"), f"--store={store}")
