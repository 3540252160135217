"""Entries that mean a picture, or a place in one, and give none that is read.

Unseen, they would be trained on as text alone, or for a placeholder as the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from llava_kd.data.sources.pictures.image_paths import IMAGE_KEYS

_OTHER_MEDIA = ("video", "videos", "audio", "audios")
_FILE = r"[^\n<>]+\.(?:jpe?g|jpe|jfif|png|webp|bmp|gif|tiff?|p[pgbn]m)"
_IS_FILE = re.compile(_FILE, re.IGNORECASE)
_IN_TEXT = re.compile(rf"<img>\s*{_FILE}\s*</img>", re.IGNORECASE)
_CLOSING = "</image>"  # of an element of that name, in a talk about such files
_BOXES = ("<bbox>", "<ref-object>")  # of ms-swift, in the place of what `objects` holds
_SHOWN = 80


def check_media(raw: Mapping[str, object]) -> None:
    """ValueError for a record about something else than images."""
    found = next((key for key in _OTHER_MEDIA if raw.get(key)), None)
    if found is not None:
        raise ValueError(
            f"it has a `{found}`, and only images are read; leave such records out, or give frames of it as "
            "`images`"
        )


def check_boxes(raw: Mapping[str, object], texts: Iterable[str]) -> None:
    """ValueError for a talk with placeholders of boxes that stand beside it."""
    if not raw.get("objects"):
        return
    if found := next((mark for text in texts for mark in _BOXES if mark in text), None):
        raise ValueError(
            f"its text has {found} in the place of an entry of `objects`, which is not read; write the names "
            "and boxes into the text"
        )


def check_no_picture_is_lost(
    raw: Mapping[str, object], talk: Iterable[object], asked: Sequence[str], placeholder: str
) -> None:
    """ValueError where a record without images means one all the same. `asked` are the user's texts."""
    if key := _key_of_a_file(raw):
        raise ValueError(f"its picture is in `{key}`, which is not read; rename `{key}` to `image`")
    for number, said in enumerate(talk):
        if isinstance(said, Mapping) and (key := _key_of_a_file(said, *IMAGE_KEYS)):
            raise ValueError(
                f"turn {number} has its picture in `{key}`, which is not read; give it as `image` of the "
                "record"
            )
    for text in asked:
        if named := _IN_TEXT.search(text):
            raise ValueError(
                f"its picture is named in the text, {named[0][:_SHOWN]!r}; give the path as `image`, and "
                f"write {placeholder} in its place"
            )
        if _stands_alone(text, placeholder) and _CLOSING not in text:
            raise ValueError(
                f"a question has {placeholder}, but the record gives no picture: `image` is missing or "
                f"empty; its keys are {sorted(str(key)[:_SHOWN] for key in raw)[:10]}"
            )


def _stands_alone(text: str, placeholder: str) -> bool:
    """As LLaVA writes it: before the words, or after them in a line of its own. Else it may be a word."""
    return text.startswith(placeholder) or text.endswith(f"\n{placeholder}")


def _key_of_a_file(entry: Mapping[str, object], *also: str) -> str | None:
    """The key of a path that looks like that of a picture, of those that `IMAGE_KEYS` are not, or `also`."""
    for key, value in entry.items():
        if key in IMAGE_KEYS and key not in also:
            continue
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, str) and _names_a_picture(key) and _IS_FILE.fullmatch(first.strip()):
            return key
    return None


def _names_a_picture(key: str) -> bool:
    key = key.lower()
    return any(word in key for word in ("image", "img", "picture", "photo")) or key in ("file", "file_name")
