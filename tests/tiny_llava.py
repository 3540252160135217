"""A tiny random stock LLaVA directory for tests: SigLIP or CLIP tower, MLP projector, Qwen2."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

IMAGE_TOKEN = "<image>"
END_TOKEN = "<|im_end|>"
PAD_TOKEN = "<|endoftext|>"
SPECIAL_TOKENS = (PAD_TOKEN, "<|im_start|>", END_TOKEN, IMAGE_TOKEN)

# Content of a message: a string, or a list of {"type": "image"} and {"type": "text", "text": ...}.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(*, extra_tokens: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Byte-level tokenizer without merges: 256 bytes, then `extra_tokens`, then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate((*alphabet, *extra_tokens))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_TOKEN,
        pad_token=PAD_TOKEN,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def merged_tokenizer() -> PreTrainedTokenizerFast:
    """Of another family: byte-level too, with words of its own, other numbers and another end token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    said = [
        f"{size} {colour} {shape}s: yes, there are three; no, it is left of the {shape}. USER ASSISTANT"
        for size in ("small", "large")
        for colour in ("red", "blue", "green", "yellow")
        for shape in ("circle", "square", "triangle", "star")
    ]
    backend.train_from_iterator(
        said,
        trainers.BpeTrainer(
            vocab_size=340,
            special_tokens=["</s>", IMAGE_TOKEN, "<pad>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def tiny_processor(
    *,
    tower: Literal["siglip", "clip"] = "siglip",
    image_size: int = 32,
    patch_size: int = 8,
    strategy: Literal["full", "default"] = "full",
    extra_tokens: tuple[str, ...] = (),
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> LlavaProcessor:
    if tower == "siglip":
        images = SiglipImageProcessor(size={"height": image_size, "width": image_size})
    else:
        images = CLIPImageProcessor(
            size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
        )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer or tiny_tokenizer(extra_tokens=extra_tokens),
        patch_size=patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1 if tower == "clip" else 0,
        chat_template=CHATML,
    )


def make_tiny_llava(
    directory: str | Path,
    *,
    tower: Literal["siglip", "clip"] = "siglip",
    image_size: int = 32,
    patch_size: int = 8,
    tower_hidden: int = 32,
    tower_layers: int = 2,
    hidden: int = 48,
    layers: int = 2,
    heads: int = 4,
    vocab_size: int | None = None,
    tied: bool = False,
    feature_layer: int = -2,
    strategy: Literal["full", "default"] = "full",
    seed: int = 0,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Path:
    """Write a stock LLaVA directory: config, safetensors, processor, tokenizer, chat template.

    `vocab_size` (rows of embedding and head) may exceed the tokenizer's length: the rest is padding rows.
    With the defaults an image fills 16 tokens; "default" drops the first feature, as a CLIP tower needs.
    """
    directory = Path(directory)
    processor = tiny_processor(
        tower=tower, image_size=image_size, patch_size=patch_size, strategy=strategy, tokenizer=tokenizer
    )
    tokenizer = processor.tokenizer
    tower_config = (SiglipVisionConfig if tower == "siglip" else CLIPVisionConfig)(
        hidden_size=tower_hidden,
        intermediate_size=2 * tower_hidden,
        num_hidden_layers=tower_layers,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=patch_size,
    )
    text_config = Qwen2Config(
        vocab_size=vocab_size or len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=2048,
        initializer_range=0.2,  # wide, so that different inputs give different answers
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=tower_config,
        text_config=text_config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=strategy,
        image_seq_length=(image_size // patch_size) ** 2,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory
