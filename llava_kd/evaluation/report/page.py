"""One self-contained report.html of a comparison run: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from llava_kd.data.sources.conversation import IMAGE_PLACEHOLDER
from llava_kd.durable import make_folder, write_text
from llava_kd.evaluation.report.charts import Line, dot_rows, line_chart, smooth
from llava_kd.evaluation.report.pictures import thumbnails
from llava_kd.evaluation.report.results import (
    Difference,
    Evaluated,
    Run,
    collect_results,
    difference,
    mean_by_noise,
    mean_by_type,
    read_run,
)
from llava_kd.evaluation.report.style import html_page
from llava_kd.evaluation.report.tables import card, facts, row, table
from llava_kd.evaluation.scorers.exact import is_correct

# docs/diagnostics.md; the gradients of the terms come first.
GRADIENT_SHARE = "gradient_share/"
TOKENS = {
    "tokens/student_nll": "the student's loss at response tokens, nats",
    "tokens/teacher_nll": "the teacher's, on the same tokens",
    "tokens/student_entropy": "entropy of the student's predictions, nats",
    "tokens/teacher_entropy": "entropy of the teacher's predictions",
    "tokens/top1_agreement": "share of tokens with the same first choice",
    "tokens/teacher_better": "share of tokens where the teacher's loss is lower",
}
NAMES = {"teacher": "Teacher", "baseline": "Undistilled", "distilled": "Distilled"}


def report(run_dir: str | Path, *, terms: Mapping[str, str], distilled: str = "kd") -> Path:
    """Write RUN/results.json and RUN/report.html from a run directory (layout: see `results`).

    `terms`: the figures to draw, each with what it says.
    """
    run = read_run(run_dir, distilled=distilled)
    results = collect_results(run)
    write_text(run.directory / "results.json", json.dumps(results, indent=2) + "\n")
    return write_report(run, run.directory / "report.html", terms)


def write_report(
    run: Run, out_html: str | Path, terms: Mapping[str, str], *, title: str = "Distillation report"
) -> Path:
    """Write the page of one run; its path."""
    sections = [
        _headline(run, title),
        _by_type(run),
        _by_noise(run),
        _seeds(run),
        _losses(run, terms),
        _diagnostics(run, terms),
        _examples(run),
        _facts(run),
    ]
    out_html = Path(out_html)
    make_folder(out_html.parent)
    write_text(out_html, html_page(title, sections))
    return out_html


def _models(run: Run) -> dict[str, list[Evaluated]]:
    """Models by role, one per seed (one teacher)."""
    models = {"teacher": [run.teacher]} if run.teacher is not None else {}
    models["baseline"] = [seed[run.baseline] for seed in run.seeds.values()]
    models["distilled"] = [seed[run.distilled] for seed in run.seeds.values()]
    return models


def _accuracy(models: Sequence[Evaluated]) -> float:
    return sum(m.accuracy for m in models) / len(models)


def _points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "&minus;")


def _headline(run: Run, title: str) -> str:
    models = _models(run)
    gap = difference(run)
    count = models["distilled"][0].count
    seeds = len(run.seeds)
    tiles = []
    for role, name in NAMES.items():
        if role in models:
            who = "one model" if role == "teacher" else f"mean of {seeds} seeds" if seeds > 1 else "one seed"
            tiles.append(
                f'<div class="tile {role}"><small>{name}</small>'
                f"<strong>{100 * _accuracy(models[role]):.1f}&thinsp;%</strong><small>{who}</small></div>"
            )
    reach, note = _interval(gap)
    tiles.append(
        f'<div class="tile gain"><small>Gain from the teacher</small><strong>{_points(gap["mean"])}</strong>'
        f"<small>points{reach}</small></div>"
    )
    lead = (
        f"The distilled student answers <b>{100 * _accuracy(models['distilled']):.1f} %</b> of {count:,} "
        "held-out questions, the same student trained without a teacher "
        f"<b>{100 * _accuracy(models['baseline']):.1f} %</b>."
    )
    if "teacher" in models:
        lead += _standing(*(_accuracy(models[role]) for role in ("teacher", "baseline", "distilled")))
    note += escape(run.settings.get("note", ""))
    return (
        f'<h1>{escape(title)}</h1><p class="lead">{lead}</p><div class="tiles">{"".join(tiles)}</div>'
        f'<p class="note">{note}</p>'
    )


def _standing(teacher: float, baseline: float, distilled: float) -> str:
    if distilled <= baseline:
        return " The teacher did not help here."
    if distilled < teacher:
        share = (distilled - baseline) / (teacher - baseline)
        return f" That closes {100 * share:.0f} % of the distance to the teacher."
    if baseline < teacher:
        return f" The teacher itself answers {100 * teacher:.1f} %, and is reached."
    return f" The teacher itself answers {100 * teacher:.1f} %, no more than a student without it."


def _interval(gap: Difference) -> tuple[str, str]:
    """The interval beside the gain, and what a reader may conclude from it."""
    low, high = gap["low"], gap["high"]
    if low is None or high is None:
        return "", ""
    note = f"Interval: {gap['interval']}. "
    if low <= 0 <= high:
        note += "It contains zero: this run alone does not show that the teacher changes the score. "
    return f"; 95 % {_points(low)} to {_points(high)}", note


def _legend(roles: Sequence[str]) -> str:
    return '<div class="legend">' + "".join(f'<span class="{r}">{NAMES[r]}</span>' for r in roles) + "</div>"


def _by_type(run: Run) -> str:
    models = _models(run)
    scores = {role: mean_by_type(group) for role, group in models.items()}
    kinds = sorted(scores["distilled"], key=lambda k: scores["baseline"][k] - scores["distilled"][k])
    dots = {kind: {role: scores[role][kind] for role in models} for kind in kinds}
    rows = [_score_row(kind, dots[kind]) for kind in kinds]
    total = {role: _accuracy(group) for role, group in models.items()}
    rows.append(_score_row("all questions", total, style="total"))
    head = ["%", *(NAMES[role] for role in models), "gain, points"]
    return (
        f"<h2>By question type</h2>{_legend(list(models))}"
        f'<div class="pair"><div class="card">{dot_rows(dots, title="Accuracy by question type")}</div>'
        f"{card('Accuracy by question type', table(head, rows))}</div>"
    )


def _by_noise(run: Run) -> str:
    """Where all of the models were asked about pictures with noise."""
    models = _models(run)
    scores = {role: mean_by_noise(group) for role, group in models.items()}
    levels = [level for level in scores["distilled"] if all(level in own for own in scores.values())]
    if not levels:
        return ""
    rows = [_score_row(level, {role: scores[role][level] for role in models}) for level in levels]
    head = ["noise", *(NAMES[role] for role in models), "gain, points"]
    note = "Accuracy in %; noise as a standard deviation, as a share of the range of a pixel."
    shown = card("Accuracy by noise", table(head, rows), style="narrow")
    return f'<h2>By noise of the picture</h2><p class="note">{note}</p>{shown}'


def _score_row(name: str, scores: Mapping[str, float], style: str = "") -> str:
    cells = [f"{100 * value:.1f}" for value in scores.values()]
    gain = scores["distilled"] - scores["baseline"]
    sign = "up" if gain > 0 else "down" if gain < 0 else ""
    return row(name, cells, style=style, last=f'<td class="{sign}">{_points(gain)}</td>')


def _seeds(run: Run) -> str:
    if len(run.seeds) == 1:
        return ""
    rows = []
    for seed, models in run.seeds.items():
        scores = {
            "baseline": models[run.baseline].accuracy,
            "distilled": models[run.distilled].accuracy,
        }
        rows.append(_score_row(f"seed {seed}", scores))
    head = ["%", NAMES["baseline"], NAMES["distilled"], "gain, points"]
    return f"<h2>By seed</h2>{card('Accuracy by seed', table(head, rows), style='narrow')}"


def _losses(run: Run, terms: Mapping[str, str]) -> str:
    seeds = "One line a seed; r" if len(run.seeds) > 1 else "R"
    note = f"{seeds}unning means over the training batches, before weighting; each axis has its own range."
    return _curves(run, terms, title="Losses", note=note, lacking="not a term here")


def _diagnostics(run: Run, terms: Mapping[str, str]) -> str:
    """Below the losses, where a run was diagnosed."""
    shares = {f"{GRADIENT_SHARE}{term}": "of the gradient at the final hidden states" for term in terms}
    note = "Measured every few steps (docs/diagnostics.md); each axis has its own range."
    return _curves(run, shares | TOKENS, title="Diagnostics", note=note, lacking="not known here")


def _curves(run: Run, figures: Mapping[str, str], *, title: str, note: str, lacking: str) -> str:
    """A row of charts per figure, a column per stage; every seed is a line."""
    roles = {run.baseline: "baseline", run.distilled: "distilled"}
    stages = sorted({stage for arms in run.logs.values() for arm in arms.values() for stage in arm})
    cells = [f'<div class="head"><b>{escape(stage)}</b>, optimiser steps</div>' for stage in stages]
    heads = len(cells)
    for name, meaning in figures.items():
        charts = [line_chart(_lines(run, roles, stage, name), title=f"{name}, {stage}") for stage in stages]
        if not any(charts):
            continue
        cells.append(f'<div class="term">{escape(name)}<small>{escape(meaning)}</small></div>')
        cells += [
            f'<div class="chart" data-stage="{escape(stage)}">{chart}</div>'
            if chart
            else f'<div class="none">{lacking}</div>'
            for stage, chart in zip(stages, charts, strict=True)
        ]
    if len(cells) == heads:
        return ""
    return (
        f'<h2>{title}</h2><p class="note">{note}</p>{_legend(["baseline", "distilled"])}'
        '<div class="card"><div class="curves" '
        f'style="grid-template-columns:repeat({len(stages)},minmax(0,1fr))">'
        f"{''.join(cells)}</div></div>"
    )


def _lines(run: Run, roles: Mapping[str, str], stage: str, term: str) -> list[Line]:
    lines = []
    for arms in run.logs.values():
        for arm, role in roles.items():
            rows = [row for row in arms.get(arm, {}).get(stage, []) if term in row]
            values = smooth([row[term] for row in rows], window=max(1, len(rows) // 40))
            if any(values):
                lines.append(Line(role, tuple(row["step"] for row in rows), values))
    return lines


def _examples(run: Run, count: int = 9) -> str:
    """Questions of the first seed: where the students differ, in both directions, and where they do not."""
    seed, models = next(iter(run.seeds.items()))
    baseline, distilled = models[run.baseline].answers, models[run.distilled].answers
    groups: dict[tuple[bool, bool], list[str]] = {(d, b): [] for d in (True, False) for b in (True, False)}
    for name, answer in distilled.items():
        if name in baseline:
            groups[is_right(answer), is_right(baseline[name])].append(name)
    if not any(groups.values()):
        return ""
    shares = {(True, False): 4, (False, True): 2, (False, False): 2, (True, True): 1}
    shown: set[str] = set()
    chosen = [
        name for key, share in shares.items() for name in _spread(groups[key], distilled, share, shown)
    ][:count]
    cards = [_card(run, name, distilled[name], baseline[name]) for name in chosen]
    words = (
        f"Seed {seed}. Only the distilled student is right {len(groups[True, False]):,} times, only the "
        f"undistilled one {len(groups[False, True]):,} times, both {len(groups[True, True]):,} and neither "
        f"{len(groups[False, False]):,} times. Below are examples of each case, spread over the types."
    )
    return (
        f'<h2>Some test questions</h2><p class="note">{words}</p><div class="examples">{"".join(cards)}</div>'
    )


def is_right(answer: Mapping[str, str]) -> bool:
    return is_correct(answer["answer"], answer["truth"])


def _spread(
    names: Sequence[str], answers: Mapping[str, Mapping[str, str]], count: int, shown: set[str]
) -> list[str]:
    """`count` names, of each question type in turn, about pictures that are not `shown` while there are."""
    by_kind: dict[str, list[str]] = {}
    for name in names:
        by_kind.setdefault(answers[name]["type"], []).append(name)
    found: list[str] = []
    while by_kind and len(found) < count:
        for kind, rest in list(by_kind.items())[: count - len(found)]:
            name = next((name for name in rest if answers[name]["image"] not in shown), rest[0])
            shown.add(answers[name]["image"])
            found.append(name)
            rest.remove(name)
            if not rest:
                del by_kind[kind]
    return found


def _card(run: Run, name: str, distilled: Mapping[str, str], baseline: Mapping[str, str]) -> str:
    given = {"baseline": baseline, "distilled": distilled}
    if run.teacher is not None and name in run.teacher.answers:
        given = {"teacher": run.teacher.answers[name], **given}
    rows = [f"<dt>Truth</dt><dd>{escape(distilled['truth'])}</dd>"]
    for role, answer in given.items():
        mark = "right" if is_right(answer) else "wrong"
        rows.append(
            f'<dt>{NAMES[role]}</dt><dd class="{mark}">{escape(answer["answer"]) or "(nothing)"}</dd>'
        )
    question = distilled["question"].replace(IMAGE_PLACEHOLDER, "").strip()
    return (
        f'<div class="example">{thumbnails(run.directory, distilled["image"])}'
        f"<div><p>{escape(question)}</p><dl>{''.join(rows)}</dl></div></div>"
    )


def _facts(run: Run) -> str:
    models = _models(run)
    known = {f"seconds, {name}": f"{value:,.0f}" for name, value in run.seconds.items()}
    known |= {f"seconds to answer, {NAMES[r].lower()}": f"{m[0].seconds:,.1f}" for r, m in models.items()}
    known |= {name: value for name, value in run.settings.items() if name != "note"}
    known |= {name: value for name, value in models["distilled"][0].versions.items()}
    first = run.directory / f"seed{next(iter(run.seeds))}" / run.distilled
    recipes = sorted(first.glob("*/config.yaml"))
    shown = "".join(
        f"<details><summary>{escape(p.parent.name)}: the resolved settings of the distilled student</summary>"
        f"<pre>{escape(p.read_text(encoding='utf-8'))}</pre></details>"
        for p in recipes
    )
    listed = card("Settings, versions, time", facts(list(known.items())), style="facts")
    return f"<h2>Settings, versions, time</h2>{listed}{shown}"
