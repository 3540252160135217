"""transformers with the language model's weights in the 8 bits of bitsandbytes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from bitsandbytes.nn import Linear8bitLt
from protocol import Answers, work
from transformers import BitsAndBytesConfig
from with_transformers import loaded, of_model

KEPT = ["lm_head", "vision_tower", "multi_modal_projector"]


@contextlib.contextmanager
def opened(directory: str) -> Iterator[Answers]:
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=KEPT)
    model, processor = loaded(directory, quantization_config=config, device_map="cpu")
    if not any(isinstance(module, Linear8bitLt) for module in model.modules()):
        raise RuntimeError("no layer has 8 bits")
    yield of_model(model, processor)


if __name__ == "__main__":
    work(opened, "bitsandbytes", "transformers", "torch")
