"""How far a run is, for people: one line that is written over on a terminal, a line a report elsewhere."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import TextIO

from tqdm import tqdm

FEWEST_COLUMNS = 40


class Progress:
    """`step` as each is done, `report` as figures come. Messages go through `tqdm.write`, above the line."""

    def __init__(
        self,
        num_steps: int,
        title: str,
        *,
        line: int = 0,
        is_shown: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        """`line` keeps the lines of runs that share a terminal apart. `stream` is stderr unless given."""
        self._stream = stream or sys.stderr
        self._num_steps, self._title = num_steps, title
        self._is_plain = is_shown and not self._stream.isatty()
        self._bar = tqdm(
            total=num_steps,
            bar_format="{desc}",
            disable=not is_shown or self._is_plain,
            mininterval=1.0,
            position=line,
            file=self._stream,
        )
        self._done = 0
        self._seconds: float | None = None  # a step, smoothed
        self._figures: Sequence[str] = ()

    @property
    def seconds_left(self) -> float | None:
        """At the speed of the last reports; None before the first."""
        return None if self._seconds is None else self._seconds * (self._num_steps - self._done)

    def resume(self, step: int) -> None:
        self._done = self._bar.n = step
        self._draw(advance=0)

    def step(self) -> None:
        self._done += 1
        self._draw(advance=1)

    def timed(self, seconds_per_step: float) -> None:
        """The mean since the report before."""
        before = self._seconds
        self._seconds = seconds_per_step if before is None else (before + seconds_per_step) / 2

    def report(self, figures: Mapping[str, float], terms: Sequence[str]) -> None:
        """Show the figures of a line of the metrics, the loss of each of `terms` among them."""
        shown = []
        if "loss" in figures:
            shown.append(f"loss {figures['loss']:.3g}")
        if "samples_per_s" in figures:
            shown.append(f"{figures['samples_per_s']:.3g} samples/s")
        if "data_wait_share" in figures:
            shown.append(f"data wait {figures['data_wait_share']:.0%}")
        if len(terms) > 1:
            shown += [f"{name} {figures[name]:.3g}" for name in terms if name in figures]
        self._figures = shown
        if self._is_plain:
            print(self.text(), file=self._stream, flush=True)
        self._draw(advance=0)

    def text(self, columns: int | None = None) -> str:
        """The line; what comes last in importance is left out first, until it fits."""
        left = self.seconds_left
        head = f"{self._title} {self._done}/{self._num_steps}"
        parts = [head, *([] if left is None else [f"{clock(left)} left"]), *self._figures]
        while columns is not None and len(parts) > 1 and len(" | ".join(parts)) > columns:
            parts.pop()
        return " | ".join(parts) if columns is None else " | ".join(parts)[:columns]

    def close(self) -> None:
        self._draw(advance=0)
        self._bar.close()

    def _draw(self, *, advance: int) -> None:
        if self._bar.disable:
            return
        columns = shutil.get_terminal_size((80, 24)).columns
        self._bar.set_description_str(self.text(max(FEWEST_COLUMNS, columns) - 1), refresh=False)
        self._bar.update(advance) if advance else self._bar.refresh()


def clock(seconds: float) -> str:
    """As 2:10, 1:02:10 or 3 d 01:02."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
