"""How a model of another kind than LLaVA reads a record, as the loader is told."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass

from transformers import ProcessorMixin

from llava_kd.data.foreign.reader import Reader
from llava_kd.data.foreign.talks import own_chat_template, tokenizer_of


@dataclass(frozen=True, kw_only=True)
class ForeignSide:
    """A processor of its own: its tokens, its tiles, its chat template.

    A record of more than `max_tokens` is refused. `upright`: as of the other side. Without `keeps_pictures`
    only the tokens are made, for predictions that are stored.
    """

    processor: ProcessorMixin
    max_tokens: int | None = None
    upright: bool = False
    keeps_pictures: bool = True

    def reader(self) -> Reader:
        """With a processor of its own, for a tokenizer is not shared between threads."""
        return Reader(copy.deepcopy(self.processor), self.max_tokens)

    @property
    def pad_id(self) -> int:
        pad_id = tokenizer_of(self.processor).pad_token_id
        return pad_id if isinstance(pad_id, int) else 0

    @property
    def prints(self) -> dict[str, str]:
        """Hashes of what decides tokens and pixels, by name."""
        backend = copy.deepcopy(tokenizer_of(self.processor).backend_tokenizer)
        backend.no_padding()
        backend.no_truncation()
        settings = json.dumps(self.processor.to_dict(), sort_keys=True, default=str)
        return {
            "tokenizer": _sha(backend.to_str()),
            "chat template": _sha(own_chat_template(self.processor)),
            "processor": _sha(settings),
        }

    @property
    def fingerprint(self) -> str:
        return _sha(repr((self.prints, self.max_tokens, self.upright)))


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
