"""Tables that a screen reader can follow: every column and every row has its heading."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def table(head: Sequence[str], rows: Sequence[str], *, style: str = "") -> str:
    """`head`: text of every column; `rows`: of `row`."""
    columns = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    return f"<table{_class(style)}><thead><tr>{columns}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values, which need no heads of columns."""
    return f"<table><tbody>{''.join(row(name, [value]) for name, value in rows)}</tbody></table>"


def row(name: str, cells: Sequence[str], *, style: str = "", last: str = "") -> str:
    """`last` is a cell that is HTML already; all else is text."""
    values = "".join(f"<td>{escape(text)}</td>" for text in cells)
    return f'<tr{_class(style)}><th scope="row">{escape(name)}</th>{values}{last}</tr>'


def card(name: str, content: str, *, style: str = "") -> str:
    """A frame that scrolls where it is too narrow, by keys too; a screen reader says its `name`."""
    classes = f"card {style}".strip()
    return f'<div class="{classes}" role="region" tabindex="0" aria-label="{escape(name)}">{content}</div>'


def _class(style: str) -> str:
    return f' class="{style}"' if style else ""
