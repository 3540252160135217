"""A small Qwen2 tokenizer that knows the words of the shapes data and can spell any other text.

It is a stock `Qwen2Tokenizer` and not merely a file: AutoTokenizer goes by the model's type and would put
Qwen2's way of splitting words in the place of any other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

PAD_TOKEN = "<pad>"
END_TOKEN = "</s>"
IMAGE_TOKEN = "<image>"
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
NUM_SPECIAL_TOKENS = 3 + len(CHATML_TOKENS)
CHAT_WORDS = "USER: ASSISTANT:\nuser\nassistant\nsystem\nYou are a helpful assistant.\n"


def make_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Qwen2Tokenizer:
    """Byte-level BPE of at most `vocab_size` tokens; frequent words of `texts` are one token each."""
    stock = Qwen2Tokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE())
    learner.normalizer = stock.normalizer
    learner.pre_tokenizer = stock.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - NUM_SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = (text.replace(END_TOKEN, "\n") for text in texts)
    learner.train_from_iterator([*words, *[CHAT_WORDS] * 100], trainer)
    learnt = json.loads(learner.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(merge) for merge in learnt["merges"]],  # pyright: ignore[reportArgumentType]
        unk_token=PAD_TOKEN,  # never produced: bytes spell everything
        eos_token=END_TOKEN,
        pad_token=PAD_TOKEN,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        model_max_length=2048,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    chatml = [AddedToken(token, special=True) for token in CHATML_TOKENS]
    tokenizer.add_tokens(chatml)  # pyright: ignore[reportArgumentType]
    return tokenizer
