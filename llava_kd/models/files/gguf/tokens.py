"""A tokenizer as llama.cpp reads it: pieces, their kinds, merges or scores, and how words are cut before.

llama.cpp has its own code for each rule that cuts text before merging, and finds it by a name. Its converter
finds the name by a hash of what a published tokenizer makes of a text; here it is found by a hash of the rule
itself, which a vocabulary of any size can have.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from llava_kd.models.files.gguf.package import gguf_package

UNKNOWN_RULE = "default"
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_PHI3 = re.compile("phi-?3", re.IGNORECASE)
_KEEP_SPACES = ("<unk>", "<s>", "<|endoftext|>")
_ENGLISH = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_BYTES = {"type": "ByteLevel", "add_prefix_space": False}


def _split(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {**_BYTES, "use_regex": False}]}


def rule_hash(rule: object, *, ignores_merges: bool) -> str:
    """Of a `pre_tokenizer` of tokenizer.json, and of whether whole words go before merges.

    Offsets are no part of it, nor how a sequence of one is written.
    """
    text = json.dumps([_essence(rule), ignores_merges], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _essence(rule: object) -> object:
    if isinstance(rule, list):
        return [_essence(part) for part in rule]
    if not isinstance(rule, Mapping):
        return rule
    parts = rule.get("pretokenizers")
    if isinstance(parts, list) and len(parts) == 1:
        return _essence(parts[0])
    kept = {key: _essence(value) for key, value in rule.items() if key != "trim_offsets"}
    if kept.get("type") == "ByteLevel":
        kept.setdefault("use_regex", True)
    return kept


_LLAMA3 = _split(rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}")
# By the name of llama.cpp's code (src/llama-vocab.cpp, November 2026): the rule that does the same, and
# whether whole words go before merges.
RULES: Mapping[str, tuple[dict[str, Any], bool]] = {
    "gpt-2": (_BYTES, False),
    "qwen2": (_split(rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"), False),
    "llama-bpe": (_LLAMA3, True),
    "dbrx": (_LLAMA3, False),
    "smollm": (
        {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTES]},
        False,
    ),
}
# By hash of the rule: its name. GPT-2's is written in two ways.
KNOWN_RULES: Mapping[str, str] = {
    rule_hash(_split(_GPT2), ignores_merges=False): "gpt-2",
    **{rule_hash(rule, ignores_merges=ignores): name for name, (rule, ignores) in RULES.items()},
}


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """`model` is llama.cpp's: `gpt2` for merges of bytes, `llama` for SentencePiece's scores."""

    model: str
    rule: str
    pieces: list[str]
    kinds: list[int]
    merges: list[str]
    scores: list[float]
    adds_bos: bool
    adds_space: bool


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, name: str) -> Vocabulary:
    """The tokenizer's, filled with unused pieces up to the embedding's `rows`.

    Raises ValueError for one that llama.cpp has no code for here: neither byte-level BPE nor BPE with bytes
    to fall back on.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"the tokenizer of {name} has no tokenizer.json; save it with transformers 5")
    tree = json.loads(backend.to_str())
    model = tree["model"]
    if model["type"] != "BPE":
        raise ValueError(
            f"the tokenizer of {name} is of kind {model['type']}; GGUF files are written for BPE, of bytes "
            "(Qwen, Llama 3, GPT-2) or with bytes to fall back on (Llama 2, Gemma, Phi-3)"
        )
    of_bytes = "ByteLevel" in json.dumps(tree["pre_tokenizer"]) and not model.get("byte_fallback")
    if not of_bytes and not model.get("byte_fallback"):
        raise ValueError(
            f"the tokenizer of {name} is BPE neither of bytes nor with bytes to fall back on; llama.cpp has "
            "no code for it"
        )
    size = max(tokenizer.get_vocab().values()) + 1
    if size > rows:
        raise ValueError(f"the tokenizer of {name} has {size} pieces, its embedding {rows} rows")
    pieces, kinds = _pieces(tokenizer, tree, rows, of_bytes=of_bytes)
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    ids = tokenizer("a")["input_ids"]
    return Vocabulary(
        model="gpt2" if of_bytes else "llama",
        rule=_rule(tree) if of_bytes else UNKNOWN_RULE,
        pieces=pieces,
        kinds=kinds,
        merges=merges if of_bytes else [],
        scores=[] if of_bytes else _scores(pieces, kinds, model["merges"]),
        adds_bos=tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id],
        adds_space=not of_bytes and _adds_space(tree),
    )


