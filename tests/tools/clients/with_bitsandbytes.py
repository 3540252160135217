"""transformers with the language model's weights in the 8 bits of bitsandbytes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from bitsandbytes.nn import Linear8bitLt
from protocol import Answers, work
from transformers import BitsAndBytesConfig
from with_transformers import loaded, of_model

# Whole beginnings of names: a part of one is no match, and leaves nothing out.
KEPT = ["lm_head", "model.vision_tower", "model.multi_modal_projector"]


def opened_in(layer: type, **settings: object) -> Callable[[str], contextlib.AbstractContextManager[Answers]]:
    """`layer`: what the language model's layers must have become."""

    @contextlib.contextmanager
    def opened(directory: str) -> Iterator[Answers]:
        config = BitsAndBytesConfig(llm_int8_skip_modules=KEPT, **settings)
        model, processor = loaded(directory, quantization_config=config, device_map="cpu")
        names = [name for name, module in model.named_modules() if isinstance(module, layer)]
        if not names or not all(".language_model." in name for name in names):
            raise RuntimeError(f"not the language model's layers alone are {layer.__name__}: {names[:3]}")
        yield of_model(model, processor)

    return opened


opened = opened_in(Linear8bitLt, load_in_8bit=True)

if __name__ == "__main__":
    work(opened, "bitsandbytes", "transformers", "torch")
