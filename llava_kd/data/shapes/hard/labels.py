"""Labels of a letter and a digit, in a bitmap alphabet of their own: the same on every machine."""

from __future__ import annotations

import itertools

GLYPH_WIDTH, GLYPH_HEIGHT = 5, 7
PLATE_WIDTH, PLATE_HEIGHT = 2 * GLYPH_WIDTH + 3, GLYPH_HEIGHT + 2  # a gap between the two, a border all round

# Rows from the top; any two letters, and any two digits, differ in four pixels or more.
LETTERS = {
    "A": ".###. #...# #...# ##### #...# #...# #...#",
    "C": ".#### #.... #.... #.... #.... #.... .####",
    "E": "##### #.... #.... ####. #.... #.... #####",
    "H": "#...# #...# #...# ##### #...# #...# #...#",
    "K": "#...# #..#. #.#.. ##... #.#.. #..#. #...#",
    "L": "#.... #.... #.... #.... #.... #.... #####",
    "N": "#...# ##..# #.#.# #.#.# #..## #...# #...#",
    "P": "####. #...# #...# ####. #.... #.... #....",
    "T": "##### ..#.. ..#.. ..#.. ..#.. ..#.. ..#..",
    "U": "#...# #...# #...# #...# #...# #...# .###.",
    "X": "#...# #...# .#.#. ..#.. .#.#. #...# #...#",
    "Y": "#...# #...# .#.#. ..#.. ..#.. ..#.. ..#..",
}
DIGITS = {
    "2": ".###. #...# ....# ...#. ..#.. .#... #####",
    "3": "####. ....# ....# .###. ....# ....# ####.",
    "4": "...#. ..##. .#.#. #..#. ##### ...#. ...#.",
    "5": "##### #.... ####. ....# ....# #...# .###.",
    "6": ".###. #.... #.... ####. #...# #...# .###.",
    "7": "##### ....# ...#. ..#.. ..#.. .#... .#...",
    "9": ".###. #...# #...# .#### ....# ....# .###.",
}
LABELS = tuple(letter + digit for letter, digit in itertools.product(LETTERS, DIGITS))


def inked(label: str) -> list[tuple[int, int]]:
    """(column, row) of the dark pixels of a label on its plate of 13 by 9."""
    letter, digit = label
    return [
        (1 + i * (GLYPH_WIDTH + 1) + column, 1 + row)
        for i, glyph in enumerate((LETTERS[letter], DIGITS[digit]))
        for row, pixels in enumerate(glyph.split())
        for column, pixel in enumerate(pixels)
        if pixel == "#"
    ]
