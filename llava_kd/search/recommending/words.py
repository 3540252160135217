"""A recommendation for a terminal."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import yaml

from llava_kd.search.findings.words import duration
from llava_kd.search.recommending.ranking import Advice, Recommendation


def lines(found: Recommendation, most: int) -> list[str]:
    said = [
        f"from {found.num_runs} runs with scores ({found.num_failed} more failed); datasets by similarity: "
        + ", ".join(f"{name} {value:.2f}" for name, value in found.alike.items()),
        _check(found.check),
    ]
    for rank, one in enumerate(found.advice[:most], start=1):
        worth = f"on evidence of {one.weight:.1f} weighted runs{_cost(one)}"
        said += ["", f"{rank}. expected rank {one.place:.2f}, {worth}"]
        said.append(f"   {words(one.settings)}")
        said += [
            f"   {e.run} on {e.data}: rank {e.place:.2f} ({_scores(e.scores)}), dataset similarity "
            f"{e.alike:.2f}, recipe similarity {e.near:.2f}"
            for e in one.evidence
        ]
    if len(found.advice) > most:
        said += ["", f"and {len(found.advice) - most} more recipes (--top)"]
    return said


def words(settings: Mapping[str, object]) -> str:
    """As `llava-kd train` takes them."""
    return " ".join(f"--{key}={_yaml(value)}" for key, value in settings.items())


def _yaml(value: object) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6).replace("\n...\n", "").strip()
    return f"'{text}'" if any(c in text for c in " {}[]'") else text


def _check(check: Mapping[str, float]) -> str:
    if not check:
        return "quality of this advice: not measured, because no dataset has three runs that can be predicted"
    each = ", ".join(f"{name} {value:.2f}" for name, value in check.items())
    return (
        "quality of such advice (rank correlation of each dataset's runs with the prediction from the "
        f"other datasets): {each}; mean {statistics.fmean(check.values()):.2f}"
    )


def _scores(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in scores.items())


def _cost(one: Advice) -> str:
    return "" if one.seconds is None else f", {duration(one.seconds)} of training"
