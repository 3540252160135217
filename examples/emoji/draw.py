"""Drawings as PNG pictures on white, and the colour that most of a drawing has."""

from __future__ import annotations

import colorsys
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from things import Artist, Thing, key_of

CLEAR = 0.45  # share of a drawing that its main colour must have to be asked for
Render = Callable[[str, int], bytes]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A picture file, below the data's folder, of a thing by an artist; `colour` None where none is clear."""

    thing: Thing
    artist: str
    file: str
    colour: str | None


def resvg(svg: str, size: int) -> bytes:
    """PNG with transparency. Raises ValueError for an SVG that does not render."""
    try:
        import resvg_py  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise SystemExit(
            "the drawings need resvg-py, as examples/emoji/requirements.txt pins it; run.sh installs it"
        ) from error
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True))


def colour_name(red: int, green: int, blue: int) -> str:
    """By hue, saturation and value, in the words that a child would use."""
    hue, saturation, value = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
    degrees = hue * 360
    if value < 0.2:
        return "black"
    if saturation < 0.15:
        return "white" if value > 0.85 else "grey" if value > 0.25 else "black"
    if degrees < 30 and saturation < 0.45 and value > 0.8:
        return "pink"
    if degrees < 15 or degrees >= 345:
        return "pink" if saturation < 0.45 and value > 0.7 else "red" if value > 0.55 else "brown"
    if degrees < 45:
        return "brown" if value < 0.72 else "orange"
    for end, name in ((70, "yellow"), (165, "green"), (255, "blue"), (295, "purple"), (345, "pink")):
        if degrees < end:
            return name
    raise AssertionError(degrees)


def main_colour(picture: Image.Image) -> str | None:
    """Of the opaque pixels of an RGBA picture; None where no colour has a clear share of them."""
    pixels = np.asarray(picture.convert("RGBA")).reshape(-1, 4)
    opaque = pixels[pixels[:, 3] > 200][:, :3] // 8 * 8  # few enough colours to name each once
    if not len(opaque):
        return None
    found, counts = np.unique(opaque, axis=0, return_counts=True)
    by_name: Counter[str] = Counter()
    for (red, green, blue), count in zip(found.tolist(), counts.tolist(), strict=True):
        by_name[colour_name(red, green, blue)] += count
    name, count = by_name.most_common(1)[0]
    return name if count / len(opaque) >= CLEAR else None


def draw(
    things: Sequence[Thing], artists: Sequence[Artist], out: Path, size: int, render: Render = resvg
) -> tuple[list[Drawing], list[str]]:
    """Every thing by every artist that has it, into `out`/pictures; and what did not render, in lines."""
    drawings, faults = [], []
    for artist in artists:
        folder = out / "pictures" / artist.name
        folder.mkdir(parents=True, exist_ok=True)
        for thing in things:
            if key_of(thing.name) not in artist.icons:
                faults.append(f"{artist.name} has no {thing.name}")
                continue
            try:
                picture = Image.open(io.BytesIO(render(artist.svg(thing), size))).convert("RGBA")
            except (ValueError, OSError) as error:
                faults.append(
                    f"{thing.name} by {artist.name} does not render: {' '.join(str(error).split())}"
                )
                continue
            if picture.getchannel("A").getbbox() is None:
                faults.append(f"{thing.name} by {artist.name} renders to nothing")
                continue
            white = Image.new("RGBA", picture.size, "white")
            white.alpha_composite(picture)
            file = f"pictures/{artist.name}/{thing.name}.png"
            white.convert("RGB").save(out / file)
            drawings.append(Drawing(thing=thing, artist=artist.name, file=file, colour=main_colour(picture)))
    return drawings, faults
