"""A user's folder of pictures and the rows of a table about them, of coloured squares."""

from __future__ import annotations

import csv
from pathlib import Path

from PIL import Image

COLOURS = ("red", "green", "blue", "yellow")
ROOT = Path(__file__).parents[1]
BACKBONES = ROOT / "scripts" / "quickstart" / "backbones"


def write_pictures(folder: Path, count: int) -> list[list[str]]:
    """`IMG_0001.png` and on in `folder`; a row of image, question and answer for each."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(1, count + 1):
        colour = COLOURS[number % len(COLOURS)]
        Image.new("RGB", (48, 48), colour).save(folder / f"IMG_{number:04d}.png")
        rows.append([f"IMG_{number:04d}.png", "What colour is it?", colour])
    return rows


def write_csv(
    path: Path, rows: list[list[str]], names: tuple[str, ...] = ("image", "question", "answer")
) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([list(names), *rows])
    return path
