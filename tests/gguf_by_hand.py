"""GGUF files computed with, in plain PyTorch: the graphs of llama.cpp for `clip`, `llama` and `qwen2`.

Written from its graphs (tools/mtmd/models/llava.cpp, src/models/llama.cpp), with the class token first, as
the indices there want it.

Shape legend: I images, C channels, P pixels a side, N tokens, E tower width, D width, H heads, T words,
K half of a head, V vocabulary.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import quants
from torch import Tensor
from torch.nn import functional as F


def tensors(path: Path) -> dict[str, Tensor]:
    """By name, in float32, in PyTorch's order of sizes."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
            raw = torch.from_numpy(np.array(tensor.data)).view(torch.bfloat16).float()
            found[tensor.name] = raw.reshape([int(size) for size in reversed(tensor.shape)])
        else:
            found[tensor.name] = torch.from_numpy(
                np.array(quants.dequantize(tensor.data, tensor.tensor_type))
            )
    return found


def settings(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def types(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def picture_tokens(path: Path, pixels_ICPP: Tensor, *, class_last: bool = False) -> Tensor:
    """[I, N, D], what the projector gives. `class_last` is the fault of ggml-org/llama.cpp#25814."""
    said, w = settings(path), tensors(path)
    epsilon = said["clip.vision.attention.layer_norm_epsilon"]
    heads = said["clip.vision.attention.head_count"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], epsilon)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    x_INE = F.conv2d(
        pixels_ICPP,
        w["v.patch_embd.weight"],
        w.get("v.patch_embd.bias"),
        stride=said["clip.vision.patch_size"],
    )
    x_INE = x_INE.flatten(2).transpose(1, 2)
    if "v.class_embd" in w:
        parts = [w["v.class_embd"].expand(len(x_INE), 1, -1), x_INE]
        x_INE = torch.cat(parts[::-1] if class_last else parts, 1)
    x_INE = x_INE + w["v.position_embd.weight"]
    if "v.pre_ln.weight" in w:
        x_INE = norm(x_INE, "v.pre_ln")
    for layer in range(max(said["clip.vision.feature_layer"])):
        block = f"v.blk.{layer}"
        y = norm(x_INE, f"{block}.ln1")
        q, k, v = (
            linear(y, f"{block}.attn_{part}").unflatten(-1, (heads, -1)).transpose(1, 2) for part in "qkv"
        )
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x_INE = x_INE + linear(seen, f"{block}.attn_out")
        y = linear(norm(x_INE, f"{block}.ln2"), f"{block}.ffn_up")
        y = F.gelu(y, approximate="tanh") if said["clip.use_gelu"] else y * torch.sigmoid(1.702 * y)
        x_INE = x_INE + linear(y, f"{block}.ffn_down")
    if "v.post_ln.weight" in w:
        x_INE = norm(x_INE, "v.post_ln")
    if "v.class_embd" in w:
        x_INE = x_INE[:, 1:]
    return linear(F.gelu(linear(x_INE, "mm.0")), "mm.2")


def logits(path: Path, ids: list[int]) -> Tensor:
    """[T, V] of a `llama` or `qwen2` file."""
    said, w = settings(path), tensors(path)
    arch = said["general.architecture"]
    heads, groups = said[f"{arch}.attention.head_count"], said[f"{arch}.attention.head_count_kv"]
    epsilon, size = said[f"{arch}.attention.layer_norm_rms_epsilon"], said[f"{arch}.rope.dimension_count"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], w[f"{name}.weight"], epsilon)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    steps = torch.arange(0, size, 2, dtype=torch.float64) / size
    frequencies = said[f"{arch}.rope.freq_base"] ** -steps / w.get("rope_freqs.weight", torch.ones(size // 2))
    angles_TK = torch.arange(len(ids), dtype=torch.float64)[:, None] * frequencies

    def turned(x_HTK: Tensor) -> Tensor:
        pair = x_HTK.unflatten(-1, (-1, 2)) if arch == "llama" else x_HTK.unflatten(-1, (2, -1)).mT
        turn = torch.view_as_complex(pair.double().contiguous()) * torch.polar(
            torch.ones_like(angles_TK), angles_TK
        )
        pair = torch.view_as_real(turn).float()
        return pair.flatten(-2) if arch == "llama" else pair.mT.flatten(-2)

    x_TD = w["token_embd.weight"][ids]
    for layer in range(said[f"{arch}.block_count"]):
        block = f"blk.{layer}"
        y = norm(x_TD, f"{block}.attn_norm")
        q, k, v = (
            linear(y, f"{block}.attn_{part}").unflatten(-1, (count, -1)).transpose(0, 1)
            for part, count in (("q", heads), ("k", groups), ("v", groups))
        )
        k, v = (t.repeat_interleave(heads // groups, 0) for t in (turned(k), v))
        seen = F.scaled_dot_product_attention(turned(q), k, v, is_causal=True)
        x_TD = x_TD + linear(seen.transpose(0, 1).flatten(1), f"{block}.attn_output")
        y = norm(x_TD, f"{block}.ffn_norm")
        gate = F.silu(linear(y, f"{block}.ffn_gate")) * linear(y, f"{block}.ffn_up")
        x_TD = x_TD + linear(gate, f"{block}.ffn_down")
    return F.linear(norm(x_TD, "output_norm"), w.get("output.weight", w["token_embd.weight"]))


def sentencepiece(path: Path, text: str) -> list[int]:
    """Ids as llama.cpp's SPM code has them: the neighbours whose piece scores highest are joined first."""
    said = settings(path)
    pieces, scores = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.scores"]
    row = {piece: k for k, piece in enumerate(pieces)}
    space = " " if said["tokenizer.ggml.add_space_prefix"] else ""
    parts = list((space + text).replace(" ", "\u2581"))
    while True:
        joined = [
            (scores[row[a + b]], -k) for k, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in row
        ]
        if not joined:
            break
        at = -max(joined)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    ids = []
    for part in parts:
        ids += [row[part]] if part in row else [row[f"<0x{byte:02X}>"] for byte in part.encode()]
    return ids
