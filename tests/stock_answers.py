"""What somebody with transformers alone gets from a directory; run by whichever Python has it.

    python stock_answers.py JOBS.json

JOBS is a list of {"directory", "questions", "out"}, and questions one of {"text", "image"}. The file `out`
holds, for each question, the ids and the pixels of the prompt, and the answer alone and in a batch.
"""

from __future__ import annotations

import json
import sys

import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

NEW_TOKENS = 24
BATCH = 10


def stock_answers(directory: str, questions: list[dict]) -> dict:
    processor = AutoProcessor.from_pretrained(directory)
    model, info = AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    model.eval()
    talks = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": question["text"]},
                    {"type": "image", "image": Image.open(question["image"]).convert("RGB")},
                ],
            }
        ]
        for question in questions
    ]
    alone = [_answers(model, processor, [talk]) for talk in talks]
    batched = [
        answer
        for start in range(0, len(talks), BATCH)
        for answer in _answers(model, processor, talks[start : start + BATCH])["answers"]
    ]
    return {
        "version": transformers.__version__,
        "missing": sorted(info["missing_keys"]),
        "rope_theta": getattr(model.config.text_config, "rope_theta", None),
        "eos_token": processor.tokenizer.eos_token,
        "ids": [one["ids"][0] for one in alone],
        "pixels": [one["pixels"] for one in alone],
        "alone": [one["answers"][0] for one in alone],
        "batched": batched,
    }


def _answers(model: torch.nn.Module, processor: object, talks: list) -> dict:
    inputs = processor.apply_chat_template(  # type: ignore[attr-defined]
        talks,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
    )
    tokenizer = processor.tokenizer  # type: ignore[attr-defined]
    with torch.no_grad():  # lmms-eval names the tokenizer's own end
        ids_BT = model.generate(  # type: ignore[operator]
            **inputs, max_new_tokens=NEW_TOKENS, eos_token_id=tokenizer.eos_token_id
        )
        assert torch.equal(ids_BT, model.generate(**inputs, max_new_tokens=NEW_TOKENS))  # type: ignore[operator]
    new_BN = ids_BT[:, inputs["input_ids"].shape[1] :]
    return {
        "ids": inputs["input_ids"].tolist(),
        "pixels": inputs["pixel_values"][0].flatten().tolist(),
        "answers": [text.strip() for text in tokenizer.batch_decode(new_BN, skip_special_tokens=True)],
    }


def main(jobs: str) -> None:
    with open(jobs) as stream:
        todo = json.load(stream)
    for job in todo:
        try:
            found = stock_answers(job["directory"], job["questions"])
        except Exception as error:  # one that this version cannot read does not stop the others
            found = {"error": f"{type(error).__name__}: {error}"}
        with open(job["out"], "w") as stream:
            json.dump(found, stream)


if __name__ == "__main__":
    main(sys.argv[1])
