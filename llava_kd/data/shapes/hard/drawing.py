"""Pictures of hard scenes, as in training and as nothing in training looks."""

from __future__ import annotations

import random

from PIL import Image, ImageDraw

from llava_kd.data.shapes.hard.labels import PLATE_HEIGHT, PLATE_WIDTH, inked
from llava_kd.data.shapes.hard.scenes import SIDE, HardScene, Thing
from llava_kd.data.shapes.scenes import RGB, Rgb, draw_shape, shifted

_OVERSAMPLE = 4
RADII = {"small": (5.2, 6.0), "large": (9.8, 11.0)}  # in pixels of 96
OTHER_RADII = {"small": (4.2, 4.9), "large": (11.3, 12.2)}
_OTHER_SIDES = (112, 192)
_NOISE = (0.06, 0.16)  # share of uniform noise that is mixed into a picture
_PAPER, _INK = (252, 252, 252), (10, 10, 10)


def draw(scene: HardScene, rng: random.Random) -> Image.Image:
    """96 by 96 pixels on light grey; the tint and the exact radius and hue of each shape come from `rng`."""
    side = SIDE * _OVERSAMPLE
    canvas = Image.new("RGB", (side, side), shifted((235, 235, 235), rng, 18))
    return _finished(canvas, scene, rng, side=SIDE, radii=RADII)


def draw_otherwise(scene: HardScene, rng: random.Random) -> Image.Image:
    """Larger pictures on other backgrounds, with smaller small and larger large shapes, under noise."""
    side = rng.randint(*_OTHER_SIDES)
    canvas = _background(rng, side * _OVERSAMPLE)
    picture = _finished(canvas, scene, rng, side=side, radii=OTHER_RADII)
    noise = Image.frombytes("RGB", picture.size, rng.randbytes(3 * side * side))
    return Image.blend(picture, noise, rng.uniform(*_NOISE))


def _background(rng: random.Random, side: int) -> Image.Image:
    """Dark, a gradient, stripes or checks; greys, which no shape is."""
    kind = rng.choice(("dark", "gradient", "stripes", "checks"))
    low = rng.randint(20, 60) if kind == "dark" else rng.randint(90, 130)
    high = low if kind == "dark" else rng.randint(165, 200)
    if kind == "gradient":
        ramp = Image.linear_gradient("L").point([low + value * (high - low) // 255 for value in range(256)])
        grey = ramp.resize((side, side)).rotate(90 * rng.randrange(4))
    else:
        step = side // rng.randint(6, 12)
        grey = Image.new("L", (side, side), low)
        pen = ImageDraw.Draw(grey)
        for row, y in enumerate(range(0, side, step)):
            for column, x in enumerate(range(0, side, step)):
                if (row + (column if kind == "checks" else 0)) % 2:
                    pen.rectangle((x, y, x + step - 1, y + step - 1), fill=high)
    return Image.merge("RGB", (grey, grey, grey))


def _finished(
    canvas: Image.Image,
    scene: HardScene,
    rng: random.Random,
    *,
    side: int,
    radii: dict[str, tuple[float, float]],
) -> Image.Image:
    pen, scale = ImageDraw.Draw(canvas), canvas.width / SIDE
    for thing in scene:
        centre = ((thing.x + 0.5) * scale, (thing.y + 0.5) * scale)
        radius = rng.uniform(*radii[thing.size]) * scale
        draw_shape(pen, thing.shape, centre, radius, shifted(RGB[thing.colour], rng, 15))
        if thing.label:
            _write(pen, thing, scale)
    return canvas.resize((side, side), Image.Resampling.BOX)


def _write(pen: ImageDraw.ImageDraw, thing: Thing, scale: float) -> None:
    """A plate with the label; at 96 pixels each of its pixels is one of the picture's."""
    left, top = thing.x - PLATE_WIDTH // 2, thing.y - PLATE_HEIGHT // 2

    def fill(x: int, y: int, width: int, height: int, rgb: Rgb) -> None:
        first = round((left + x) * scale), round((top + y) * scale)
        last = round((left + x + width) * scale) - 1, round((top + y + height) * scale) - 1
        pen.rectangle((*first, *last), fill=rgb)

    fill(0, 0, PLATE_WIDTH, PLATE_HEIGHT, _PAPER)
    for x, y in inked(thing.label):
        fill(x, y, 1, 1, _INK)
