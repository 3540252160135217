"""Low-rank adapters of the language model: put in, told apart, and merged into a stock model again.

The adapters stand in the place of the linear layers of the decoder and hold them as `base_layer`; peft makes
them. What is merged is `base + scaling * B @ A`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from llava_kd.models.quantize import dequantized, is_quantized

_NAME = "default"  # peft keeps adapters by name; there is one


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return not {"lora_A", "lora_B"}.isdisjoint(name.split("."))


def linear_layers(stock: LlavaForConditionalGeneration) -> dict[str, nn.Linear]:
    """Linear layers of the decoder layers, by their path in the language model."""
    return {
        path: module
        for path, module in stock.model.language_model.named_modules()
        if isinstance(module, nn.Linear) and path.startswith("layers.")
    }


def chosen_layers(stock: LlavaForConditionalGeneration, targets: Sequence[str] | None) -> list[str]:
    """Paths of the linear layers that end in one of `targets`; all where that is None.

    Raises ValueError for a target that is none of them, with the nearest names.
    """
    paths = list(linear_layers(stock))
    if targets is None:
        return paths
    names = sorted({path.rsplit(".", 1)[1] for path in paths})
    for target in targets:
        if not any(path == target or path.endswith(f".{target}") for path in paths):
            near = difflib.get_close_matches(target, names, n=2)
            hint = f" (did you mean {' or '.join(near)}?)" if near else ""
            raise ValueError(
                f"`student.lora.targets` names {target!r}, which is no linear layer of the decoder{hint}; "
                f"they are {', '.join(names)}"
            )
    if not targets:
        raise ValueError(
            f"`student.lora.targets` is empty; name some of {', '.join(names)}, or set it to null"
        )
    return [path for path in paths if any(path == t or path.endswith(f".{t}") for t in targets)]


def add_adapters(
    stock: LlavaForConditionalGeneration,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str] | None,
    seed: int,
) -> None:
    """Put adapters into the language model; they change nothing until they are trained.

    Raises ValueError without peft, for unknown targets, and for a rank that is none.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(
            "`student.lora` needs the package peft: pip install 'llava_kd[lora]', or set student.lora to null"
        ) from error
    if rank < 1:
        raise ValueError(f"`student.lora.rank` must be at least 1; got {rank}")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  # it is divided by the rank: any number does
        lora_dropout=dropout,
        target_modules=chosen_layers(stock, targets),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # equal on every rank, whatever was drawn before
        inject_adapter_in_model(config, stock.model.language_model, adapter_name=_NAME)


def merge_adapters(stock: LlavaForConditionalGeneration, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the adapters out of `stock`, and return `weights` with what they add, under stock names.

    `weights` are whole and named as in an `MLLM`. Layers that were quantized are plain ones again, of the
    values that the quantized ones stood for.
    """
    merged = dict(weights)
    decoder = stock.model.language_model
    for path, layer in decoder.named_modules():
        if is_quantized(layer):
            merged[f"language_model.{path}.weight"] = dequantized(layer)
    for path, layer in list(decoder.named_modules()):
        name = f"language_model.{path}"
        factor_A = merged.pop(f"{name}.lora_A.{_NAME}.weight", None)
        if factor_A is None:
            continue
        base = getattr(layer, "base_layer")  # noqa: B009  # peft's own name; its classes differ by type
        whole = merged[f"{name}.base_layer.weight"]
        factor_B = merged.pop(f"{name}.lora_B.{_NAME}.weight")
        scaling = layer.scaling[_NAME]
        merged[f"{name}.base_layer.weight"] = whole.float() + scaling * (factor_B.float() @ factor_A.float())
        decoder.set_submodule(path, base)
    for path, layer in list(decoder.named_modules()):
        if is_quantized(layer):
            decoder.set_submodule(path, _plain(layer))
    return {name.replace(".base_layer.", "."): value for name, value in merged.items()}


def _plain(layer: nn.Module) -> nn.Linear:
    assert isinstance(layer, nn.Linear)
    return nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
