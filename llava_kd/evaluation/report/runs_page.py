"""One self-contained page of any runs: what they reached, their curves, what they cost, how they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from llava_kd.data.sources.conversation import IMAGE_PLACEHOLDER
from llava_kd.durable import make_folder, write_text
from llava_kd.evaluation.report.charts import Line, line_chart, smooth
from llava_kd.evaluation.report.page import GRADIENT_SHARE, TOKENS, is_right
from llava_kd.evaluation.report.pictures import thumbnails
from llava_kd.evaluation.report.results import Evaluated
from llava_kd.evaluation.report.stage_runs import StageRun, differing
from llava_kd.evaluation.report.style import html_page
from llava_kd.evaluation.report.tables import card, facts, row, table

COLOURS = 8  # of the style sheet; more runs begin again
EXAMPLES = 12
COSTS = {
    "samples_per_s": "samples/s",
    "seconds_per_step": "s/step",
    "data_wait_share": "waits for data",
    "peak_memory_gb": "peak GB",
}
OF_THE_RUN = {"loss": "all terms, weighted", "grad_norm": "norm of the gradient", "lr": "learning rate"}


def write_runs_page(runs: Sequence[StageRun], out_html: str | Path, terms: Mapping[str, str]) -> Path:
    """Write the page; its path. `terms`: what each term of a loss says."""
    sections = [
        _headline(runs),
        _legend(runs),
        _curves(runs, {**terms, **OF_THE_RUN}, "Losses", "Running means over the training batches."),
        _curves(
            runs,
            _asked(runs),
            "While training",
            "The student's score on the questions, or its loss on held-out data.",
        ),
        _curves(runs, _diagnosed(terms), "Diagnostics", "Measured every few steps (docs/diagnostics.md)."),
        _scores(runs),
        _examples(runs),
        _differences(runs),
        _facts(runs),
    ]
    out_html = Path(out_html)
    make_folder(out_html.parent)
    write_text(out_html, html_page("Training report", sections, more_css=_hiding(runs)))
    return out_html


def _colour(place: int) -> str:
    return f"run{place % COLOURS}"


def _headline(runs: Sequence[StageRun]) -> str:
    done = sum(run.record is not None for run in runs)
    count = "One run" if len(runs) == 1 else f"{len(runs)} runs"
    lead = f"{count}, {'finished' if done == len(runs) else f'{done} of them finished'}."
    figures = [name for name in COSTS if any(run.last(name) is not None for run in runs)]
    rows = []
    for run in runs:
        steps = f"{run.lines[-1]['step']:,.0f}" if run.lines else "0"
        reached = [_number(run.last(name)) for name in ("loss", *figures)]
        rows.append(row(run.name, [run.state, steps, *reached]))
    head = ["run", "state", "steps", "last loss", *(COSTS[name] for name in figures)]
    return f'<h1>Training report</h1><p class="lead">{lead}</p>{card("The runs", table(head, rows))}'


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}"


def _legend(runs: Sequence[StageRun]) -> str:
    if len(runs) == 1:
        return ""
    names = "".join(
        f'<label class="{_colour(k)} only{k}"><input type="checkbox" checked> {escape(run.name)}</label>'
        for k, run in enumerate(runs)
    )
    return f'<fieldset class="legend"><legend>Shown in the charts</legend>{names}</fieldset>'


def _hiding(runs: Sequence[StageRun]) -> str:
    """Rules by which the ticks of the legend hide curves, without a script."""
    return "".join(
        f"main:has(.legend .only{k} input:not(:checked)) .curve.only{k}{{display:none}}"
        for k in range(len(runs))
    )


def _asked(runs: Sequence[StageRun]) -> dict[str, str]:
    names = {
        name for run in runs for line in run.lines for name in line if name.startswith(("slice/", "loss/"))
    }
    words = {"picture_gain": "rise of the loss with another picture, nats a token"}
    return {
        name: words.get(name.rpartition("/")[2], "accuracy" if name.startswith("slice/") else "nats a token")
        for name in sorted(names)
        if not name.endswith(("/seconds", "/bad_records"))
    }


def _diagnosed(terms: Mapping[str, str]) -> dict[str, str]:
    shares = {f"{GRADIENT_SHARE}{term}": "of the gradient at the final hidden states" for term in terms}
    return shares | TOKENS


def _curves(runs: Sequence[StageRun], figures: Mapping[str, str], title: str, note: str) -> str:
    """A chart per figure, a line per run; each axis has its own range."""
    cells = []
    for name, meaning in figures.items():
        chart = line_chart(_lines(runs, name), title=f"{name} over optimiser steps")
        if chart:
            what = f'<div class="what">{escape(name)}<small>{escape(meaning)}</small></div>'
            cells.append(f"<div>{what}{chart}</div>")
    if not cells:
        return ""
    return (
        f'<h2>{title}</h2><p class="note">{note} Over optimiser steps; each axis has its own range.</p>'
        f'<div class="card"><div class="charts">{"".join(cells)}</div></div>'
    )


def _lines(runs: Sequence[StageRun], name: str) -> list[Line]:
    lines = []
    for place, run in enumerate(runs):
        rows = [line for line in run.lines if name in line]
        values = smooth([row[name] for row in rows], window=max(1, len(rows) // 40))
        if any(values):
            lines.append(Line(f"{_colour(place)} only{place}", tuple(row["step"] for row in rows), values))
    return lines


def _scores(runs: Sequence[StageRun]) -> str:
    """Accuracies of the runs that were scored, by test and type of question."""
    scored = [(run.name, test, found) for run in runs for test, found in run.scores.items()]
    if not scored:
        return ""
    kinds = sorted({kind for *_, found in scored for kind in found.by_type})
    rows = [
        row(
            f"{name}, {test}",
            [f"{found.count:,}", f"{100 * found.accuracy:.1f}", *_percents(found.by_type, kinds)],
        )
        for name, test, found in scored
    ]
    shown = card("Scores", table(["%", "questions", "all", *kinds], rows))
    return f"<h2>Scores</h2>{shown}{_by_noise(scored)}"


def _percents(shares: Mapping[str, float], names: Sequence[str]) -> list[str]:
    return [f"{100 * shares[name]:.1f}" if name in shares else "-" for name in names]


def _by_noise(scored: Sequence[tuple[str, str, Evaluated]]) -> str:
    """Of those that were asked about pictures with noise."""
    asked = [(name, test, found.by_noise) for name, test, found in scored if found.by_noise]
    if not asked:
        return ""
    levels = sorted({level for *_, by_noise in asked for level in by_noise}, key=float)
    rows = [row(f"{name}, {test}", _percents(own, levels)) for name, test, own in asked]
    return (
        "<p class='note'>By noise of the picture: accuracy in %, noise as a standard deviation, as a share "
        f"of the range of a pixel.</p>{card('Accuracy by noise', table(['noise', *levels], rows))}"
    )


def _examples(runs: Sequence[StageRun]) -> str:
    """Questions that the runs were asked alike, with every answer; those that divide them first."""
    for test in {test: None for run in runs for test in run.scores}:
        asked = [run for run in runs if run.scores.get(test) is not None and run.scores[test].answers]
        if not asked:
            continue
        answers = {run.name: run.scores[test].answers for run in asked}
        first = answers[asked[0].name]
        shared = [name for name in first if all(name in given for given in answers.values())]
        shared.sort(key=lambda name: len({is_right(given[name]) for given in answers.values()}) == 1)
        cards = [_card(asked[0].directory, name, answers) for name in _spread(shared, first)]
        words = f"From {escape(test)}; questions on which the runs differ come first."
        return (
            f"<h2>Some test questions</h2><p class='note'>{words}</p>"
            f"<div class='examples'>{''.join(cards)}</div>"
        )
    return ""


def _spread(names: Sequence[str], answers: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The first of each type in turn."""
    turns: list[tuple[int, str]] = []
    seen: dict[str, int] = {}
    for name in names:
        kind = answers[name]["type"]
        turns.append((seen.get(kind, 0), name))
        seen[kind] = seen.get(kind, 0) + 1
    return [name for _, name in sorted(turns, key=lambda turn: turn[0])][:EXAMPLES]


