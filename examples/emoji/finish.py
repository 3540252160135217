"""What the report shows beside the scores: sizes, seconds of training, and how unseen things went.

python examples/emoji/finish.py --run DIR --minutes 30
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

from llava_kd.search.findings.curves import stage_log

ARMS = {"undistilled": "sft", "distilled": "kd"}


def spent(arm: Path) -> tuple[float, float]:
    """Seconds of the optimiser steps of an arm, and operations in TFLOP, the teacher's among them."""
    seconds = tflop = 0.0
    for folder in sorted(arm.glob("stage*")):
        if lines := stage_log(folder):
            seconds += lines[-1].seconds
            tflop += lines[-1].tflop or 0.0
    return seconds, tflop


def accuracy(folder: Path) -> str:
    path = folder / "summary.json"
    if not path.is_file():
        return "not scored"
    summary = json.loads(path.read_text(encoding="utf-8"))
    return f"{100 * summary['accuracy']:.1f} % of {summary['count']}"


def settings(run: Path, minutes: float) -> dict[str, str]:
    facts = json.loads((run / "data/facts.json").read_text(encoding="utf-8"))
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    found = {
        "parts": "SmolLM2-135M-Instruct (Q4_1), DINOv2 ViT-S/14 at layer -4; student: 6 of 30 layers",
        "pictures": f"{facts['pictures']} of {facts['things']} things by {', '.join(facts['artists'])}",
        "held out": f"the artist {facts['test artist']}; the things {', '.join(facts['unseen things'])}",
        "planned minutes": f"{minutes:g}",
        "commit": done.stdout.strip() or "unknown",
        "unseen things, teacher": accuracy(run / "teacher/new_things"),
    }
    for seed in sorted(run.glob("seed*")):
        for name, arm in ARMS.items():
            key = f"unseen things, {name}, {seed.name}"
            found[key] = accuracy(seed / arm / "new_things")
            seconds, tflop = spent(seed / arm)
            found[f"training, {name}, {seed.name}"] = (
                f"{seconds:,.0f} s of optimiser steps, {tflop:,.1f} TFLOP"
            )
        longer = run / "equal" / seed.name
        seconds, tflop = spent(longer)
        found[f"undistilled at equal operations, {seed.name}"] = (
            f"{accuracy(longer / 'eval')}, unseen things {accuracy(longer / 'new_things')}; "
            f"{seconds:,.0f} s of optimiser steps, {tflop:,.1f} TFLOP"
        )
    found["note"] = (
        "Both arms took the same steps and records; a distilled step costs more, for the teacher runs beside "
        "it. An undistilled student that was trained longer, for as many operations, stands below: compare "
        "with that one before you call it a gain."
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    a = parser.parse_args()
    text = json.dumps(settings(a.run, a.minutes), indent=1)
    (a.run / "settings.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
