"""How one of the two models reads a record."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerFast

from llava_kd.data.foreign.side import ForeignSide
from llava_kd.data.pixels.images import ImageTransform
from llava_kd.data.text.encoder import Encoder
from llava_kd.data.text.source_encoders import SourceEncoders
from llava_kd.data.text.template import Template


@dataclass(frozen=True, kw_only=True)
class Side:
    """Tokenizer, template and image transform of a model. An image fills `tokens_per_image` positions.

    `upright`: photos are turned by their orientation tags first, for both models of a stage or for neither.
    `source_templates` are, by name, those that sources of a mixture have of their own.
    """

    tokenizer: PreTrainedTokenizerFast
    template: Template
    image_token_id: int
    tokens_per_image: int
    transform: ImageTransform
    max_length: int
    upright: bool = False
    source_templates: Mapping[str, Template] = field(default_factory=dict)

    def encoder(self) -> SourceEncoders:
        others = {name: self._encoder(template) for name, template in self.source_templates.items()}
        return SourceEncoders(self._encoder(self.template), others)

    def _encoder(self, template: Template) -> Encoder:
        return Encoder(
            template=template,
            tokenizer=self.tokenizer,
            image_token_id=self.image_token_id,
            tokens_per_image=self.tokens_per_image,
            max_length=self.max_length,
        )

    def reads_as(self, other: Side) -> bool:
        """Whether both make the same tokens of every record."""
        return (
            self.template == other.template
            and self.source_templates == other.source_templates
            and self.image_token_id == other.image_token_id
            and self.tokens_per_image == other.tokens_per_image
            and self.max_length == other.max_length
            and self.tokenizer.get_vocab() == other.tokenizer.get_vocab()
        )

    @property
    def pad_id(self) -> int:
        pad_id = self.tokenizer.pad_token_id
        return pad_id if isinstance(pad_id, int) else 0  # padding is never read

    @property
    def text_fingerprint(self) -> str:
        """Hash of everything that decides the tokens.

        Padding and truncation do not: they are what the last call of the tokenizer asked for.
        """
        backend = copy.deepcopy(self.tokenizer.backend_tokenizer)
        backend.no_padding()
        backend.no_truncation()
        parts = (
            backend.to_str(),
            repr(self.template),
            *(repr(item) for item in sorted(self.source_templates.items())),
            repr((self.image_token_id, self.tokens_per_image, self.max_length)),
        )
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides the tokens and pixels."""
        turns = "\0upright" if self.upright else ""  # older runs have hashed no word for what they did not do
        return hashlib.sha256(f"{self.text_fingerprint}\0{self.transform!r}{turns}".encode()).hexdigest()


AnySide = Side | ForeignSide
