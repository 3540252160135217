"""Plain transformers, of whichever version this Python has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from protocol import NEW_TOKENS, Answers, Question, work
from transformers import AutoModelForImageTextToText, AutoProcessor


def talk(question: Question) -> list[dict]:
    """As `apply_chat_template` takes it, with pictures that are open."""
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "image", "image": Image.open(part["path"]).convert("RGB")}
                if part["type"] == "image"
                else part
                for part in message["content"]
            ],
        }
        for message in question
    ]


def of_model(model: torch.nn.Module, processor: object) -> Answers:
    @torch.no_grad()
    def answers(questions: Sequence[Question], batch: int) -> list[str]:
        found: list[str] = []
        for start in range(0, len(questions), batch):
            inputs = processor.apply_chat_template(  # type: ignore[attr-defined]
                [talk(question) for question in questions[start : start + batch]],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                padding=True,
            )
            ids_BT = model.generate(**inputs, max_new_tokens=NEW_TOKENS)  # type: ignore[operator]
            new_BT = ids_BT[:, inputs["input_ids"].shape[1] :]
            found += processor.tokenizer.batch_decode(new_BT, skip_special_tokens=True)  # type: ignore[attr-defined]
        return found

    return answers


def loaded(directory: str, **settings: object) -> tuple[torch.nn.Module, object]:
    """Model and processor; RuntimeError where weights were not found."""
    torch.set_num_threads(1)
    processor = AutoProcessor.from_pretrained(directory)
    model, info = AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, **settings
    )
    if missing := sorted(info["missing_keys"]):
        raise RuntimeError(f"weights that were not found: {missing}")
    return model.eval(), processor


@contextlib.contextmanager
def opened(directory: str) -> Iterator[Answers]:
    yield of_model(*loaded(directory))


if __name__ == "__main__":
    work(opened, "transformers", "torch")
