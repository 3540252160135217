"""What each token of a tokenizer spells, in bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping

from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"  # what SentencePiece writes for a space
_OF_LETTER = {letter: byte for byte, letter in bytes_to_unicode().items()}


def spelled(tokenizer: PreTrainedTokenizerFast) -> tuple[bytes | None, ...]:
    """By id: the bytes of the token; None for a control token, the unknown one, and a number without token.

    ValueError for a tokenizer whose tokens do not follow each other as bytes of the text.
    """
    read = _reader(tokenizer)
    added = tokenizer.added_tokens_decoder
    vocabulary = tokenizer.get_vocab()
    found: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
    for token, number in vocabulary.items():
        if number in added and not (read is _sentence_piece and _BYTE.fullmatch(token)):
            found[number] = None if added[number].special else token.encode()
        elif number != tokenizer.unk_token_id:
            found[number] = read(token)
    return tuple(found)


def _reader(tokenizer: PreTrainedTokenizerFast) -> Callable[[str], bytes | None]:
    decoder = json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder") or {}
    kinds = set(_kinds(decoder))
    if "ByteLevel" in kinds:
        return _byte_level
    if "Metaspace" in kinds or _SPACE in json.dumps(decoder, ensure_ascii=False):
        return _sentence_piece
    raise ValueError(
        "response_cross needs tokens that are bytes of the text, as byte-level tokenizers and SentencePiece "
        f"have them; a tokenizer here decodes by {', '.join(sorted(kinds)) or 'nothing'}: use another "
        "teacher or student, or drop response_cross"
    )


def _kinds(decoder: Mapping[str, object]) -> Iterator[str]:
    if isinstance(kind := decoder.get("type"), str):
        yield kind
    parts = decoder.get("decoders")
    for part in parts if isinstance(parts, list) else []:
        yield from _kinds(part)


def _byte_level(token: str) -> bytes | None:
    letters = [_OF_LETTER.get(letter) for letter in token]
    return bytes(letter for letter in letters if letter is not None) if None not in letters else None


def _sentence_piece(token: str) -> bytes:
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode()
