"""`llava-kd watch`: drawn anew every few seconds on a terminal, once elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

from llava_kd.assembly.watching.drawing import BARS, PLAIN_BARS, draw
from llava_kd.assembly.watching.reading import look

CLEAR = "\x1b[H\x1b[2J"


def watch(directory: str, *, every: float, once: bool = False) -> None:
    """Until the run is complete, or Ctrl-C. Raises ValueError for what is no run."""
    bars = BARS if can_write(BARS, sys.stdout.encoding) else PLAIN_BARS
    is_terminal = sys.stdout.isatty()
    while True:
        seen = look(Path(directory))
        text = draw(seen, shutil.get_terminal_size((80, 24)).columns - 1, bars=bars)
        if not can_write(text, sys.stdout.encoding):
            text = text.encode("ascii", "replace").decode()
        print(f"{CLEAR if is_terminal else ''}{text}", flush=True)
        if once or not is_terminal or seen.is_complete:
            return
        try:
            time.sleep(every)
        except KeyboardInterrupt:
            return


def can_write(text: str, encoding: str | None) -> bool:
    try:
        text.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
