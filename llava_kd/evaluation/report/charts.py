"""Small SVG charts whose colours come from the page's style sheet, so that light and dark both work."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Line:
    """One curve. `style` is the CSS class that colours it."""

    style: str
    steps: tuple[float, ...]
    values: tuple[float, ...]


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers that lie in [low, high]."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    unit = min((size * k for k in (1, 2, 2.5, 5, 10)), key=lambda u: abs(u - raw))
    first = math.ceil(low / unit - 1e-9)
    return [k * unit for k in range(first, math.floor(high / unit + 1e-9) + 1)]


def label(value: float) -> str:
    """A tick label without needless digits."""
    if abs(value) >= 1000:
        return f"{value / 1000:g}k"
    return f"{value:.3g}"


def smooth(values: Sequence[float], *, window: int) -> tuple[float, ...]:
    """Running mean of about `window` values: centred, and shorter at the start, where a loss falls fast."""
    total = [0.0]
    for value in values:
        total.append(total[-1] + value)
    result = []
    for k in range(len(values)):
        before = min(window // 2, k)
        end = min(k + before + 1, len(values))
        result.append((total[end] - total[k - before]) / (end - k + before))
    return tuple(result)


def thin(line: Line, limit: int = 240) -> Line:
    """The line with at most `limit` points, its last one kept."""
    if len(line.steps) <= limit:
        return line
    keep = sorted({round(k * (len(line.steps) - 1) / (limit - 1)) for k in range(limit)})
    return Line(line.style, tuple(line.steps[k] for k in keep), tuple(line.values[k] for k in keep))


def line_chart(lines: Sequence[Line], *, title: str, width: int = 340, height: int = 190) -> str:
    """Curves over steps; the value axis is logarithmic where the curves span more than a factor of 20."""
    lines = [line for line in lines if line.steps]
    if not lines:
        return ""
    left, right, top, bottom = 42, 10, 12, 24
    values = [value for line in lines for value in line.values]
    low, high = min(values), max(values)
    if high - low <= 1e-6 * abs(high):  # level, but for what a running mean rounds
        low, high = min(0.0, 2 * low), max(0.0, 2 * high)
    is_log = low > 0 and high / low > 20
    last = max(max(line.steps) for line in lines)
    first = min(min(line.steps) for line in lines)

    if is_log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = (1,) if high / low > 1000 else (1, 3)
        ticks = [k * 10.0**decade for decade in decades for k in steps]
        low, high = math.log10(low), math.log10(high)
    else:
        low = 0.0 if 0 <= low < 0.4 * high else low
        ticks = nice_ticks(low, high)
    span = (high - low) or 1.0

    def x(step: float) -> float:
        return left + (width - left - right) * (step - first) / ((last - first) or 1)

    def y(value: float) -> float:
        position = (math.log10(value) if is_log else value) - low
        return height - bottom - (height - top - bottom) * position / span

    parts = []
    for tick in ticks:
        if not top - 1 <= y(tick) <= height - bottom + 1:
            continue
        place = f'x="{left - 6}" y="{y(tick) + 3.5:.1f}" text-anchor="end"'
        parts.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        )
        parts.append(f'<text class="tick" {place}>{label(tick)}</text>')
    for tick in nice_ticks(first, last, 3):
        parts.append(
            f'<text class="tick" x="{x(tick):.1f}" y="{height - 6}" text-anchor="middle">{label(tick)}</text>'
        )
    if is_log:
        parts.append(
            f'<text class="tick" x="{width - right}" y="{top - 3}" text-anchor="end">log scale</text>'
        )
    for line in lines:
        line = thin(line)
        points = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in zip(line.steps, line.values, strict=True))
        parts.append(f'<polyline class="curve {line.style}" points="{points}"/>')
    return _svg(parts, width=width, height=height, title=title)


def dot_rows(
    rows: Mapping[str, Mapping[str, float]], *, title: str, width: int = 470, row_height: int = 43
) -> str:
    """A row per name, with a dot per style at its fraction in [0, 1] on a bar from lowest to highest."""
    left, right, top, bottom = 86, 18, 2, 26
    height = top + bottom + row_height * len(rows)
    inner = width - left - right
    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = left + inner * tick
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - bottom}"/>')
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{height - 8}" text-anchor="middle">{tick:.0%}</text>'
        )
    for k, (name, dots) in enumerate(rows.items()):
        y = top + row_height * (k + 0.5)
        parts.append(
            f'<text class="row" x="{left - 14}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>'
        )
        ends = [left + inner * value for value in dots.values()]
        parts.append(
            f'<line class="span" x1="{min(ends):.1f}" x2="{max(ends):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        for k, (style, value) in enumerate(dots.items()):
            # A dot that later ones would hide is a ring around them.
            hidden = sum(abs(value - other) < 0.012 for other in list(dots.values())[k + 1 :])
            hint = f"{name}, {style}: {value:.1%}"
            parts.append(
                f'<circle class="dot {escape(style)}" cx="{left + inner * value:.1f}" cy="{y:.1f}" '
                f'r="{6 + 3 * hidden}">'
                f"<title>{escape(hint)}</title></circle>"
            )
    return _svg(parts, width=width, height=height, title=title)


def _svg(parts: Sequence[str], *, width: int, height: int, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )
