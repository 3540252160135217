"""How far a long loop is: a bar on a terminal, a plain line now and then elsewhere, such as in a log file."""

from __future__ import annotations

import sys
from time import monotonic
from types import TracebackType
from typing import Self, TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


class Bar:
    """`advance` as parts are done. Elsewhere than on a terminal, a loop of under 10 s writes nothing."""

    def __init__(
        self, total: int, title: str, unit: str, *, is_shown: bool = True, stream: TextIO | None = None
    ) -> None:
        """`unit` is a plural; `stream` is stderr unless given."""
        self._stream = stream or sys.stderr
        self._total, self._title, self._unit = total, title, unit
        self._is_plain = is_shown and not self._stream.isatty()
        is_hidden = not is_shown or self._is_plain
        self._bar = tqdm(total=total, desc=title, unit=f" {unit}", disable=is_hidden, file=self._stream)
        self._done = 0
        self._last_line = monotonic()

    def advance(self, number: int = 1) -> None:
        self._done += number
        self._bar.update(number)
        now = monotonic()
        if self._is_plain and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            print(f"{self._title}: {self._done} of {self._total} {self._unit}", file=self._stream, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
