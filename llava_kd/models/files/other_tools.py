"""Which other tools will not open a student, said before it is trained."""

from __future__ import annotations

from llava_kd.models.files.checkpoint import Parts
from llava_kd.models.files.export import check_stock, vllm_notes
from llava_kd.models.files.gguf.language import family_of, head_size
from llava_kd.models.files.gguf.vision import check_vision
from llava_kd.models.towers.vision_tower import text_config

# Of vLLM's attention on CPUs (November 2026); on GPUs it takes others.
CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)


def unopened(parts: Parts) -> list[str]:
    """One line a tool; empty where transformers, vLLM and llama.cpp all take such a student."""
    name = "the student"
    try:
        check_stock(parts, name)
    except ValueError as error:
        return [f"none but llava_kd: {error}"]
    lines = vllm_notes(parts)
    text = text_config(parts.stock.config)
    has_heads = hasattr(text, "num_attention_heads")  # a recurrent one has none
    if has_heads and (size := head_size(text)) not in CPU_HEADS:
        lines.append(f"vLLM on a CPU has no attention for heads of {size}, only {list(CPU_HEADS)}")
    try:
        check_vision(parts.stock.config, parts.processor, name)
        family_of(text, name)
    except ValueError as error:
        lines.append(f"llama.cpp: {error}")
    return lines
