"""What a search file may hold, what is proposed, what is stopped, and jobs that come one by one."""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tiny_searches import SPACE, data_set, entry, write_search

from llava_kd.search.proposing.proposer import Proposer, Seen, stands_below
from llava_kd.search.proposing.similar import first_values, similar_runs
from llava_kd.search.proposing.space import Pruning, Range, Space, read_space, same
from llava_kd.search.proposing.trials import Trial, Trials, best_of, standings_of
from llava_kd.search.running.schedule import Job
from llava_kd.search.running.stream import run_stream


def space_of(folder: Path, space: dict = SPACE, **more: object) -> Space:
    return read_space(write_search(folder, space, **more))


def test_a_file_is_read(tmp_path: Path) -> None:
    space = space_of(tmp_path, budget={"trials": 3, "minutes": 1.5}, prune={"trials": 2})
    assert space.scores == ("slice/val",)
    assert space.settings["optim.lr"] == Range(low=1e-4, high=0.1, is_log=True)
    assert (space.max_trials, space.max_minutes, space.pruning) == (3, 1.5, Pruning(trials=2, after=1))
    assert space.size == math.inf
    tree = space.with_values({"optim.lr": 0.5})
    assert tree["optim"] == {"lr": 0.5}
    assert space.tree["optim"] == {"lr": 1e-3}, "the recipe itself stays"
    assert read_space(space.path, ["--max_steps=7"]).tree["max_steps"] == 7


@pytest.mark.parametrize(
    ("own", "size"),
    [([1, 2], 2), ({"from": 1, "to": 9}, 9), ({"from": 1, "to": 9, "step": 4}, 3),
     ({"from": 0.0, "to": 1.0, "step": 0.1}, 11), ({"from": 0.0, "to": 1.0}, math.inf)],
)  # fmt: skip
def test_how_many_recipes_there_are(tmp_path: Path, own: object, size: float) -> None:
    assert space_of(tmp_path, {"seed": own}).size == size


def lr(**entry: object) -> dict:
    return {"space": {"optim.lr": entry}}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (lr(**{"from": 1, "to": 0.1}), "space.optim.lr` must have `from` below `to`; got 1 to 0.1"),
        (lr(**{"from": 1, "to": 1}), "space.optim.lr` contains only 1"),
        (lr(**{"from": 0, "to": 1, "log": True}), "`from` must be above 0; got 0"),
        (lr(**{"from": 1}), "must have both `from` and `to`"),
        (lr(**{"from": "low", "to": 1}), "`from` must be a number; got 'low'"),
        (lr(**{"from": 0, "to": float("inf")}), "`to` must be a number"),
        (lr(**{"from": 0, "to": 1, "step": 2}), "`step` must be above 0 and at most 1; got 2"),
        (lr(**{"from": 0.1, "to": 1, "step": 0.1, "log": True}), "must not have both `log` and `step`"),
        (lr(**{"from": 0, "to": 1, "lgo": True}), "unknown key 'lgo' (did you mean log?)"),
        (lr(**{"from": 0.1, "to": 1, "log": "yes please"}), "`log` must be true or false"),
        ({"space": {"optim.lr": []}}, "at least two values; got []"),
        ({"space": {"optim.lr": [1]}}, "at least two values; got [1]"),
        ({"space": {"optim.lr": [1, 2, 1.0]}}, "1.0 is there twice"),
        ({"space": {"optim.lr": 3}}, "must be a list of values, or {from"),
        ({"space": {}}, "`space` is empty"),
        ({"budget": {"trials": 0}}, "`budget.trials` must be a whole number, at least 1; got 0"),
        ({"budget": {"minutes": 0}}, "`budget.minutes` must be above 0; got 0"),
        ({"budget": {}}, "must contain `trials`, `minutes` or both"),
        ({"budget": {"trials": True}}, "got True"),
        ({"budget": {"hours": 1}}, "unknown key 'hours'"),
        ({"score": "slice/vla"}, "slice/vla, which no trial computes (did you mean slice/val?)"),
        ({"score": ["slice/val", "slice/val"]}, "each once"),
        ({"overrides": {}}, "no trial would have a score"),
        ({"recipe": "tauhgt.yaml"}, "did you mean taught.yaml?"),
        ({"prune": {"trials": 0}}, "`prune.trials` must be a whole number, at least 1; got 0"),
        ({"seed": -1}, "`seed` must be a whole number, at least 0; got -1"),
        ({"trials": 3}, "unknown key 'trials'"),
        ({"name": "a/b"}, "letters, digits"),
    ],
)
def test_a_file_that_cannot_be_is_refused_in_one_line(tmp_path: Path, more: dict, said: str) -> None:
    path = write_search(tmp_path, **more)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read_space(path)
    assert said in str(caught.value)
    assert "search.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_setting_is_either_sought_or_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"optim.lr is in `space` and also set on the command line"):
        read_space(write_search(tmp_path), ["--optim.lr=0.1"])


