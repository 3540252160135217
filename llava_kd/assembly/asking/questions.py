"""A record as a server is asked for it: messages of a chat with its given answers, and pictures in them.

Shape legend: H height, W width, C channels.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence

import torch
from PIL import Image

from llava_kd.data.batches.model_side import Side
from llava_kd.data.pixels.images import decode, pad_to_square
from llava_kd.data.sources.conversation import IMAGE_PLACEHOLDER, Record, Source, Turn

_PLAIN_MODES = ("RGB", "L")
_SHOWN = 3


def messages(record: Record, pictures: list[str]) -> list[dict]:
    """The turns of a record, answers too; a picture stands where its placeholder does."""
    remaining = iter(pictures)
    return [
        {"role": turn.role, "content": _parts(turn, remaining) if record.has_places(turn) else turn.text}
        for turn in record.turns
    ]


def _parts(turn: Turn, pictures: Iterator[str]) -> str | list[dict]:
    """A chat template begins a line after a picture by itself, so the words' own is left out."""
    if IMAGE_PLACEHOLDER not in turn.text:
        return turn.text
    first, *others = turn.text.split(IMAGE_PLACEHOLDER)
    parts: list[dict] = [{"type": "text", "text": first}] if first else []
    for text in others:
        parts.append({"type": "image_url", "image_url": {"url": next(pictures)}})
        if text := text.removeprefix("\n"):
            parts.append({"type": "text", "text": text})
    return parts


def pictures_of(source: Source, number: int, record: Record, reader: Side) -> list[str]:
    """Every picture of a record as a data URL. ValueError or OSError for one that cannot be read."""
    return [_picture(source.image_bytes(number, k), reader) for k in range(len(record.images))]


def _picture(data: bytes, reader: Side) -> str:
    """The file itself where any reader makes the same pixels of it, else these pixels as a PNG.

    Servers differ in what they do with tags of orientation and with transparency, and few pad.
    """
    pixels_HWC = decode(data, upright=reader.upright)
    ready_HWC = pixels_HWC
    if reader.transform.aspect == "pad":
        ready_HWC = pad_to_square(pixels_HWC, reader.transform.mean)
    if ready_HWC is pixels_HWC and _is_plain(data):
        return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
    buffer = io.BytesIO()
    Image.fromarray(ready_HWC.to(torch.uint8).numpy()).save(buffer, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _is_plain(data: bytes) -> bool:
    """A JPEG in colours or greys without a note of how it was held."""
    with Image.open(io.BytesIO(data)) as image:
        is_tagged = image.getexif().get(0x0112, 1) != 1
        return image.format == "JPEG" and image.mode in _PLAIN_MODES and not is_tagged


def refuse_control_words(numbers: Sequence[int], source: Source, reader: Side, remedy: str) -> None:
    """ValueError before any request: to a server they are control tokens, here they are text."""
    encoder = reader.encoder()
    found = []
    for number in numbers:
        record = source.record(number)
        if not record.fault and (words := encoder.control_words(record)):
            found.append(f"record {record.id!r} ({', '.join(map(repr, words[:_SHOWN]))})")
    if found:
        more = "" if len(found) <= _SHOWN else f" and {len(found) - _SHOWN} more"
        raise ValueError(
            f"{', '.join(found[:_SHOWN])}{more} contain words that a server reads as control tokens, not "
            f"as text: remove them, or {remedy}"
        )
