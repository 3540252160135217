"""results.md: the tables of a grid, for people and for docs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llava_kd.search.findings import words


def markdown(results: Mapping) -> str:
    """The whole file."""
    parts = [f"# {results['name']}", results["what"], _headline(results)]
    if broken := words.fault_words(results):
        parts.append("Problems to fix:\n\n" + "\n".join(f"- {line}" for line in broken))
    parts.append(words.waiting_words(results))
    for test in results["tests"]:
        parts += [f"## {test}", _scores(results, test)]
        if by_type := _by_type(results, test):
            parts += [f"### {test}, by question type", by_type]
    if rank := words.rank_words(results):
        parts.append(rank)
    parts += [
        "## Arms",
        _arms(results),
        "## How",
        "\n".join(f"- {line}" for line in words.method_words(results)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _headline(results: Mapping) -> str:
    commits = results["commits"]
    made = f" Commit {', '.join(commits)}." if len(commits) == 1 else ""
    if len(commits) > 1:
        made = f" The stages were trained at {len(commits)} commits: {', '.join(commits)}."
    return (
        f"{len(results['arms'])} arms, seeds {', '.join(map(str, results['seeds']))}; the baseline is "
        f"{results['baseline']}. {words.cost_words(results)}{made}"
    )


def score_rows(results: Mapping, test: str) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of one test; equal steps and time stand at the first."""
    is_first = test == next(iter(results["tests"]))
    has_published = is_first and any(arm["published"] is not None for arm in results["arms"].values())
    head = ["arm", "accuracy, %", "gain, points", "95 % interval", "seeds"]
    if is_first:
        head += ["steps", "training", *(f"gain at {name.replace('_', ' ')}" for name in words.EQUALS)]
    if has_published:
        head.append("published")
    rows = []
    for name, arm in results["arms"].items():
        own = arm["tests"][test] or {}
        row = [name, words.percent(own.get("accuracy"))]
        is_base = name == results["baseline"]
        row += (
            ["baseline", words.NONE]
            if is_base
            else [words.gain(own.get("gain")), words.interval(own.get("gain"))]
        )
        row.append(str(len(arm["seeds"])))
        if is_first:
            steps = words.NONE if arm["steps"] is None else f"{arm['steps']:,}"
            equal = [words.at_equal(arm.get(what), is_finished=bool(arm["seeds"])) for what in words.EQUALS]
            row += [steps, words.seconds(arm["seconds"]), *equal]
        if has_published:
            row.append(words.published(arm["published"]))
        rows.append(row)
    return head, rows


def score_lines(results: Mapping) -> list[str]:
    """The table of the first test for a terminal."""
    test = next(iter(results["tests"]))
    head, rows = score_rows(results, test)
    widths = [max(len(row[k]) for row in (head, *rows)) for k in range(len(head))]
    lines = []
    for name, *cells in (head, *rows):
        right = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([f"{name:<{widths[0]}}", *right]))
    return [f"{test}:", *lines]


def type_rows(results: Mapping, test: str) -> tuple[list[str], list[list[str]]]:
    """Accuracy of each question type, and its gain in brackets. No rows where there is one type alone."""
    arms = {name: arm["tests"][test] for name, arm in results["arms"].items() if arm["tests"][test]}
    kinds = sorted({kind for own in arms.values() for kind in own["by_type"]})
    if len(kinds) < 2:
        return [], []
    rows = []
    for name, own in arms.items():
        cells = [name]
        for kind in kinds:
            change = own.get("gain_by_type", {}).get(kind)
            cells.append(
                words.percent(own["by_type"].get(kind)) + (f" ({words.gain(change)})" if change else "")
            )
        rows.append(cells)
    return ["arm", *kinds], rows


def _scores(results: Mapping, test: str) -> str:
    data = results["tests"][test]
    count = "no results yet" if data["questions"] is None else f"{data['questions']:,} questions"
    return f"{data['data']}, {count}.\n\n{table(*score_rows(results, test))}"


def _by_type(results: Mapping, test: str) -> str:
    head, rows = type_rows(results, test)
    return (
        f"Accuracy in %, and the gain over {results['baseline']} in points.\n\n{table(head, rows)}"
        if rows
        else ""
    )


def _arms(results: Mapping) -> str:
    rows = []
    for name, arm in results["arms"].items():
        stages = ", ".join(stage["label"] for stage in arm["stages"])
        first = next(iter(arm["runs"].values()))
        rows.append([name, stages, " ".join(first), arm["what"] or words.NONE])
    return table(["arm", "stages", "runs of the first seed, in `stages/`", "what"], rows, "---")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], side: str = "---:") -> str:
    """A Markdown table; all but the first column to the right, or as `side` says."""
    lines = [list(head), ["---", *[side] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
