"""Frozen linear layers in 4 or 8 bits, by bitsandbytes; values are quantized when a layer goes to the GPU."""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch
from torch import Tensor, nn

Bits = Literal["4bit", "8bit"]


def check_quantization(setting: str, bits: Bits, device: torch.device) -> None:
    """ValueError without bitsandbytes, or a CUDA device."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"`{setting}` is {bits}, which needs the package bitsandbytes: pip install 'llava_kd[quantize]', "
            "or set it to null"
        )
    if device.type != "cuda":
        raise ValueError(
            f"`{setting}` is {bits}, which runs on CUDA devices; this run is on {device.type}: set it to null"
        )


def quantize_linears(module: nn.Module, bits: Bits, *, compute_dtype: torch.dtype) -> None:
    """Put quantizing layers in the place of the linear ones below `module`.

    They hold the values as they are until they are moved to a GPU.
    """
    from bitsandbytes.nn.modules import (  # pyright: ignore[reportMissingImports]  # an extra
        Int8Params,
        Linear4bit,
        Linear8bitLt,
        Params4bit,
    )

    for path, layer in list(module.named_modules()):
        if type(layer) is not nn.Linear:
            continue
        shape, has_bias = (layer.in_features, layer.out_features), layer.bias is not None
        weight = layer.weight.detach()
        if bits == "4bit":
            new = Linear4bit(*shape, has_bias, compute_dtype=compute_dtype, quant_type="nf4", device="meta")
            new.weight = Params4bit(
                weight,
                requires_grad=False,
                quant_type="nf4",  # pyright: ignore[reportCallIssue]  # its __new__ takes what follows
                module=new,  # pyright: ignore[reportCallIssue]
            )
        else:
            new = Linear8bitLt(*shape, has_bias, has_fp16_weights=False, device="meta")
            new.weight = Int8Params(
                weight,
                requires_grad=False,
                has_fp16_weights=False,  # pyright: ignore[reportCallIssue]  # its __new__ takes it
            )
        new.bias = layer.bias
        module.set_submodule(path, new)


def is_quantized(layer: nn.Module) -> bool:
    return type(layer).__module__.startswith("bitsandbytes.")


def dequantized(layer: nn.Module) -> Tensor:
    """The fp32 values that a quantized layer stands for, on the CPU."""
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(layer).detach().float().cpu()