def _card(directory: Path, name: str, answers: Mapping[str, Mapping[str, Mapping[str, str]]]) -> str:
    one = next(iter(answers.values()))[name]
    rows = [f"<dt>Truth</dt><dd>{escape(one['truth'])}</dd>"]
    for run, given in answers.items():
        mark = "right" if is_right(given[name]) else "wrong"
        rows.append(
            f'<dt>{escape(run)}</dt><dd class="{mark}">{escape(given[name]["answer"]) or "(nothing)"}</dd>'
        )
    question = one["question"].replace(IMAGE_PLACEHOLDER, "").strip()
    return (
        f'<div class="example">{thumbnails(directory, one["image"])}'
        f"<div><p>{escape(question)}</p><dl>{''.join(rows)}</dl></div></div>"
    )


def _differences(runs: Sequence[StageRun]) -> str:
    settings = differing(runs)
    settings.pop("output_dir", None)
    if len(runs) == 1 or not settings:
        return ""
    head = ["setting", *(run.name for run in runs)]
    shown = table(head, [row(name, values) for name, values in settings.items()], style="words")
    return f"<h2>Settings that differ</h2>{card('Settings that differ', shown)}"


def _facts(runs: Sequence[StageRun]) -> str:
    shown = []
    for run in runs:
        record = run.record or {}
        known = {"directory": str(run.directory), "commit": str(record.get("commit") or "-")}
        known |= {name: str(value) for name, value in record.get("versions", {}).items()}
        if parent := record.get("parent"):
            known["continues from"] = str(parent.get("run", "-"))
        text = (run.directory / "config.yaml").read_text(encoding="utf-8")
        shown.append(
            f"<details><summary>{escape(run.name)}: where it comes from, and its resolved settings</summary>"
            f"{card(f'Where {run.name} comes from', facts(list(known.items())), style='facts')}"
            f"<pre>{escape(text)}</pre></details>"
        )
    return f"<h2>Settings and versions</h2>{''.join(shown)}"