def _rule(tree: Mapping[str, Any]) -> str:
    ignores = bool(tree["model"].get("ignore_merges"))
    return KNOWN_RULES.get(rule_hash(tree["pre_tokenizer"], ignores_merges=ignores), UNKNOWN_RULE)


def _pieces(
    tokenizer: PreTrainedTokenizerBase, tree: Mapping[str, Any], rows: int, *, of_bytes: bool
) -> tuple[list[str], list[int]]:
    kind = gguf_package().TokenType
    pieces, kinds = [f"[PAD{row}]" for row in range(rows)], [int(kind.UNUSED)] * rows
    for piece, row in tokenizer.get_vocab().items():
        pieces[row], kinds[row] = piece, int(kind.NORMAL)
    unknown = tree["model"].get("unk_token")
    for row, token in tokenizer.added_tokens_decoder.items():
        pieces[row] = token.content
        kinds[row] = int(kind.CONTROL if token.special else kind.USER_DEFINED)
        if token.content == unknown and not of_bytes:
            kinds[row] = int(kind.UNKNOWN)
    for row, piece in enumerate(pieces):
        if not of_bytes and _BYTE.fullmatch(piece):
            kinds[row] = int(kind.BYTE)
    return pieces, kinds


def _scores(pieces: list[str], kinds: list[int], merges: list) -> list[float]:
    """SentencePiece's order of merging, from the list that was made of it: an earlier merge scores higher."""
    first: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        left, right = pair if isinstance(pair, list) else pair.split(" ")
        first.setdefault(left + right, rank)
    lowest = -1.0 - len(merges)
    normal = int(gguf_package().TokenType.NORMAL)
    return [
        -float(first[piece]) if kind == normal and piece in first else lowest if kind == normal else 0.0
        for piece, kind in zip(pieces, kinds, strict=True)
    ]


def _adds_space(tree: Mapping[str, Any]) -> bool:
    """Whether a text gets a space before its first word."""
    said = json.dumps([tree["normalizer"], tree["pre_tokenizer"]])
    return '"Prepend"' in said or '"prepend_scheme": "first"' in said or '"prepend_scheme": "always"' in said


def name_for_vocabulary(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """`general.name`: llama.cpp lets special tokens swallow the spaces after them where it has `phi-3` in it.

    That is so (src/llama-vocab.cpp) whatever the model is, and fails for a vocabulary without those tokens;
    so the name says it for tokenizers that do it, and for no other.
    """
    added = tokenizer.added_tokens_decoder.values()
    swallows = any(token.rstrip for token in added if token.special and token.content not in _KEEP_SPACES)
    if swallows and {*_KEEP_SPACES, "</s>"} <= tokenizer.get_vocab().keys():
        return name if _PHI3.search(name) else f"{name} (phi-3 tokens)"
    return _PHI3.sub("phi 3", name)


def describe_vocabulary(
    writer: Any, vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase, chat_template: str | None
) -> None:
    """Metadata of the tokenizer, into gguf's writer; its `eos_token` must be the one that ends an answer."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.rule)
    writer.add_token_list(vocabulary.pieces)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.model == "gpt2":
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.adds_space)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(False)
    for token in ("bos", "eos", "pad", "unk"):
        row = getattr(tokenizer, f"{token}_token_id")
        if row is not None:
            getattr(writer, f"add_{token}_token_id")(row)
    if chat_template:
        writer.add_chat_template(chat_template)
