"""How figures of a grid are written, in Markdown and on the page alike; what is not there is said."""

from __future__ import annotations

from collections.abc import Mapping

NONE = "-"
NOT_MEASURED = "not measured"
WAITING = "waits"
# What two arms are compared at, and the field of a curve that it is read from.
EQUALS = {"equal_steps": "steps", "equal_time": "seconds", "equal_operations": "tflop"}


def percent(value: Mapping | None) -> str:
    """A mean of fractions with its standard error: 57.9 +- 0.6."""
    if value is None:
        return NONE
    error = "" if value["error"] is None else f" \u00b1 {100 * value['error']:.1f}"
    return f"{100 * value['mean']:.1f}{error}"


def points(value: float) -> str:
    return f"{100 * value:+.1f}"


def gain(value: Mapping | None) -> str:
    return NONE if value is None else points(value["mean"])


def interval(value: Mapping | None) -> str:
    if value is None:
        return NONE
    if value["low"] is None:
        return "none (one seed)"
    return f"{points(value['low'])} to {points(value['high'])}"


def at_equal(entry: Mapping | None, *, is_finished: bool) -> str:
    """The gain with its interval; a dash for the baseline, and before anything is finished."""
    if entry is None or not is_finished:
        return NONE
    if entry["gain"] is None:
        return NOT_MEASURED
    value = entry["gain"]
    reach = "" if value["low"] is None else f" ({interval(value)})"
    return f"{gain(value)}{reach}"


def seconds(value: Mapping | None) -> str:
    return NONE if value is None else duration(value["mean"])


def duration(seconds: float) -> str:
    """For people: 45 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def published(value: float | None) -> str:
    return NONE if value is None else f"{value:g}"


def rank_words(results: Mapping) -> str:
    """One sentence on the agreement with the published order; empty where nothing is published."""
    rank = results["rank"]
    if rank is None:
        return ""
    if rank["spearman"] is None:
        return (
            "Rank correlation with the published order: not computed. It needs three arms with both "
            f"figures, not all equal; there are {rank['arms']}."
        )
    each = [f"{value:.2f}" for value in rank["by_seed"].values() if value is not None]
    seeds = f"; by seed {', '.join(each)}" if len(each) > 1 else ""
    same = f" over the seeds that all have, {', '.join(rank['by_seed'])}," if rank["by_seed"] else ""
    return (
        f"Rank correlation with the published order (Spearman, {rank['arms']} arms, means{same} on "
        f"{rank['test']}): {rank['spearman']:.2f}{seeds}."
    )


def cost_words(results: Mapping) -> str:
    cost = results["cost"]
    return (
        f"{cost['finished']} of {cost['stages']} stages are trained, in {duration(cost['seconds'])} of "
        f"training. Sharing stages between arms saved {duration(cost['saved_by_sharing'])}."
    )


def method_words(results: Mapping) -> list[str]:
    """How the figures come about, a sentence each."""
    count = len(results["seeds"])
    many = (
        f"\u00b1 is the standard error over seeds. Intervals are 95 % by Student's t, over differences "
        f"paired by seed, at most {count} seeds, not corrected for the number of arms."
        if count > 1
        else (
            "There is only one seed, so there is no standard error and no interval: no difference here is "
            "significant."
        )
    )
    curve = results["curve"]
    equal = (
        f"At equal time: {curve} at the total training time of the baseline, from the last evaluation "
        "before it. An arm whose schedule has not finished by then is at a disadvantage."
        if curve
        else (
            "At equal time: not measured, because no stage evaluates a slice during training "
            "(`evaluate.slices`)."
        )
    )
    return [
        many,
        "At equal steps: the test scores if both arms took the same number of steps, else the curve.",
        equal,
        "At equal operations: the same, by the operations of student and teacher, counted from their shapes.",
        "Seconds count only training steps, of all stages of an arm, including shared ones.",
        *_not_measured(results),
    ]


def _not_measured(results: Mapping) -> list[str]:
    """Each reason once, with the arms that it holds for."""
    found: dict[str, list[str]] = {}
    for name, arm in results["arms"].items():
        for what in EQUALS:
            if arm["seeds"] and arm.get(what) and arm[what]["not_measured"]:
                reason = f"Not measured at {what.replace('_', ' ')}: {arm[what]['not_measured']}"
                found.setdefault(reason, []).append(name)
    return [f"{reason} ({', '.join(arms)})." for reason, arms in found.items()]


def fault_words(results: Mapping) -> list[str]:
    """A line for each arm and seed that failed, and for what cannot be compared."""
    return results["warnings"] + [
        f"{name}, seed {seed}: {why}"
        for name, arm in results["arms"].items()
        for seed, why in arm["missing"].items()
        if why != WAITING
    ]


def waiting_words(results: Mapping) -> str:
    """What has not been run to its end and has not failed; empty where there is nothing."""
    found = {
        name: [seed for seed, why in arm["missing"].items() if why == WAITING]
        for name, arm in results["arms"].items()
    }
    listed = [f"{name} (seed {', '.join(seeds)})" for name, seeds in found.items() if seeds]
    return f"Not finished yet: {'; '.join(listed)}." if listed else ""
