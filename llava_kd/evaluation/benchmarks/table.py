"""A model's figures beside the published ones, as Markdown and as a self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from llava_kd.evaluation.benchmarks.catalogue import BENCHMARKS
from llava_kd.evaluation.benchmarks.published import AVG7, AVG10, PUBLISHED, average
from llava_kd.evaluation.report.style import CSS

Trials = Mapping[str, tuple[float, int]]  # figure of the first so many questions alone: no result
COLUMNS = {name: benchmark.column for name, benchmark in BENCHMARKS.items()}

SOURCE = (
    "MME is the perception sum / 20. Avg7: GQA, VizWiz, SQA, TextVQA, MME, MMB, MMB-CN; Avg10: all ten; "
    "neither is given where a figure is missing. POPE is the mean F1 here; some papers print the mean "
    "accuracy. VQAv2 and VizWiz come from their servers: add their figures to this table once you have them. "
    "Published rows: main table of LLaVA-KD (ICCV 2025), its TinyLLaVA rows retrained by its authors; "
    "Switch-KD's from its README."
)
STYLE = ".own td{background:var(--wash);font-weight:650}table{min-width:900px}main{max-width:1240px}"


def rows_of(
    model: str,
    values: Mapping[str, float],
    trials: Trials | None = None,
    columns: Mapping[str, str] = COLUMNS,
) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table, the user's own line first; `columns` names what is not of the ten too."""
    trials = trials or {}
    others = [name for name in (*values, *trials) if name not in AVG10]
    names = [*AVG10, *others]
    head = ["model", "data", *(columns[name] for name in names), "Avg7", "Avg10"]
    own = _line(model, "", values, names)
    for name, (value, count) in trials.items():
        own[2 + names.index(name)] = f"{value:.1f} (first {count:,} only)"
    lines = [own]
    lines += [_line(row.model, row.data, row.values, names) for row in PUBLISHED]
    return head, lines


def _line(model: str, data: str, values: Mapping[str, float], names: Sequence[str]) -> list[str]:
    averages = (average(values, AVG7), average(values, AVG10))
    figures = [*(values.get(name) for name in names), *averages]
    return [model, data, *("-" if figure is None else f"{figure:.1f}" for figure in figures)]


def markdown_table(
    model: str,
    values: Mapping[str, float],
    notes: Mapping[str, Sequence[str]],
    trials: Trials | None = None,
    columns: Mapping[str, str] = COLUMNS,
) -> str:
    head, lines = rows_of(model, values, trials, columns)
    rule = ["---", "---", *["---:"] * (len(head) - 2)]
    lines = [[f"**{cell}**" if cell else "" for cell in lines[0]], *lines[1:]]
    table = "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))
    remarks = "".join(f"- {name}: {note}\n" for name, found in notes.items() for note in found)
    return f"{table}\n\n{SOURCE}\n" + (f"\nRemarks:\n\n{remarks}" if remarks else "")


def html_table(
    model: str,
    values: Mapping[str, float],
    notes: Mapping[str, Sequence[str]],
    trials: Trials | None = None,
    columns: Mapping[str, str] = COLUMNS,
) -> str:
    head, lines = rows_of(model, values, trials, columns)
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = ""
    for number, line in enumerate(lines):
        style = ' class="own"' if number == 0 else ""
        body += f"<tr{style}>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>"
    remarks = "".join(f"<li>{escape(name)}: {escape(n)}</li>" for name, found in notes.items() for n in found)
    listed = f"<h2>Remarks</h2><ul>{remarks}</ul>" if remarks else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>Benchmarks: {escape(model)}</title><style>{CSS}{STYLE}</style></head><body><main>"
        f'<h1>{escape(model)}</h1><div class="card"><table><tr>{cells}</tr>{body}</table></div>'
        f'<p class="note">{escape(SOURCE)}</p>{listed}</main></body></html>\n'
    )
