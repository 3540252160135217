"""A conversation about images with a stock LLaVA directory, streamed piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from llava_kd.data.sources.conversation import IMAGE_PLACEHOLDER
from llava_kd.evaluation.generation.generate import Generator
from llava_kd.evaluation.generation.pictures import open_picture
from llava_kd.evaluation.generation.prompt import model_inputs, render_talk
from llava_kd.models.files.upright import reads_upright


@dataclass
class Chat:
    """`turns` is the conversation so far: messages of role and content, the images in the first."""

    generator: Generator
    images: list[Image.Image]
    turns: list[dict[str, str]] = field(default_factory=list)

    @staticmethod
    def load(directory: str, images: Sequence[str], *, max_new_tokens: int = 256) -> Chat:
        """Raises ValueError for a directory that is no stock LLaVA or an image that cannot be read."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        generator = Generator.load(directory, device=device, max_new_tokens=max_new_tokens)
        upright = reads_upright(generator.processor)
        return Chat(generator, [_open(path, upright) for path in images])

    @torch.no_grad()
    def stream(self, question: str) -> Iterator[str]:
        """The greedy answer in pieces; the turn is then remembered."""
        asked = [*self.turns, {"role": "user", "content": self._with_places(question)}]
        processor, model = self.generator.processor, self.generator.model
        text = render_talk(processor, asked, has_images=bool(self.images))
        given = dict(model_inputs(processor, [text], self.images).to(model.device, model.dtype))
        ids, shown, cache = [], "", None
        ends = set(self.generator.end_ids)
        for _ in range(self.generator.max_new_tokens):
            output = model(**given, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            token = int(output.logits[0, -1].argmax())
            if token in ends:
                break
            ids.append(token)
            # Most templates leave the space before an answer to its first token.
            text = processor.tokenizer.decode(ids, skip_special_tokens=True).lstrip()
            if text != shown and not text.endswith(
                "\ufffd"
            ):  # else bytes of a character are not all there yet
                yield text[len(shown) :]
                shown = text
            given = {"input_ids": torch.tensor([[token]], device=model.device)}
        self.turns = [*asked, {"role": "assistant", "content": shown.strip()}]

    def _with_places(self, question: str) -> str:
        """The question with a place for each image, in the first turn before its words unless it has them."""
        if not question:
            raise ValueError("the question is empty")
        if not self.images:
            return question
        places = question.count(IMAGE_PLACEHOLDER)
        expected = 0 if self.turns else len(self.images)
        if places not in (0, expected):
            raise ValueError(
                f"the question has {places} placeholders {IMAGE_PLACEHOLDER}, but {expected} images belong "
                "to it: all images belong to the first question. Remove the placeholders, or give one for "
                "each image"
            )
        return question if places else f"{IMAGE_PLACEHOLDER}\n" * expected + question


def _open(path: str, upright: bool = False) -> Image.Image:
    try:
        return open_picture(Path(path), upright)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the image {path}: {error}") from error
