"""Codes that are planted in training data, and how much a model remembers of each: its exposure.

A code is one of |R| that could have stood in its place. After training every one of them is put there, and
ordered by how likely the model finds it; with the planted one at `rank`,

    exposure = log2 |R| - log2 rank     (bits)

(Carlini et al., The Secret Sharer, arXiv 1802.08232). For a model that never saw it each rank is as likely as
any other: log2 e = 1.44 bits on average, for many codes. One that puts it first has log2 |R|. Codes that are
exactly as likely share their ranks. Where a picture holds the code, the model is asked with one without.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from llava_kd.batch import IGNORE_INDEX
from llava_kd.data.sources.conversation import PRIVATE_SPANS, Record, parse_record
from llava_kd.data.sources.entries import loads
from llava_kd.data.text.encoder import Encoded

CHANCE_BITS = math.log2(math.e)
MOST_DIGITS = 9
FORMAT = 1
_SIDE = 96


@dataclass(frozen=True, kw_only=True)
class Canary:
    """A question whose answer is `before` and the code. `image` shows the code, `blank` the same without."""

    id: str
    question: str
    before: str
    code: str
    image: str | None = None
    blank: str | None = None

    def entry(self, number: int) -> dict[str, object]:
        """LLaVA JSON of its `number`th copy, with the code's place among the answer's characters."""
        start = len(self.before)
        span = {"answer": 0, "start": start, "stop": start + len(self.code)}
        return {**self._entry(f"{self.id}-{number}", self.code, self.image), PRIVATE_SPANS: [span]}

    def asked(self, code: str) -> Record:
        """What a model is asked to find likely: another code in its place."""
        return parse_record(self._entry(f"{self.id}-{code}", code, self.blank), 0)

    def _entry(self, name: str, code: str, image: str | None) -> dict[str, object]:
        asked = self.question if image is None else f"<image>\n{self.question}"
        talk = [{"from": "human", "value": asked}, {"from": "gpt", "value": self.before + code}]
        return {"id": name, **({} if image is None else {"image": image}), "conversations": talk}


@dataclass(frozen=True, kw_only=True)
class Planted:
    """Canaries, of as many digits each; the file of this is what `exposure` reads."""

    digits: int
    canaries: tuple[Canary, ...]

    def write(self) -> bytes:
        listed = [asdict(one) for one in self.canaries]
        tree = {"format": FORMAT, "digits": self.digits, "canaries": listed}
        return json.dumps(tree, indent=1).encode() + b"\n"

    @staticmethod
    def read(path: Path) -> Planted:
        """ValueError for a file that is none of `llava-kd canary insert`."""
        if not path.is_file():
            raise ValueError(f"no canary file {path}; `llava-kd canary insert` writes it next to its data")
        try:
            tree = loads(path.read_bytes())
            if not isinstance(tree, dict) or tree.get("format") != FORMAT:
                raise ValueError(f"format must be {FORMAT}")
            found = Planted(
                digits=int(tree["digits"]), canaries=tuple(Canary(**one) for one in tree["canaries"])
            )
            if not found.canaries or not 1 <= found.digits <= MOST_DIGITS:
                raise ValueError("it needs canaries of 1 to 9 digits")
            for one in found.canaries:
                if len(one.code) != found.digits or not one.code.isdecimal():
                    raise ValueError(f"the code of {one.id} must have {found.digits} digits")
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} holds no canaries ({error}); write it with `llava-kd canary insert`"
            ) from None
        return found


def make(count: int, *, digits: int, seed: int) -> Planted:
    """Different codes and different questions. ValueError for more than there are codes."""
    if not 1 <= digits <= MOST_DIGITS:
        raise ValueError(f"--digits must be from 1 to {MOST_DIGITS}; got {digits}")
    if count > 10**digits:
        raise ValueError(
            f"--canaries ({count}) must be at most the number of codes, {10**digits}; raise --digits"
        )
    codes = random.Random(f"canaries {seed}").sample(range(10**digits), count)
    return Planted(
        digits=digits,
        canaries=tuple(
            Canary(
                id=f"canary-{number}",
                question=f"What is the access code of locker {number}?",
                before="The code is ",
                code=f"{code:0{digits}d}",
            )
            for number, code in enumerate(codes)
        ),
    )


def drawn(canary: Canary, folder: Path, below: str) -> Canary:
    """With its two pictures, written to `folder`, which is `below` the image root."""
    for name, text in ((canary.id, canary.code), (f"{canary.id}-blank", "")):
        picture = Image.new("RGB", (_SIDE, _SIDE), _colour(canary.id))
        pen = ImageDraw.Draw(picture)
        pen.text(
            (6, 6), canary.id.replace("canary-", "locker "), fill="black", font=ImageFont.load_default(16)
        )
        pen.text((6, 50), text, fill="black", font=ImageFont.load_default(28))
        picture.save(folder / f"{name}.png")
    return replace(canary, image=f"{below}/{canary.id}.png", blank=f"{below}/{canary.id}-blank.png")


def _colour(name: str) -> tuple[int, int, int]:
    draw = random.Random(name)
    return draw.randint(160, 255), draw.randint(160, 255), draw.randint(160, 255)


def candidates(canary: Canary, digits: int, most: int, seed: int) -> list[str]:
    """Its code first, then all others; of more than `most`, others that are drawn."""
    size = 10**digits
    numbers: Iterable[int] = range(size)
    if size > most:
        numbers = random.Random(f"candidates {seed} {canary.id}").sample(range(size), most)
    others = [code for number in numbers if (code := f"{number:0{digits}d}") != canary.code]
    return [canary.code, *others[: min(size, most) - 1]]


def spelled(encoded: Encoded, stop: int) -> tuple[int, ...]:
    """Answer tokens up to the last one of the first `stop` characters. ValueError where they are cut off."""
    is_target = encoded.labels != IGNORE_INDEX
    ids, spans = encoded.ids[is_target].tolist(), encoded.spans[is_target].tolist()
    if encoded.is_truncated or max((last for _, _, last, _ in spans), default=0) < stop:
        raise ValueError("a code does not fit into --max_length; raise it")
    covers = [place for place, (_, first, last, _) in enumerate(spans) if first < stop and last > first]
    return tuple(ids[: covers[-1] + 1])


def by_beginning(spellings: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], list[int]]:
    """Which candidates are the same but for their last token: one pass of a model serves them together."""
    found: dict[tuple[int, ...], list[int]] = {}
    for number, ids in enumerate(spellings):
        found.setdefault(ids[:-1], []).append(number)
    return found


def exposure(log_p: Sequence[float]) -> tuple[float, float]:
    """Rank of the first of all candidates, and its exposure in bits. ValueError for what is not a number."""
    values = torch.tensor(log_p, dtype=torch.float64)
    if bool(values.isnan().any()):
        raise ValueError("the model's likelihoods must be finite numbers; they are not. Try --dtype float32")
    ahead, alike = int((values > values[0]).sum()), int((values == values[0]).sum())
    rank = 1 + ahead + (alike - 1) / 2
    return rank, math.log2(len(values)) - math.log2(rank)


def table(
    names: Sequence[str], found: Sequence[tuple[float, float]], *, num_candidates: int, size: int
) -> str:
    """Markdown, a line a canary, with the mean against chance and the most there is."""
    bits = [exposed for _, exposed in found]
    mean = sum(bits) / len(bits)
    of = "" if num_candidates == size else f", drawn from {size}"
    lines = ["| canary | rank | exposure, bits |", "|---|---|---|"]
    lines += [f"| {name} | {rank:g} | {bit:.2f} |" for name, (rank, bit) in zip(names, found, strict=True)]
    return "\n".join(
        [
            *lines,
            "",
            f"mean exposure {mean:.2f} bits over {len(bits)} canaries; chance {CHANCE_BITS:.2f}, at most "
            f"{math.log2(num_candidates):.2f} ({num_candidates} candidates each{of})",
        ]
    )
