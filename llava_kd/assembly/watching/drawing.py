"""A run as plain text, for a terminal of 40 columns and up."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from llava_kd.assembly.watching.reading import Seen, duration

FEWEST_COLUMNS = 40
MOST_CURVE = 60
BARS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
PLAIN_BARS = "_.-=+*#@"  # where the terminal's encoding has no blocks


def draw(seen: Seen, columns: int, *, bars: str = BARS) -> str:
    """Lines of at most `columns` characters (40 at least)."""
    columns = max(FEWEST_COLUMNS, columns)
    lines = [f"{seen.directory.parent.name}/{seen.directory.name}: {seen.state}", *_progress(seen)]
    lines += _curves(seen, columns, bars)
    lines += [_rates(seen)] if seen.lines else []
    lines += seen.said
    return "\n".join(line[:columns] for line in lines if line)


def _progress(seen: Seen) -> list[str]:
    last = seen.last
    if not last:
        return []
    of = f" of {last['num_steps']:.0f}" if "num_steps" in last else ""
    share = f" ({last['step'] / last['num_steps']:.0%})" if last.get("num_steps") else ""
    epoch = f", epoch {last['epoch']:.2f}" if "epoch" in last else ""
    left = "" if seen.seconds_left is None else f", {duration(seen.seconds_left)} left"
    return [f"step {last['step']:.0f}{of}{share}{epoch}{left}"]


def _curves(seen: Seen, columns: int, bars: str) -> list[str]:
    names = seen.losses
    wide = max((len(name) for name in names), default=0)
    wide = min(wide, columns // 3)
    lines = []
    for name in names:
        values = seen.curve(name)
        figures = f"{values[0]:.3g} > {values[-1]:.3g}"
        room = min(MOST_CURVE, columns - wide - len(figures) - 2)
        lines.append(f"{name[-wide:]:<{wide}} {sparkline(values, max(1, room), bars)} {figures}")
    return lines


def sparkline(values: Sequence[float], width: int, bars: str = BARS) -> str:
    """Means of as many equal parts of the values, each a bar between the least and the most of them."""
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)] if count else []
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    span = high - low or 1.0
    return "".join(bars[min(len(bars) - 1, int((mean - low) / span * len(bars)))] for mean in means)


def _rates(seen: Seen) -> str:
    last = seen.last
    shown = [
        (f"{last['samples_per_s']:.3g} samples/s" if "samples_per_s" in last else ""),
        (f"data wait {last['data_wait_share']:.0%}" if "data_wait_share" in last else ""),
        (f"peak {last['peak_memory_gb']:.2g} GB" if "peak_memory_gb" in last else ""),
        (f"lr {last['lr']:.2g}" if "lr" in last else ""),
    ]
    return ", ".join(part for part in shown if part)
