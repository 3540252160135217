"""Warn of empty answers in lmms-eval's sample files: it turns an error in generate into an empty answer."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def empty_answers(folder: Path) -> dict[str, tuple[int, int]]:
    """Empty and all answers of each sample file."""
    counts = {}
    for path in sorted(folder.rglob("*_samples_*.jsonl")):
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line]
        answers = [json.loads(line).get("filtered_resps") for line in lines]
        empty = sum(not str(a[0] if isinstance(a, list) and a else a or "").strip() for a in answers)
        counts[path.name] = (empty, len(answers))
    return counts


def main() -> None:
    counts = empty_answers(Path(sys.argv[1]))
    if not counts:
        raise SystemExit(f"{sys.argv[1]} has no sample files of lmms-eval")
    for name, (empty, total) in counts.items():
        print(f"lmms-eval: {name}: {total} answers, {empty} empty")
    if any(empty == total for empty, total in counts.values()):
        raise SystemExit("every answer is empty: generation failed; look for the error above")


if __name__ == "__main__":
    main()
