"""Where the probability of a tokenizer's tokens goes among those of another, by rules on what they spell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from llava_kd.models.words.pairs import keys_of
from llava_kd.models.words.spelling import spelled

MOST_PIECES = 4  # as X-Token keeps


@dataclass(frozen=True, kw_only=True)
class Rules:
    """A sparse matrix by its entries: `weight` of the token `source` goes to `target`, each by its id.

    The weights of a source sum to 1; a source without a rule has no entry. `exact`, `split`, `without`: how
    many sources go to a token that is the same, to the pieces of their text, and nowhere.
    """

    source: tuple[int, ...]
    target: tuple[int, ...]
    weight: tuple[float, ...]
    exact: int
    split: int
    without: int

    def __str__(self) -> str:
        return (
            f"{self.exact} tokens are projected onto the same token, {self.split} onto the pieces of their "
            f"text, {self.without} nowhere"
        )


def rules_of(
    source: PreTrainedTokenizerFast,
    target: PreTrainedTokenizerFast,
    same: Mapping[int, int],
    *,
    spread: float = 0.0,
) -> Rules:
    """After X-Token (arXiv 2605.21699, and its code in NeMo-RL, of which the description was read).

    `same`: the tokens that are one on both sides, source to target; each goes there whole. Any other that
    spells something goes to the pieces that `target` writes its text in, of which each weighs `spread` times
    the one before (0: the first alone; X-Token: 0.1), four at most. Where `target` does not give the bytes
    back, as for half a letter or with a space before it, the pieces are its longest tokens from the left.
    Control tokens of the source alone have no rule. ValueError for a spread outside 0..1.
    """
    if not 0 <= spread < 1:
        raise ValueError(f"the spread must be at least 0 and below 1; got {spread}")
    bytes_of = spelled(source)
    others = {i: text for i in sorted(source.get_vocab().values()) if i not in same and (text := bytes_of[i])}
    pieces = _pieces(list(others.values()), target)
    entries = [(number, to, 1.0) for number, to in same.items()]
    for number, found in zip(others, pieces, strict=True):
        kept = found[: MOST_PIECES if spread > 0 else 1]
        whole = sum(spread**place for place in range(len(kept)))
        entries += [(number, to, spread**place / whole) for place, to in enumerate(kept)]
    columns = list(zip(*sorted(entries), strict=True)) or [(), (), ()]
    split = sum(bool(found) for found in pieces)
    return Rules(
        source=columns[0],
        target=columns[1],
        weight=columns[2],
        exact=len(same),
        split=split,
        without=len(set(source.get_vocab().values())) - len(same) - split,
    )


def _pieces(texts: Sequence[bytes], target: PreTrainedTokenizerFast) -> list[list[int]]:
    """Tokens that spell each text, one after the other; none where there are no such tokens."""
    bytes_of = spelled(target)
    by_bytes = {key: number for key, number in keys_of(target).items() if isinstance(key, bytes)}
    longest = max(map(len, by_bytes), default=0)
    # What does not decode is asked for as nothing, which gives no bytes back.
    asked = [text.decode("utf-8", errors="ignore") for text in texts]
    written = target.backend_tokenizer.encode_batch(asked, add_special_tokens=False)
    found = []
    for text, encoding in zip(texts, written, strict=True):
        spelling = [bytes_of[number] for number in encoding.ids]
        is_whole = None not in spelling and b"".join(part or b"" for part in spelling) == text
        found.append(list(encoding.ids) if is_whole else _longest_first(text, by_bytes, longest))
    return found


def _longest_first(text: bytes, by_bytes: Mapping[bytes, int], longest: int) -> list[int]:
    found, begin = [], 0
    while begin < len(text):
        stops = range(min(len(text), begin + longest), begin, -1)
        stop = next((stop for stop in stops if text[begin:stop] in by_bytes), None)
        if stop is None:
            return []
        found.append(by_bytes[text[begin:stop]])
        begin = stop
    return found
