"""Tokenizers, images and LLaVA files made on the spot for the tests of the data room."""

from __future__ import annotations

import io
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llava_kd.data.batches.loader import Loader
from llava_kd.data.batches.micro_batches import MicroBatches
from llava_kd.data.batches.model_side import Side
from llava_kd.data.batches.order import Order, Reading
from llava_kd.data.pixels.images import ImageTransform
from llava_kd.data.text.template_table import TEMPLATES

IMAGE_TOKEN = "<image>"
CORPUS = [
    "USER: What colour is the large circle? ASSISTANT: Red.",
    "user assistant system\nA chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "There are 3 small triangles and 12 squares; the blue one is left of the green one.",
    "How many shapes are there? Is there a yellow star? yes no Yes No one two three",
] * 4
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def qwen_like() -> PreTrainedTokenizerFast:
    """Byte-level BPE with Qwen's splitting rule; no beginning-of-sequence token."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", IMAGE_TOKEN]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


def llama_like() -> PreTrainedTokenizerFast:
    """SentencePiece-like BPE with byte fallback that puts <s> first by itself."""
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", IMAGE_TOKEN]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\u2581", behavior="merged_with_next"),
            pre_tokenizers.Split("\n", behavior="isolated"),
        ]
    )
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=700, special_tokens=special + alphabet, show_progress=False),
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def pixels(height: int, width: int, *, seed: int = 0) -> np.ndarray:
    """Smooth colours with some noise, so that a JPEG of it is not degenerate."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [128 + 100 * np.sin(x / 7 + seed + c) * np.cos(y / (5 + c)) for c in range(3)]
    return np.clip(np.stack(waves, -1) + rng.normal(0, 8, (height, width, 3)), 0, 255).astype(np.uint8)


def encoded_image(height: int = 40, width: int = 56, *, kind: str = "JPEG", seed: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels(height, width, seed=seed)).save(stream, kind)
    return stream.getvalue()


def entry(number: int, *, images: int = 1, rounds: int = 1) -> dict:
    """One sound record of a LLaVA file."""
    conversations = []
    for r in range(rounds):
        placeholders = f"{IMAGE_TOKEN}\n" * images if r == 0 else ""
        conversations += [
            {"from": "human", "value": f"{placeholders}How many shapes are in picture {number}, part {r}?"},
            {"from": "gpt", "value": f"There are {number} shapes" + " and more" * (number % 5) + "."},
        ]
    raw: dict = {"id": f"r{number}", "conversations": conversations}
    if images:
        names = [f"images/{number}_{k}.{'png' if (number + k) % 3 == 0 else 'jpg'}" for k in range(images)]
        raw["image"] = names[0] if images == 1 else names
    return raw


def write_dataset(folder: Path, entries: list[dict]) -> Path:
    """The JSON file of the entries, and their images below `folder`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number, raw in enumerate(entries):
        names = raw.get("image", [])
        for k, name in enumerate([names] if isinstance(names, str) else names):
            kind = "PNG" if name.endswith("png") else "JPEG"
            seed = 10 * number + k
            image = encoded_image(30 + 7 * (number % 4), 40 + 5 * (number % 6), kind=kind, seed=seed)
            (folder / name).write_bytes(image)
    path = folder / "data.json"
    path.write_text(json.dumps(entries))
    return path


def side(
    *,
    template: str = "vicuna",
    tokenizer: PreTrainedTokenizerFast | None = None,
    tokens_per_image: int = 4,
    size: int = 24,
    max_length: int = 256,
) -> Side:
    tokenizer = tokenizer or qwen_like()
    return Side(
        tokenizer=tokenizer,
        template=TEMPLATES[template],
        image_token_id=tokenizer.get_vocab()[IMAGE_TOKEN],
        tokens_per_image=tokens_per_image,
        transform=ImageTransform(size=(size, size), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        max_length=max_length,
    )


def loader_of(**words: Any) -> Loader:
    """A loader from one flat list of what it is told."""
    return Loader(**{"teacher": None, "device": "cpu"} | _grouped(words))


def micros_of(**words: Any) -> MicroBatches:
    return MicroBatches(**_grouped({"seed": 0, "global_batch_size": 1} | words))


def _grouped(words: dict[str, Any]) -> dict[str, Any]:
    """`order` and `reading` out of the words that are theirs, and the others."""
    words = dict(words)
    told = {
        name: kind(**{f.name: words.pop(f.name) for f in fields(kind) if f.name in words})
        for name, kind in (("order", Order), ("reading", Reading))
    }
    return words | told
