"""What a search found, as results.json, results.md and lines for a terminal."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence

from llava_kd.durable import write_text
from llava_kd.search.findings.words import NONE, duration
from llava_kd.search.proposing.similar import Similar
from llava_kd.search.proposing.space import Space
from llava_kd.search.proposing.trials import Trial, Trials, best_of, standings_of
from llava_kd.search.store.entries import is_lower_better

VERSION = 1
RESULTS = "results.json"
_SHOWN_SIMILAR = 10


def results(space: Space, trials: Trials, similar: Sequence[Similar]) -> dict:
    """The trials from the best to the worst, those that run last."""
    places = standings_of(trials.all, space.scores)
    ordered = sorted(trials.all, key=lambda trial: (-places.get(trial.number, -1.0), trial.number))
    best = best_of(trials.all, space.scores)
    ended = [trial for trial in trials.all if trial.state != "running"]
    valid = [trial for trial in ended if trial.state != "failed"]
    return {
        "version": VERSION,
        "name": space.name,
        "what": space.what,
        "recipe": str(space.recipe),
        "scores": {name: "lower" if is_lower_better(name) else "higher" for name in space.scores},
        "space": {name: own.in_words() for name, own in space.settings.items()},
        "budget": {"trials": space.max_trials, "minutes": space.max_minutes},
        "spent": {"trials": len(trials.all), "minutes": trials.spent_s / 60},
        "valid": {"ended": len(ended), "valid": len(valid)},
        "best": None if best is None else best.number,
        "trials": [
            {**dataclasses.asdict(trial), "place": places.get(trial.number)}
            | {"run": str(trials.directory(trial))}
            for trial in ordered
        ],
        "similar": [dataclasses.asdict(run) for run in similar],
    }


def write_results(found: Mapping, space: Space) -> None:
    write_text(space.output / RESULTS, json.dumps(found, indent=1, default=str) + "\n")
    write_text(space.output / "results.md", markdown(found))


def rows(found: Mapping) -> tuple[list[str], list[list[str]]]:
    """Header and cells, a trial a line."""
    head = ["trial", *found["scores"], "place", *found["space"], "steps", "training", "from", "state"]
    lines = []
    for trial in found["trials"]:
        place = trial["place"]
        lines.append(
            [
                f"{trial['number']:03d}",
                *(_score(trial, name) for name in found["scores"]),
                NONE if place is None else f"{place:.2f}",
                *(_value(trial["values"][name]) for name in found["space"]),
                NONE if trial["steps"] is None else str(trial["steps"]),
                NONE if trial["seconds"] is None else duration(trial["seconds"]),
                trial["origin"],
                trial["state"],
            ]
        )
    return head, lines


def _score(trial: Mapping, name: str) -> str:
    value = trial["scores"].get(name)
    if value is None:
        return NONE
    return f"{value:.4f}" if is_lower_better(name) else f"{100 * value:.1f} %"


def _value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def headline(found: Mapping) -> str:
    spent, valid = found["spent"], found["valid"]
    share = f"{valid['valid']} of {valid['ended']} have a score" if valid["ended"] else "none has finished"
    best = "no trial has finished" if found["best"] is None else f"the best is {found['best']:03d}"
    return (
        f"{spent['trials']} trials in {duration(60 * spent['minutes'])}, {share}; {best}. Its score is the "
        "best of many, so it is optimistic: measure it over several seeds with `llava-kd ablate`."
    )


def failures(found: Mapping) -> list[str]:
    failed = [trial for trial in found["trials"] if trial["state"] == "failed"]
    return [f"trial {trial['number']:03d} failed: {trial['failure']}" for trial in failed]


def markdown(found: Mapping) -> str:
    head, lines = rows(found)
    table = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    table += [f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines]
    parts = [f"# {found['name']}", found["what"], headline(found), "\n".join(table)]
    if broken := failures(found):
        parts.append("Failed:\n\n" + "\n".join(f"- {line}" for line in broken))
    space = [f"- `{name}`: {words}" for name, words in found["space"].items()]
    parts.append(f"Search space, over {found['recipe']}:\n\n" + "\n".join(space))
    if runs := found["similar"][:_SHOWN_SIMILAR]:
        told = [
            f"- {r['name']} on {r['data']}, similarity {r['alike']:.2f}, rank {r['place']:.2f}" for r in runs
        ]
        more = len(found["similar"]) - len(runs)
        told += [f"- and {more} more"] * bool(more)
        parts.append("Started from runs of the store:\n\n" + "\n".join(told))
    return "\n\n".join(part for part in parts if part) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def terminal(found: Mapping) -> list[str]:
    head, lines = rows(found)
    table = [head, *lines]
    widths = [max(len(line[k]) for line in table) for k in range(len(head))]
    shown = [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    ]
    return [*shown, "", headline(found), *failures(found)]


def trial_line(trial: Trial, scores: Sequence[str]) -> str:
    """What is said when one has ended."""
    values = ", ".join(f"{name} {_value(value)}" for name, value in trial.values.items())
    told = ", ".join(f"{name} {_score({'scores': trial.scores}, name)}" for name in scores)
    how = {"complete": told, "pruned": f"stopped below the median at step {trial.steps}, {told}"}
    return f"{trial.name} ({trial.origin}; {values}): {how.get(trial.state, f'failed: {trial.failure}')}"
