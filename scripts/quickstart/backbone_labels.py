"""What each patch is asked for while the tower learns to see; IGNORE where there is nothing to say."""

from __future__ import annotations

from llava_kd.data.shapes.hard.labels import DIGITS, LETTERS
from llava_kd.data.shapes.hard.scenes import SIDE, HardScene
from llava_kd.data.shapes.scenes import COLOURS, GRID, SHAPES, SIZES, Scene

IGNORE = -100
PARTS_OF_A_PATCH = 3  # per side: a patch says in which of these its shape's centre lies

EASY_LABELS = {
    "occupied": 2,
    "colour": len(COLOURS),
    "shape": len(SHAPES),
    "size": len(SIZES),
    "cell": GRID * GRID,
}
HARD_LABELS = {
    "occupied": 2,
    "colour": len(COLOURS),
    "shape": len(SHAPES),
    "size": len(SIZES),
    "letter": 1 + len(LETTERS),  # 0: no label
    "digit": 1 + len(DIGITS),
    "part across": PARTS_OF_A_PATCH,
    "part down": PARTS_OF_A_PATCH,
    "column": 8,
    "row": 8,
}


def easy_labels(scene: Scene, patches_per_side: int) -> list[list[int]]:
    """Every patch names what the cell that it lies in holds."""
    by_cell = {shape.cell: shape for shape in scene}
    labels = []
    for patch in range(patches_per_side**2):
        row, column = divmod(patch, patches_per_side)
        cell = row * GRID // patches_per_side * GRID + column * GRID // patches_per_side
        shape = by_cell.get(cell)
        if shape is None:
            labels.append([0, IGNORE, IGNORE, IGNORE, cell])
        else:
            found = COLOURS.index(shape.colour), SHAPES.index(shape.shape), SIZES.index(shape.size)
            labels.append([1, *found, cell])
    return labels


def hard_labels(scene: HardScene, patches_per_side: int) -> list[list[int]]:
    """The patch with a shape's centre names all that the shape has; centres are a patch apart or more."""
    side = SIDE // patches_per_side
    labels = []
    by_patch = {(thing.y // side, thing.x // side): thing for thing in scene}
    assert len(by_patch) == len(scene)
    for patch in range(patches_per_side**2):
        row, column = divmod(patch, patches_per_side)
        thing = by_patch.get((row, column))
        if thing is None:
            labels.append([0, *[IGNORE] * 7, column, row])
        else:
            found = COLOURS.index(thing.colour), SHAPES.index(thing.shape), SIZES.index(thing.size)
            letter = 1 + list(LETTERS).index(thing.label[0]) if thing.label else 0
            digit = 1 + list(DIGITS).index(thing.label[1]) if thing.label else 0
            parts = (at % side * PARTS_OF_A_PATCH // side for at in (thing.x, thing.y))
            labels.append([1, *found, letter, digit, *parts, column, row])
    return labels