@pytest.mark.parametrize("missing", ["recipe", "space", "budget"])
def test_what_a_file_must_hold(tmp_path: Path, missing: str) -> None:
    path = write_search(tmp_path)
    tree = yaml.safe_load(path.read_text())
    del tree[missing]
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match=f"must contain `{missing}`"):
        read_space(path)


def test_one_and_one_point_nought_are_the_same_and_true_is_neither() -> None:
    assert same(1, 1.0)
    assert not same(1, True)
    assert not same(None, 0)
    assert same({"a": 1}, {"a": 1})


# What is proposed ----


def test_proposals_are_of_the_space_and_come_again(tmp_path: Path) -> None:
    space = space_of(tmp_path)
    seen: list[Seen] = []
    for number in range(15):
        values = Proposer(space).propose(number, seen)
        assert values is not None
        assert space.holds(values)
        assert Proposer(space).propose(number, seen) == values, "a search that goes on proposes the same"
        seen.append(Seen(values=values, place=None if number == 3 else number / 15))


def test_a_recipe_is_proposed_once_until_there_are_no_more(tmp_path: Path) -> None:
    space = space_of(tmp_path, {"seed": [0, 1], "max_steps": {"from": 10, "to": 20, "step": 5}})
    proposer, seen = Proposer(space, startup=2), []
    for number in range(6):
        values = proposer.propose(number, seen)
        assert values is not None
        assert all(one.values != values for one in seen)
        seen.append(Seen(values=values, place=number / 6))
    assert proposer.propose(6, seen) is None


def test_values_of_any_kind_may_be_sought(tmp_path: Path) -> None:
    kinds = [None, True, "word", {"checkpoint": "there"}, [1, 2]]
    proposer = Proposer(space_of(tmp_path, {"teacher": kinds}))
    seen: list[Seen] = []
    while (values := proposer.propose(len(seen), seen)) is not None:
        seen.append(Seen(values=values, place=0.5))
    assert sorted(map(str, (one.values["teacher"] for one in seen))) == sorted(map(str, kinds))


def test_it_goes_where_the_good_ones_are(tmp_path: Path) -> None:
    """An oracle: 30 trials of which those near a rate of 1e-2 are best. Without them it is chance."""
    space = space_of(tmp_path, {"optim.lr": {"from": 1e-4, "to": 1.0, "log": True}})

    def far(rate: object) -> float:
        return abs(math.log10(float(str(rate))) + 2)

    rates = [10 ** (-4 + 4 * k / 29) for k in range(30)]
    order = sorted(rates, key=far, reverse=True)
    seen = [Seen(values={"optim.lr": rate}, place=order.index(rate) / 30) for rate in rates]
    proposed = [Proposer(space).propose(number, seen) for number in range(20)]
    chance = [Proposer(space).propose(number, []) for number in range(20)]
    near, wide = (sum(far(v["optim.lr"]) for v in found if v) / 20 for found in (proposed, chance))
    assert near < 0.6 < wide
    assert near < 0.5 * wide


