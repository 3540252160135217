"""Small Qwen2 language models that have read descriptions of scenes and talk about them, but seen no picture.

Shape legend: B texts, T tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from backbone_tokenizer import END_TOKEN, PAD_TOKEN
from torch import Tensor
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from llava_kd.data.shapes.questions import Picker
from llava_kd.data.shapes.settings import Setting

IGNORE = -100


def texts(shapes: Setting[Any], *, seed: int) -> Iterator[str]:
    """Endless conversations about described scenes, written as the instruction template writes them."""
    rng = random.Random(f"texts {seed}")
    picker, split = Picker(), shapes.splits["train"]
    while True:
        scene = split.scene(rng)
        candidates = split.questions(scene, rng)
        asked = [q for name in shapes.types if (q := picker.pick(candidates, name, rng)) is not None]
        rng.shuffle(asked)
        turns = [f"USER: {q.text} ASSISTANT: {q.answer}{END_TOKEN}" for q in asked]
        turns[0] = f"USER: {shapes.caption(scene)}\n" + turns[0].removeprefix("USER: ")
        yield "".join(turns)


def make_llm(
    tokenizer: Qwen2Tokenizer,
    *,
    vocab_rows: int,
    width: int,
    layers: int,
    heads: int,
    mlp_width: int,
) -> Qwen2ForCausalLM:
    """An untrained Qwen2; `vocab_rows` above the size of the tokenizer are padding, as in Qwen2.5."""
    config = Qwen2Config(
        vocab_size=vocab_rows,
        hidden_size=width,
        intermediate_size=mlp_width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.get_vocab()[END_TOKEN],
        pad_token_id=tokenizer.get_vocab()[PAD_TOKEN],
    )
    return Qwen2ForCausalLM(config)


def train_llm(
    model: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    *,
    stream: Iterator[str],
    name: str,
    steps: int,
    batch_size: int,
    learning_rate: float,
) -> None:
    """Next-token training on the texts of `stream`; no text is seen twice."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=max(steps, 2), pct_start=0.1
    )
    bar = tqdm(range(steps), desc=name, unit="step")
    for _ in bar:
        ids_BT, labels_BT = _batch(tokenizer, [next(stream) for _ in range(batch_size)])
        loss = _loss(model, ids_BT, labels_BT)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def _batch(tokenizer: Qwen2Tokenizer, batch: list[str]) -> tuple[Tensor, Tensor]:
    """Right-padded ids, and labels that leave the padding out."""
    encoded = tokenizer(batch, return_tensors="pt", padding=True)
    ids_BT = encoded["input_ids"]
    return ids_BT, ids_BT.masked_fill(encoded["attention_mask"] == 0, IGNORE)


def _loss(model: Qwen2ForCausalLM, ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """Causal attention never looks at padding on the right, so no attention mask is needed."""
    logits_BTV = model(input_ids=ids_BT[:, :-1]).logits
    return F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=IGNORE)
