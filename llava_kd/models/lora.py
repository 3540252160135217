"""Low-rank adapters of the language model: put in, told apart, and merged into a stock model again.

The adapters stand in the place of the linear layers of the decoder and hold them as `base_layer`; peft makes
them. What is merged is `base + scaling * B @ A`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from llava_kd.models.quantize import dequantized, is_quantized

_NAME = "default"  # peft keeps adapters by name; there is one
_OWN_PRODUCT = {"FalconLinear"}  # the same product, written out


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return not {"lora_A", "lora_B"}.isdisjoint(name.split("."))


def linear_layers(stock: LlavaForConditionalGeneration) -> dict[str, nn.Linear]:
    """Linear layers of the decoder layers, by their path in the language model.

    A router of experts that calls itself linear but gives more than a product is none.
    """
    return {
        path: module
        for path, module in stock.model.language_model.named_modules()
        if isinstance(module, nn.Linear) and path.startswith("layers.") and _is_plain(module)
    }


def _is_plain(layer: nn.Linear) -> bool:
    kind = type(layer)
    return kind.forward is nn.Linear.forward or kind.__name__ in _OWN_PRODUCT or is_quantized(layer)


def chosen_layers(stock: LlavaForConditionalGeneration, targets: Sequence[str] | None) -> list[str]:
    """Paths of the linear layers that end in one of `targets`; all where that is None.

    Raises ValueError for a target that is none of them, with the nearest names.
    """
    paths = list(linear_layers(stock))
    if not paths:
        raise ValueError(
            f"`student.lora` adapts linear layers of the decoder, and this {_kind(stock)!r} model has none; "
            "set student.lora to null"
        )
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
    # Into the layers, not the model: of a known mixture of experts peft adapts other weights than are named.
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  # it is divided by the rank: any number does
        lora_dropout=dropout,
        target_modules=[path.removeprefix("layers.") for path in chosen_layers(stock, targets)],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # equal on every rank, whatever was drawn before
        inject_adapter_in_model(config, stock.model.language_model.layers, adapter_name=_NAME)


def adapted_share(stock: LlavaForConditionalGeneration, targets: Sequence[str] | None) -> str:
    """How much of the decoder layers' matrices the adapters will move, and which kinds they leave alone."""
    decoder = stock.model.language_model
    chosen = {f"{path}.weight" for path in chosen_layers(stock, targets)}
    sizes = {
        name: parameter.numel()
        for name, parameter in decoder.named_parameters()
        if name.startswith("layers.") and parameter.ndim > 1
    }
    share = sum(sizes[name] for name in chosen) / sum(sizes.values())
    alone = {re.sub(r"^layers\.\d+\.|\.weight$", "", name) for name in sizes.keys() - chosen}
    rest = f"; not on {', '.join(sorted(alone))}" if alone else ""
    return f"adapters on {len(chosen)} matrices, {share:.0%} of the decoder layers' weights{rest}"


def try_merge(stock: LlavaForConditionalGeneration, *, rank: int, targets: Sequence[str] | None) -> None:
    """Put adapters into an empty copy of `stock` and merge them. ValueError if no stock model comes out."""
    with torch.device("meta"):
        trial = type(stock)(stock.config)
        before = {name: value.shape for name, value in trial.state_dict().items()}
        add_adapters(trial, rank=rank, alpha=1.0, dropout=0.0, targets=targets, seed=0)
        weights = dict(trial.model.language_model.named_parameters(prefix="language_model"))
        merged = merge_adapters(trial, weights)
    after = {name: value.shape for name, value in trial.state_dict().items()}
    after |= {f"model.{name}": value.shape for name, value in merged.items()}
    if odd := [name for name in {**before, **after} if before.get(name) != after.get(name)]:
        raise _unmerged(stock, odd[0])


def _kind(stock: LlavaForConditionalGeneration) -> str:
    return str(stock.model.language_model.config.model_type)


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
        if f"{name}.base_layer.weight" not in merged:
            raise _unmerged(stock, name)
        whole = merged[f"{name}.base_layer.weight"]
        factor_B = merged.pop(f"{name}.lora_B.{_NAME}.weight")
        scaling = layer.scaling[_NAME]
        merged[f"{name}.base_layer.weight"] = whole.float() + scaling * (factor_B.float() @ factor_A.float())
        decoder.set_submodule(path, base)
    for path, layer in list(decoder.named_modules()):
        if is_quantized(layer):
            decoder.set_submodule(path, _plain(layer))
    if left := [name for name in merged if is_adapter(name)]:
        raise _unmerged(stock, left[0])
    return {name.replace(".base_layer.", "."): value for name, value in merged.items()}


def _unmerged(stock: LlavaForConditionalGeneration, what: str) -> ValueError:
    return ValueError(
        f"`student.lora`: the adapter of {what} in this {_kind(stock)!r} model cannot be merged into a stock "
        "one; name other targets, or set student.lora to null"
    )


def _plain(layer: nn.Module) -> nn.Linear:
    assert isinstance(layer, nn.Linear)
    return nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
