"""Scenes of coloured shapes on a 3 x 3 grid: what is in a picture, and the picture itself."""

from __future__ import annotations

import io
import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLOURS = ("red", "orange", "green", "cyan", "blue", "purple")
SHAPES = ("circle", "square", "triangle", "cross", "star")
SIZES = ("small", "large")
CELLS = (
    "top left",
    "top",
    "top right",
    "left",
    "centre",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
GRID = 3
MAX_SHAPES = 6

RGB = {
    "red": (215, 30, 40),
    "orange": (245, 150, 20),
    "green": (30, 150, 50),
    "cyan": (60, 205, 215),
    "blue": (35, 60, 205),
    "purple": (145, 50, 170),
}
_RADIUS = {"small": 0.27, "large": 0.44}  # share of the shorter side of a cell
_OVERSAMPLE = 4
_NUM_SHAPES_WEIGHTS = (1, 3, 4, 4, 4, 4)  # few scenes of one shape exist: drawn often, they would run out

Point = tuple[float, float]
Rgb = tuple[int, int, int]


@dataclass(frozen=True, order=True, kw_only=True)
class Shape:
    """One shape; `cell` counts row by row from the top left."""

    cell: int
    colour: str
    shape: str
    size: str

    @property
    def row(self) -> int:
        return self.cell // GRID

    @property
    def column(self) -> int:
        return self.cell % GRID


Scene = tuple[Shape, ...]  # in order of cells, at most one shape in each


def random_scene(rng: random.Random) -> Scene:
    """A scene of 1 to 6 shapes; most have few colours or few forms, so that there is something to count."""
    num_shapes = rng.choices(range(1, MAX_SHAPES + 1), weights=_NUM_SHAPES_WEIGHTS)[0]
    colours = rng.sample(COLOURS, rng.choice((2, 3, len(COLOURS), len(COLOURS))))
    shapes = rng.sample(SHAPES, rng.choice((2, 3, len(SHAPES), len(SHAPES))))
    cells = sorted(rng.sample(range(GRID * GRID), num_shapes))
    return tuple(
        Shape(cell=cell, colour=rng.choice(colours), shape=rng.choice(shapes), size=rng.choice(SIZES))
        for cell in cells
    )


def encode_picture(picture: Image.Image, rng: random.Random, *, image_format: str) -> bytes:
    """The bytes of a "JPEG" or "PNG" file; `rng` decides on the quality."""
    buffer = io.BytesIO()
    if image_format == "JPEG":
        picture.save(buffer, "JPEG", quality=rng.randint(80, 95))
    else:
        picture.save(buffer, "PNG")
    return buffer.getvalue()


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """A picture of `scene`: its size, tint and the exact place and hue of each shape come from `rng`."""
    width = rng.randint(72, 120)
    height = round(width * rng.uniform(0.8, 1.25))
    background = shifted((235, 235, 235), rng, 18)
    canvas = Image.new("RGB", (width * _OVERSAMPLE, height * _OVERSAMPLE), background)
    pen = ImageDraw.Draw(canvas)
    cell_width, cell_height = canvas.width / GRID, canvas.height / GRID
    side = min(cell_width, cell_height)
    for shape in scene:
        x = (shape.column + 0.5 + rng.uniform(-0.05, 0.05)) * cell_width
        y = (shape.row + 0.5 + rng.uniform(-0.05, 0.05)) * cell_height
        radius = _RADIUS[shape.size] * side * rng.uniform(0.94, 1.0)
        draw_shape(pen, shape.shape, (x, y), radius, shifted(RGB[shape.colour], rng, 15))
    return canvas.resize((width, height), Image.Resampling.BOX)


def shifted(rgb: Rgb, rng: random.Random, most: int) -> Rgb:
    """A colour that differs by up to `most` in each channel."""
    red, green, blue = (min(255, max(0, value + rng.randint(-most, most))) for value in rgb)
    return red, green, blue


def draw_shape(pen: ImageDraw.ImageDraw, shape: str, centre: Point, radius: float, fill: Rgb) -> None:
    """One filled shape of SHAPES, inside the square that reaches `radius` to each side."""
    x, y = centre
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif shape == "square":
        half = 0.86 * radius
        pen.rectangle((x - half, y - half, x + half, y + half), fill=fill)
    elif shape == "triangle":
        base = (y - 0.95 * radius, y + 0.85 * radius)
        pen.polygon([(x, base[0]), (x - radius, base[1]), (x + radius, base[1])], fill=fill)
    elif shape == "cross":
        arm = 0.3 * radius
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
    elif shape == "star":
        pen.polygon(_star(centre, radius), fill=fill)
    else:
        raise AssertionError(shape)


def _star(centre: Point, radius: float) -> list[Point]:
    """The ten corners of a five-pointed star, the first one upwards."""
    corners = []
    for i in range(10):
        length = radius if i % 2 == 0 else 0.42 * radius
        angle = math.pi * (i / 5 - 0.5)
        corners.append((centre[0] + length * math.cos(angle), centre[1] + length * math.sin(angle)))
    return corners