def test_similar_runs_stand_for_trials(tmp_path: Path) -> None:
    space = space_of(tmp_path, {"optim.lr": {"from": 1e-4, "to": 1.0, "log": True}})
    proposer = Proposer(space)
    similar = [Seen(values={"optim.lr": 10 ** (-k / 10)}, place=k / 40) for k in range(40)]
    assert proposer.is_chance([], [])
    assert not proposer.is_chance([], similar)
    rates = [v["optim.lr"] for n in range(20) if (v := proposer.propose(n, [], similar))]
    assert sum(float(str(rate)) < 1e-2 for rate in rates) > 15


def test_without_optuna_the_command_to_install_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object, **more: object) -> object:
        if name == "optuna":
            raise ModuleNotFoundError(name)
        return real(name, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    from llava_kd.search.proposing import proposer

    with pytest.raises(ValueError, match=r"pip install 'llava_kd\[search\]'"):
        proposer.optuna()


# From the store ----


def _stored(key: str, data: str, rate: float, score: float, **more: object) -> object:
    return entry(key, data, settings={"optim.lr": rate, **more}, scores={"slice/val": score})


def test_runs_of_similar_data_within_the_space_are_taken(tmp_path: Path) -> None:
    space = space_of(tmp_path, {"optim.lr": {"from": 1e-4, "to": 0.1, "log": True}})
    sets = {
        "a": data_set("a"),
        "b": data_set("b", records=300.0),
        "c": data_set("c", **{"words an answer": 90.0, "asks: what": 0.0, "asks: request": 1.0}),
    }
    runs = [
        _stored("1", "a", 0.01, 0.9),
        _stored("2", "a", 0.001, 0.1),
        _stored("3", "b", 0.02, 0.3),
        _stored("4", "b", 0.03, 0.4),
        _stored("outside", "b", 7.0, 0.99),
        _stored("unlike", "c", 0.01, 0.9),
        _stored("unlike too", "c", 0.02, 0.9),
        entry("5", "a", settings={"optim.lr": 0.05}, failure="it broke"),
    ]
    found = similar_runs(space, runs, sets, data_set("new").features)
    assert [run.name for run in found] == ["run 1", "run 2", "run 4", "run 3"]
    assert found[0].alike == 1.0 > found[2].alike
    # Of three runs on b one is outside the space and the best; the others keep their places among all three.
    assert [run.place for run in found] == [0.75, 0.25, pytest.approx(0.5), pytest.approx(1 / 6)]
    assert first_values(found) == [{"optim.lr": 0.01}, {"optim.lr": 0.03}]


def test_many_runs_are_thinned_out_from_the_best_to_the_worst(tmp_path: Path) -> None:
    space = space_of(tmp_path, {"optim.lr": {"from": 1e-4, "to": 0.1, "log": True}})
    runs = [_stored(f"{d} {k}", d, 1e-3 + k * 1e-5, k / 100) for d in "ab" for k in range(100)]
    found = similar_runs(space, runs, {d: data_set(d) for d in "ab"}, data_set("n").features)
    assert len(found) == 60
    for data in ("data a", "data b"):
        own = [run.place for run in found if run.data == data]
        assert len(own) == 30
        assert max(own) == 0.995
        assert min(own) == 0.005


# Where trials stand ----


def _trial(number: int, state: str = "complete", **scores: float) -> Trial:
    named = {f"slice/{name}": value for name, value in scores.items()}
    return Trial(number=number, values={}, origin="TPE", state=state, scores=named)  # type: ignore[arg-type]


def test_pruned_trials_stand_below_whole_ones_and_failed_ones_last() -> None:
    trials = [
        _trial(0, a=0.1),
        _trial(1, "pruned", a=0.9),
        _trial(2, "failed"),
        _trial(3, a=0.5),
        _trial(4, "running"),
    ]
    found = standings_of(trials, ["slice/a"])
    assert sorted(found, key=lambda n: found[n]) == [2, 1, 0, 3]
    assert found == {2: 0.125, 1: 0.375, 0: 0.625, 3: 0.875}
    best = best_of(trials, ["slice/a"])
    assert best is not None
    assert best.number == 3


def test_several_scores_count_by_their_order() -> None:
    trials = [_trial(0, a=0.9, b=0.1), _trial(1, a=0.8, b=0.2), _trial(2, a=0.1, b=0.3)]
    assert len(set(standings_of(trials, ["slice/a", "slice/b"]).values())) == 1
    assert best_of(trials, ["slice/b"]) is trials[2]


# What is stopped ----


def test_a_trial_below_the_median_is_stopped() -> None:
    others = [{5: 0.5, 10: 0.6}, {5: 0.4, 10: 0.9}, {5: 0.3, 10: 0.5}]
    rule = Pruning(trials=3)
    assert stands_below(rule, "slice/a", {5: 0.35}, others)
    assert not stands_below(rule, "slice/a", {5: 0.45}, others)
    assert not stands_below(rule, "slice/a", {}, others)
    assert not stands_below(Pruning(trials=4), "slice/a", {5: 0.1}, others), "too few have ended"
    assert not stands_below(Pruning(trials=3, after=6), "slice/a", {5: 0.1}, others), "too early"


def test_of_a_loss_the_high_one_is_stopped() -> None:
    others = [{5: 2.0}, {5: 2.2}, {5: 1.8}]
    assert stands_below(Pruning(trials=3), "loss/a", {5: 2.5}, others)
    assert not stands_below(Pruning(trials=3), "loss/a", {5: 1.5}, others)


# Jobs one by one ----


class Machine:
    """Processes that take three looks; `hopeless` ones are asked to stop, `bad` ones fail."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after, self.started, self.most = stop_after, [], 0
        self.running: dict[str, int] = {}
        self.done: set[str] = set()
        self.heard: list[tuple[str, bool, bool]] = []
        self.names = iter(["a", "bad", "hopeless", "b", "c"])

    def next(self) -> Job | None:
        name = next(self.names, None)
        if name is None:
            return None
        return Job(
            key=name, name=name, needs=(), command=(), log=Path("none"), is_done=lambda: name in self.done
        )

    def is_hopeless(self, job: Job) -> bool:
        return job.key == "hopeless"

    def ended(self, job: Job, seconds: float, failure: str | None, *, was_asked: bool) -> None:
        self.heard.append((job.key, failure is None, was_asked))

    def start(self, job: Job, slot: int) -> list:
        assert slot not in self.running.values()
        self.running[job.key] = slot
        self.started.append(job.key)
        self.most = max(self.most, len(self.running))
        return [job.key, 3]

    def poll(self, process: list) -> int | None:
        process[1] -= 1
        if process[1] > 0:
            return None
        self.running.pop(process[0])
        if process[0] not in ("bad", "hopeless"):
            self.done.add(process[0])
        return 1 if process[0] == "bad" else 0

    def stop(self, process: list) -> None:
        assert process[0] == "hopeless"
        process[1] = 1

    def is_stopping(self) -> bool:
        return self.stop_after is not None and len(self.started) >= self.stop_after


class Processes:
    def __init__(self, machine: Machine) -> None:
        self.start: Callable = machine.start
        self.stop: Callable = machine.stop
        self.ended: Callable = machine.poll
        self.is_stopping: Callable = machine.is_stopping


@pytest.mark.parametrize("num_slots", [1, 2, 9])
def test_jobs_come_as_slots_get_free(num_slots: int) -> None:
    machine = Machine()
    assert not run_stream(machine, Processes(machine), num_slots=num_slots, pause=0.0)
    assert sorted(machine.heard) == [
        ("a", True, False),
        ("b", True, False),
        ("bad", False, False),
        ("c", True, False),
        ("hopeless", False, True),
    ]
    assert machine.most == min(num_slots, 5)


def test_after_a_stop_nothing_starts_and_nothing_is_heard_of_what_broke_off() -> None:
    machine = Machine(stop_after=2)
    assert run_stream(machine, Processes(machine), num_slots=2, pause=0.0)
    assert machine.started == ["a", "bad"]
    assert machine.heard == [("a", True, False)]


def test_trials_are_on_disk_after_each_change(tmp_path: Path) -> None:
    space = space_of(tmp_path)
    trials = Trials(space)
    trials.put(Trial(number=0, values={"optim.lr": 0.1}, origin="random"))
    again = Trials(read_space(space.path))
    assert again.all == trials.all
    assert again.of("running") == trials.all
