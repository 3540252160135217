"""A search file, as docs/search.md writes it down: a recipe, what may differ in it, what is sought."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_kd.config.trees import check_kind, parse_override, read_tree, set_dotted
from llava_kd.search.grids.entries import mapping, named, near, only

_KEYS = {
    *("name", "what", "recipe", "overrides", "space", "score", "budget", "prune", "store", "seed"),
    "output",
}
_OF_RANGE = {"from", "to", "log", "step"}
_OF_BUDGET = {"trials", "minutes"}
_OF_PRUNE = {"trials", "after"}
STORE = "runs/store.sqlite"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of these values, of whatever kind YAML has."""

    values: tuple[object, ...]

    @property
    def ends(self) -> tuple[object, ...]:
        return self.values

    @property
    def size(self) -> float:
        return len(self.values)

    def holds(self, value: object) -> bool:
        return any(same(value, own) for own in self.values)

    def in_words(self) -> str:
        return f"one of {', '.join(map(str, self.values))}"


@dataclass(frozen=True, kw_only=True)
class Range:
    """A number from `low` to `high`, both included; whole where both ends are."""

    low: float
    high: float
    is_log: bool = False
    step: float | None = None

    @property
    def is_whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def ends(self) -> tuple[object, ...]:
        return (self.low, self.high)

    @property
    def size(self) -> float:
        """How many values there are."""
        step = self.step or (1 if self.is_whole else None)
        return math.inf if step is None else math.floor((self.high - self.low) / step + 1e-9) + 1

    def holds(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return self.low <= value <= self.high and (isinstance(value, int) or not self.is_whole)

    def in_words(self) -> str:
        step = f" in steps of {self.step:g}" if self.step else ""
        return f"{self.low:g} to {self.high:g}{step}{', log' if self.is_log else ''}"


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """A trial is stopped where it stands below the median, once so many have ended and it is so far."""

    trials: int = 5
    after: int = 1


@dataclass(frozen=True, kw_only=True)
class Space:
    """`tree` is the recipe with its overrides. A budget of None has no end there; one of the two has."""

    name: str
    path: Path
    what: str
    recipe: Path
    tree: Mapping[str, object]
    settings: Mapping[str, Choice | Range]
    scores: tuple[str, ...]
    max_trials: int | None
    max_minutes: float | None
    pruning: Pruning | None
    store: Path
    seed: int
    output: Path

    @property
    def size(self) -> float:
        return math.prod(setting.size for setting in self.settings.values())

    def with_values(self, values: Mapping[str, object]) -> dict[str, object]:
        tree = copy.deepcopy(dict(self.tree))
        for name, value in values.items():
            set_dotted(tree, name, copy.deepcopy(value))
        return tree

    def holds(self, values: Mapping[str, object]) -> bool:
        """Whether these are values of the space, all of them."""
        return all(name in values and own.holds(values[name]) for name, own in self.settings.items())


def read_space(
    path: str | Path, overrides: Sequence[str] = (), *, output: str | None = None, store: str | None = None
) -> Space:
    """Read a search file; `overrides` such as `--max_steps=20` go to every trial.

    Raises ValueError for an unknown key, a recipe that is not there, a range without values, a budget of
    nothing.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no search file {path}; docs/search.md shows an example")
    file = read_tree(path)
    check_kind(file, "search", path)
    only(file, _KEYS, f"{path}")
    for key in ("recipe", "space", "budget"):
        if file.get(key) is None:
            raise ValueError(f"{path} must contain `{key}`; docs/search.md shows an example")
    name = named(file.get("name") or path.stem, f"{path}: `name`")
    recipe, tree = _recipe(file, path, overrides)
    trials, minutes = _budget(file["budget"], path)
    return Space(
        name=name,
        path=path,
        what=str(file.get("what") or ""),
        recipe=recipe,
        tree=tree,
        settings=_settings(file["space"], path, overrides),
        scores=_scores(file.get("score"), tree, path),
        max_trials=trials,
        max_minutes=minutes,
        pruning=_pruning(file, path),
        store=Path(store or str(file.get("store") or STORE)),
        seed=_whole(file.get("seed", 0), f"{path}: `seed`", least=0),
        output=Path(output or str(file.get("output") or f"runs/searches/{name}")),
    )


def _recipe(file: Mapping, path: Path, overrides: Sequence[str]) -> tuple[Path, dict]:
    recipe = path.parent / str(file["recipe"])
    if not recipe.is_file():
        there = [p.name for p in sorted(recipe.parent.glob("*.yaml"))] if recipe.parent.is_dir() else []
        raise ValueError(f"{path}: there is no recipe {recipe}{near(recipe.name, there)}")
    tree = read_tree(recipe)
    changes = mapping(file.get("overrides"), f"{path}: `overrides`")
    for key, value in (*changes.items(), *map(parse_override, overrides)):
        set_dotted(tree, str(key), copy.deepcopy(value))
    return recipe, tree


def _settings(entry: object, path: Path, overrides: Sequence[str]) -> dict[str, Choice | Range]:
    space = mapping(entry, f"{path}: `space`")
    if not space:
        raise ValueError(f"{path}: `space` is empty; name at least one setting and its values")
    fixed = {parse_override(word)[0] for word in overrides}
    if both := sorted(fixed & set(map(str, space))):
        raise ValueError(f"{path}: {both[0]} is in `space` and also set on the command line; remove one")
    return {str(name): _setting(value, f"{path}: `space.{name}`") for name, value in space.items()}


def _setting(entry: object, where: str) -> Choice | Range:
    if isinstance(entry, list):
        if len(entry) < 2:
            raise ValueError(
                f"{where} must list at least two values; got {entry!r}: put a single value into `overrides`"
            )
        doubled = [value for k, value in enumerate(entry) if any(same(value, own) for own in entry[:k])]
        if doubled:
            raise ValueError(f"{where} must list each value once; {doubled[0]!r} is there twice")
        return Choice(values=tuple(entry))
    if not isinstance(entry, Mapping):
        raise ValueError(
            f"{where} must be a list of values, or {{from: LOW, to: HIGH}} with `log` or `step`; got "
            f"{entry!r}"
        )
    only(entry, _OF_RANGE, where)
    if not {"from", "to"} <= set(entry):
        raise ValueError(f"{where} must have both `from` and `to`; got {entry!r}")
    return _range(entry, where)


def _range(entry: Mapping, where: str) -> Range:
    low, high = (_number(entry[key], f"{where}: `{key}`") for key in ("from", "to"))
    step = None if entry.get("step") is None else _number(entry["step"], f"{where}: `step`")
    is_log = entry.get("log", False)
    if not isinstance(is_log, bool):
        raise ValueError(f"{where}: `log` must be true or false; got {is_log!r}")
    if low > high:
        raise ValueError(f"{where} must have `from` below `to`; got {low:g} to {high:g}: exchange them")
    if low == high:
        raise ValueError(f"{where} contains only {low:g}; put it in `overrides`, or widen the range")
    if is_log and low <= 0:
        raise ValueError(f"{where} is `log`, so `from` must be above 0; got {low:g}")
    if is_log and step is not None:
        raise ValueError(f"{where} must not have both `log` and `step`; list the values instead")
    if step is not None and not 0 < step <= high - low:
        raise ValueError(f"{where}: `step` must be above 0 and at most {high - low:g}; got {step:g}")
    if step is not None and not isinstance(step, int):
        low, high = float(low), float(high)
    return Range(low=low, high=high, is_log=is_log, step=step)


def _scores(entry: object, tree: Mapping[str, object], path: Path) -> tuple[str, ...]:
    """Figures that the trials write while they train; the first slice where none is named."""
    evaluate = tree.get("evaluate")
    asked = evaluate if isinstance(evaluate, Mapping) else {}
    there = [
        f"{kind}/{name}"
        for kind, section in (("slice", "slices"), ("loss", "losses"))
        for name in mapping(asked.get(section), f"{path}: `evaluate.{section}`")
    ]
    if not there:
        raise ValueError(
            f"{path}: no trial would have a score, because the recipe evaluates nothing during training; "
            "set `evaluate` with slices or losses in `overrides`"
        )
    wanted = there[:1] if entry is None else entry if isinstance(entry, list) else [entry]
    for name in wanted:
        if name not in there:
            raise ValueError(
                f"{path}: `score` is {name}, which no trial computes{near(name, there)} (`evaluate`)"
            )
    if not wanted or len(set(wanted)) < len(wanted):
        raise ValueError(f"{path}: `score` must name figures, each once; got {entry!r}")
    return tuple(map(str, wanted))


def _budget(entry: object, path: Path) -> tuple[int | None, float | None]:
    budget = mapping(entry, f"{path}: `budget`")
    only(budget, _OF_BUDGET, f"{path}: `budget`")
    trials, minutes = budget.get("trials"), budget.get("minutes")
    if trials is None and minutes is None:
        raise ValueError(f"{path}: `budget` must contain `trials`, `minutes` or both")
    if trials is not None:
        trials = _whole(trials, f"{path}: `budget.trials`", least=1)
    if minutes is not None:
        minutes = _number(minutes, f"{path}: `budget.minutes`")
        if not 0 < minutes < math.inf:
            raise ValueError(f"{path}: `budget.minutes` must be above 0; got {minutes:g}")
    return trials, minutes


def _pruning(file: Mapping, path: Path) -> Pruning | None:
    if "prune" in file and file["prune"] is None:
        return None
    entry = mapping(file.get("prune"), f"{path}: `prune`")
    only(entry, _OF_PRUNE, f"{path}: `prune`")
    own = {key: _whole(value, f"{path}: `prune.{key}`", least=1) for key, value in entry.items()}
    return Pruning(**own)


def _number(value: object, where: str) -> float:
    """A whole number stays one; YAML reads 1e-4, without a dot, as a word."""
    number = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            number = None
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise ValueError(f"{where} must be a number; got {value!r}")
    return number


def _whole(value: object, where: str, *, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{where} must be a whole number, at least {least}; got {value!r}")
    return value


def same(first: object, second: object) -> bool:
    """As settings: 1 is 1.0, and true is neither."""
    numbers = [isinstance(v, int | float) and not isinstance(v, bool) for v in (first, second)]
    if all(numbers):
        return first == second
    return json.dumps(first, sort_keys=True, default=str) == json.dumps(second, sort_keys=True, default=str)
