"""results.html: one self-contained page, in the style of the report of a comparison run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from llava_kd.evaluation.report.charts import Line, label, line_chart, nice_ticks
from llava_kd.evaluation.report.style import html_page
from llava_kd.search.findings import words
from llava_kd.search.findings.curves import Curve
from llava_kd.search.findings.grid_tables import score_rows, type_rows

_MORE_CSS = """
table td,table th{white-space:normal}.grid-curves{display:grid;gap:14px;
grid-template-columns:repeat(auto-fill,minmax(300px,1fr))}
.grid-curves h3{margin-bottom:6px}li{max-width:80ch}
"""


def page(results: Mapping, curves: Mapping[str, Sequence[Curve]]) -> str:
    """`curves` of every arm, one a seed, for the charts."""
    title = f"Ablation: {results['name']}"
    sections = [_head(results, title), _missing(results)]
    for test in results["tests"]:
        sections += [_scores(results, test), _types(results, test)]
    sections += [_curves(results, curves), _arms(results), _how(results)]
    return html_page(title, sections, more_css=_MORE_CSS)


def _head(results: Mapping, title: str) -> str:
    lead = escape(results["what"]) or f"{len(results['arms'])} arms, {len(results['seeds'])} seeds."
    note = f"{words.cost_words(results)} {words.rank_words(results)}"
    return f'<h1>{escape(title)}</h1><p class="lead">{lead}</p><p class="note">{escape(note)}</p>'


def _missing(results: Mapping) -> str:
    lines, waiting = words.fault_words(results), words.waiting_words(results)
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    broken = f"<h2>Problems to fix</h2><ul>{items}</ul>" if lines else ""
    return broken + (f'<p class="note">{escape(waiting)}</p>' if waiting else "")


def _scores(results: Mapping, test: str) -> str:
    head, rows = score_rows(results, test)
    chart = _intervals(results, test)
    shown = f'<div class="card">{chart}</div>' if chart else ""
    return (
        f'<h2>{escape(test)}</h2>{shown}<div class="card" style="margin-top:14px">{_table(head, rows)}</div>'
    )


def _types(results: Mapping, test: str) -> str:
    head, rows = type_rows(results, test)
    note = f"Accuracy in %, and the gain over {results['baseline']} in points."
    if not rows:
        return ""
    return (
        f'<h2>{escape(test)}, by question type</h2><p class="note">{escape(note)}</p>'
        f'<div class="card">{_table(head, rows)}</div>'
    )


def _intervals(results: Mapping, test: str, width: int = 760, row_height: int = 30) -> str:
    """A line from end to end of each interval, a dot at the gain, and where zero is."""
    gains = {
        name: arm["tests"][test]["gain"]
        for name, arm in results["arms"].items()
        if arm["tests"][test] and arm["tests"][test].get("gain")
    }
    if not gains:
        return ""
    ends = [
        100 * value[k] for value in gains.values() for k in ("mean", "low", "high") if value[k] is not None
    ]
    low, high = min(0.0, *ends), max(0.0, *ends)
    span = (high - low) or 1.0
    left, right, top, bottom = 30 + 7.5 * max(map(len, gains)), 24, 6, 26
    height = top + bottom + row_height * len(gains)

    def x(value: float) -> float:
        return left + (width - left - right) * (value - low) / span

    parts = []
    for tick in nice_ticks(low, high):
        parts.append(
            f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top}" y2="{height - bottom}"/>'
        )
        parts.append(
            f'<text class="tick" x="{x(tick):.1f}" y="{height - 8}" text-anchor="middle">{label(tick)}</text>'
        )
    zero = f'x1="{x(0):.1f}" x2="{x(0):.1f}" y1="{top}" y2="{height - bottom}"'
    parts.append(f'<line style="stroke:var(--soft);stroke-width:1.5" {zero}/>')
    for k, (name, value) in enumerate(gains.items()):
        y = top + row_height * (k + 0.5)
        parts.append(
            f'<text class="row" x="{left - 14:.1f}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>'
        )
        if value["low"] is not None:
            reach = f'x1="{x(100 * value["low"]):.1f}" x2="{x(100 * value["high"]):.1f}"'
            parts.append(f'<line class="span" {reach} y1="{y:.1f}" y2="{y:.1f}"/>')
        hint = f"{name}: {words.gain(value)} points, 95 % {words.interval(value)}"
        parts.append(
            f'<circle class="dot distilled" cx="{x(100 * value["mean"]):.1f}" cy="{y:.1f}" r="6">'
            f"<title>{escape(hint)}</title></circle>"
        )
    name = f"Gain over {results['baseline']} on {test}, points, with 95 % intervals"
    return (
        f'<h3>{escape(name)}</h3><svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(name)}">'
        f"<title>{escape(name)}</title>{''.join(parts)}</svg>"
    )


def _curves(results: Mapping, curves: Mapping[str, Sequence[Curve]]) -> str:
    """A chart for each arm: it and the baseline over seconds of training, a line a seed."""
    base = _lines(curves.get(results["baseline"], ()), "baseline")
    cells = []
    for name, own in curves.items():
        lines = _lines(own, "distilled")
        if name == results["baseline"] or not lines:
            continue
        chart = line_chart([*base, *lines], title=f"{name}: {results['curve']} over seconds of training")
        cells.append(f'<div class="card"><h3>{escape(name)}</h3>{chart}</div>')
    if not cells:
        return ""
    legend = (
        f'<div class="legend"><span class="baseline">{escape(results["baseline"])}</span>'
        '<span class="distilled">the arm</span></div>'
    )
    note = f"{results['curve']} over seconds of training, all stages in sequence, one line per seed."
    return (
        f'<h2>At equal time</h2><p class="note">{escape(note)}</p>{legend}'
        f'<div class="grid-curves">{"".join(cells)}</div>'
    )


def _lines(curves: Sequence[Curve], style: str) -> list[Line]:
    return [
        Line(style, tuple(p.seconds for p in curve.points), tuple(p.value for p in curve.points))
        for curve in curves
        if len(curve.points) > 1
    ]


def _arms(results: Mapping) -> str:
    rows = [
        [name, ", ".join(stage["label"] for stage in arm["stages"]), arm["what"] or words.NONE]
        for name, arm in results["arms"].items()
    ]
    return f'<h2>Arms</h2><div class="card facts">{_table(["arm", "stages", "what"], rows)}</div>'


def _how(results: Mapping) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in words.method_words(results))
    commits = f"<p>Commit: {escape(', '.join(results['commits']))}.</p>" if results["commits"] else ""
    return f"<h2>How</h2><ul>{items}</ul>{commits}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"
