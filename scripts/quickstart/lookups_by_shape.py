"""Keeps of a shapes instruction file only the questions that must find a shape by its form.

    python scripts/quickstart/lookups_by_shape.py DATA/instructions.json DATA/lookups_by_shape.json

Asked among all others, they stay at chance long after the rest is learned ("Where is the star?" 38 % after
7,200 steps, "Where is the blue shape?" 100 %); asked alone, they are learned in 300 steps and stay.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from llava_kd.data.shapes.scenes import COLOURS, SHAPES, SIZES

FORM = f"({'|'.join(SHAPES)})"
COLOUR = f"({'|'.join(COLOURS)})"
LOOKUP = re.compile(
    rf"What colour is the (({'|'.join(SIZES)}) )?{FORM}\?"
    rf"|Where is the ({COLOUR} )?{FORM}\?"
    rf"|Is there an? ({COLOUR} )?{FORM}\?"
)
FEWEST = 2  # questions that make a record worth its picture


def lookups(record: dict) -> dict | None:
    """The record with its lookups alone, or None where it has fewer than `FEWEST`."""
    turns = record["conversations"]
    kept = []
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        text = question["value"].removeprefix("<image>\n")
        if LOOKUP.fullmatch(text):
            kept += [{"from": "human", "value": text if kept else f"<image>\n{text}"}, answer]
    return record | {"conversations": kept} if len(kept) >= 2 * FEWEST else None


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    records = [found for record in json.loads(source.read_text()) if (found := lookups(record))]
    target.write_text(json.dumps(records, indent=1) + "\n")
    print(f"{len(records)} records with lookups by shape in {target}")


if __name__ == "__main__":
    main()
