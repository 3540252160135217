"""The tokens that only a template may write, and how the same words in a record are read as text.

A tokenizer takes "<|im_end|>" for the end of a turn wherever it stands, also in a talk about chat formats.
Where a record has such words, a copy of the tokenizer reads it, in which every control token goes by another
name, a private one, that the template's own are given: the copy does all else as the tokenizer does, with the
same ids. A text without such words never meets the copy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property

from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerFast

from llava_kd.data.sources.conversation import IMAGE_PLACEHOLDER

# Characters without a meaning of their own: a mark, and the number of the token.
_CONTROL, _COVER, _FIRST = "\U00100000", "\U00100001", 0xF0000
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # what stands for a character that has no token
_PRIVATE = re.compile(f"[{_CONTROL}{_COVER}]")


class ControlWords:
    """Of one tokenizer. `written` is a text by the template: all tokens that mark its turns are in it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, written: str) -> None:
        self._tokenizer = tokenizer
        self._ids = {
            token.content: number
            for number, token in tokenizer.added_tokens_decoder.items()
            if (token.special and not _BYTE.fullmatch(token.content))
            or (token.content.strip() and token.content in written)
        }
        if IMAGE_PLACEHOLDER in (vocabulary := tokenizer.get_vocab()):
            self._ids[IMAGE_PLACEHOLDER] = vocabulary[IMAGE_PLACEHOLDER]
        self._words = sorted(self._ids, key=len, reverse=True)
        self._numbers = {word: number for number, word in enumerate(self._words)}
        last = chr(_FIRST + max(len(self._words) - 1, 0))
        self._covered = re.compile(f"{_COVER}([{chr(_FIRST)}-{last}])")
        self._any = re.compile("|".join(map(re.escape, self._words)) or "(?!)")
        self._any_but_images = re.compile(
            "|".join(re.escape(word) for word in self._words if word != IMAGE_PLACEHOLDER) or "(?!)"
        )

    def found(self, text: str, *, has_places: bool) -> list[str]:
        """The control tokens that a text would be read as; with `has_places`, "<image>" is meant as one."""
        return (self._any_but_images if has_places else self._any).findall(text)

    def covered(self, texts: Sequence[tuple[str, bool]]) -> list[str] | None:
        """Texts of a talk, each with its `has_places`, with those words out of sight; None if there are none.

        ValueError if a text already has the private characters that are used for it.
        """
        if not any(self.found(text, has_places=has_places) for text, has_places in texts):
            return None
        result = []
        for text, has_places in texts:
            if mark := _PRIVATE.search(text):
                raise ValueError(
                    f"the text contains words of control tokens and the private character {mark[0]!r}; "
                    "remove one of them"
                )
            pattern = self._any_but_images if has_places else self._any
            result.append(pattern.sub(lambda found: f"{_COVER}{self._mark(found[0])}", text))
        return result

    def is_covered(self, rendered: str) -> bool:
        return self._covered.search(rendered) is not None

    def renamed(self, rendered: str) -> str:
        """What a template made of covered texts, as the copy reads it."""
        named = self._any.sub(lambda found: self._name(found[0]), rendered)
        return self._covered.sub(lambda found: self._words[ord(found[1]) - _FIRST], named)

    def encode(self, renamed: str) -> Encoding:
        """Ids and offsets by the copy. ValueError if a word of the text is a control token even so."""
        encoding = self.copy.encode(renamed, add_special_tokens=False)
        control = set(self._ids.values()) - self._unknown
        for number, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if number in control and _CONTROL not in renamed[start:stop]:
                raise ValueError(
                    f"{renamed[start:stop]!r} in its text is a control token for this tokenizer; remove it"
                )
        return encoding

    @property
    def _unknown(self) -> set[int]:
        unknown = self._tokenizer.unk_token_id
        return {unknown} if isinstance(unknown, int) else set()

    def _name(self, word: str) -> str:
        return f"{_CONTROL}{self._mark(word)}"

    def _mark(self, word: str) -> str:
        return chr(_FIRST + self._numbers[word])

    @cached_property
    def reader(self) -> PreTrainedTokenizerFast:
        """The copy, for a processor."""
        own = self._tokenizer
        named = {k: self.renamed(v) for k, v in own.special_tokens_map.items() if isinstance(v, str)}
        return PreTrainedTokenizerFast(
            tokenizer_object=self.copy, model_input_names=own.model_input_names, **named
        )

    @cached_property
    def copy(self) -> Tokenizer:
        """The tokenizer, its control tokens by other names."""
        tree = json.loads(self._tokenizer.backend_tokenizer.to_str())
        names = {word: self._name(word) for word in self._words}
        tree["truncation"] = tree["padding"] = None
        for token in tree["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        _rename_in_model(tree["model"], names)
        copy = Tokenizer.from_str(json.dumps(tree))
        if wrong := [word for word, number in self._ids.items() if copy.token_to_id(names[word]) != number]:
            raise ValueError(
                f"this tokenizer cannot be made to read {wrong[0]!r} as text; remove it from the record"
            )
        return copy


def _rename_in_model(model: dict, names: dict[str, str]) -> None:
    """The vocabulary has the new names, and nothing is merged to one of the old."""
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(word, word): number for word, number in vocabulary.items()}
    elif isinstance(vocabulary, list):
        model["vocab"] = [[names.get(word, word), *rest] for word, *rest in vocabulary]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if model.get("merges"):
        pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        model["merges"] = [list(pair) for pair in pairs if not names.keys() & {*pair, "".join(pair)}]
