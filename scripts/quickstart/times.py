"""Keeps the seconds of a run's phases, added up over calls, in RUN/seconds.json.

python scripts/quickstart/times.py RUN first PHASE  a call begins: a killed one ended with its last file
python scripts/quickstart/times.py RUN next PHASE   the phase under way is over, PHASE begins
python scripts/quickstart/times.py RUN stop         the phase under way is over
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

PHASES = ("install", "train", "eval")
UNDER_WAY = ".phase.json"


def settle(run: Path, end: float) -> None:
    """Add the phase under way, from its beginning to `end`."""
    mark = run / UNDER_WAY
    if not mark.is_file():
        return
    phase, began = json.loads(mark.read_text())
    total = run / "seconds.json"
    seconds = json.loads(total.read_text()) if total.is_file() else dict.fromkeys(PHASES, 0.0)
    seconds[phase] = round(seconds[phase] + max(0.0, end - began), 1)
    write(total, seconds)
    mark.unlink()


def write(path: Path, value: object) -> None:
    scratch = path.with_name(f"{path.name}.tmp")
    scratch.write_text(json.dumps(value) + "\n")
    scratch.replace(path)


def last_file(run: Path) -> float:
    return max(path.stat().st_mtime for path in run.rglob("*") if path.is_file())


def main() -> None:
    run, what, *phase = Path(sys.argv[1]), *sys.argv[2:]
    run.mkdir(parents=True, exist_ok=True)
    settle(run, last_file(run) if what == "first" and (run / UNDER_WAY).is_file() else time.time())
    for name in phase:
        write(run / UNDER_WAY, [name, time.time()])


if __name__ == "__main__":
    main()
