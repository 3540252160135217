"""Evidence by retrieval: passages of text files that BM25 finds for a claim.

No passage says that a claim is wrong. What is taken for that: passages that have most of its words, and lack
a number or a name of it. A claim whose words no passage has cannot be read. Words cannot tell a sentence from
its denial: a claim that denies is not read, and neither is what a passage denies.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from llava_kd.curation.rationale.evidence import Check, Verdict
from llava_kd.curation.rationale.words import NOT, NUMBER, words_of
from llava_kd.data.sources.conversation import Record

_ENDINGS = (".txt", ".md")
_MAX_BYTES = 1 << 30
_NAME = re.compile(r"(?<=[\w,;] )[A-Z]\w+")  # a capital inside a sentence
_SENTENCE_END = re.compile(r"(?<=[.!?;])\s+")
_NUMBER_WORDS = frozenset(
    words_of(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
        "sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred "
        "thousand million billion half twice first second third fourth fifth sixth seventh eighth ninth tenth"
    )
)
_COMMON = frozenset(
    words_of(
        "a an and are as at be by for from had has have he her his in is it its of on or she so that the "
        "their there therefore these they this to was were which who with"
    )
)


@dataclass(frozen=True, kw_only=True)
class Passages:
    """`covers`: the share of a claim's words that a passage which says it, or its contrary, has at least."""

    passages: Sequence[str]
    fingerprint: str
    most: int = 3
    covers: float = 0.8
    name: str = "passages"

    @property
    def keys(self) -> Collection[str] | None:
        return None

    def about(self, record: Record) -> Check | None:
        return self.check

    def found(self, query: str) -> list[str]:
        """The best passages for a query, best first; none that shares no word with it."""
        tokens = words_of(query)
        known = [token for token in tokens if token in self._index.vocab_dict]
        if not known:
            return []
        scores = self._index.get_scores(known)
        best = sorted(range(len(scores)), key=lambda k: (-scores[k], k))[: self.most]
        return [self.passages[k] for k in best if scores[k] > 0]

    def check(self, claim: str) -> Verdict | None:
        if NOT.search(claim):
            return None
        hard = {*NUMBER.findall(claim), *(name.lower() for name in _NAME.findall(claim))}
        words = set(words_of(claim)) - _COMMON
        counted = {word for word in words if word in _NUMBER_WORDS or any(c.isdigit() for c in word)}
        soft = words - hard
        found = self.found(claim)
        if not found or not soft:
            return None
        affirmed = {passage: _affirmed(passage) for passage in found}
        own = {passage: set(words_of(text)) for passage, text in affirmed.items()}
        passage = max(found, key=lambda one: len(words & own[one]))
        best = own[passage]
        if hard | counted <= best and len(words & best) >= self.covers * len(words):
            return Verdict(holds=True, fact=passage)
        missing = hard.difference(*(words_of(one) for one in found))
        if not missing or len(soft & best) < self.covers * len(soft):
            return None
        return Verdict(holds=False, fact=passage, correction=_other_number(claim, missing, affirmed[passage]))

    @cached_property
    def _index(self):
        import bm25s

        index = bm25s.BM25()
        index.index([words_of(passage) for passage in self.passages], show_progress=False)
        return index


def _affirmed(passage: str) -> str:
    """The passage without its sentences that deny."""
    return " ".join(one for one in _SENTENCE_END.split(passage) if not NOT.search(one))


def _other_number(claim: str, missing: Collection[str], passage: str) -> str:
    """The claim with the one number of the passage in the place of its one number; else nothing."""
    here, there = NUMBER.findall(claim), set(NUMBER.findall(passage))
    if len(missing) != 1 or here != list(missing) or len(there) != 1:
        return ""
    return NUMBER.sub(there.pop(), claim)


def read_passages(folder: str | Path) -> Passages:
    """The paragraphs of the .txt and .md files below a folder. ValueError where there is none, or no BM25."""
    folder = Path(folder)
    try:
        import bm25s  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(
            "texts are searched by the package bm25s: pip install 'llava_kd[retrieval]'"
        ) from error
    files = sorted(path for path in folder.rglob("*") if path.suffix in _ENDINGS and path.is_file())
    if not files:
        raise ValueError(f"no {' or '.join(_ENDINGS)} file below {folder}; give a folder of texts")
    if (size := sum(path.stat().st_size for path in files)) > _MAX_BYTES:
        raise ValueError(f"the texts below {folder} have {size} bytes; at most {_MAX_BYTES} are searched")
    digest = hashlib.sha256()
    passages = []
    for path in files:
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} must be UTF-8 text: {error.reason} at byte {error.start}") from None
        digest.update(text.encode())
        passages += [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]
    if not passages:
        raise ValueError(f"the texts below {folder} are empty")
    return Passages(passages=passages, fingerprint=digest.hexdigest()[:16])
