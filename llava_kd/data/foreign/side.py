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
    only the tokens are made, for predictions that are stored. `visual_token`: the id whose places hold the
    features of pictures, `tokens_per_image` of each; None where they lie in no grid that is known.
    """

    processor: ProcessorMixin
    max_tokens: int | None = None
    upright: bool = False
    keeps_pictures: bool = True
    visual_token: int | None = None
    tokens_per_image: int = 0

    def reader(self) -> Reader:
        """With a processor of its own, for a tokenizer is not shared between threads."""
        return Reader(
            copy.deepcopy(self.processor),
            self.max_tokens,
            visual_token=self.visual_token,
            tokens_per_image=self.tokens_per_image,
        )

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
            "visual tokens": f"{self.tokens_per_image} an image, id {self.visual_token}",
        }

    @property
    def fingerprint(self) -> str:
        return _sha(repr((self.prints, self.max_tokens, self.upright)))


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
