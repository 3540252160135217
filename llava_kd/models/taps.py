"""What goes into or comes out of any module of a model, by its path, without changing the model.

Shape legend: B rows, T tokens, D width, I images, N tokens of an image, E tower width.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from llava_kd.batch import IGNORE_INDEX, Inputs, Places
from llava_kd.models.attention import packed as packed_attention
from llava_kd.models.towers.stages import stage_number, stage_widths
from llava_kd.models.towers.vision_tower import vision_config

_SIDES = ("input", "output")


@dataclass(frozen=True)
class Tap:
    """A place in a model: a module's path below `vision_tower`, `multi_modal_projector`, `language_model` or
    `lm_head`, and whether what it gets or what it gives is read.
    """

    path: str
    side: Literal["input", "output"] = "output"

    @classmethod
    def parse(cls, text: str) -> Tap:
        """`language_model.layers.12`, or with `:input` behind it. ValueError for another ending."""
        path, _, side = text.partition(":")
        if side not in ("", *_SIDES):
            raise ValueError(f"a tap ends in :input or :output, or names a module alone; got {text!r}")
        return cls(path, "input" if side == "input" else "output")

    def __str__(self) -> str:
        return self.path if self.side == "output" else f"{self.path}:{self.side}"


def tapped_module(stock: LlavaForConditionalGeneration, tap: Tap) -> nn.Module:
    """The module that a tap names; the tower, for a stage of it. Raises ValueError where there is none."""
    model = stock.model
    if (stage := stage_number(tap.path)) is not None:
        stage_widths(model.vision_tower, stock.config, [stage])
        return model.vision_tower
    roots: dict[str, nn.Module] = {
        "vision_tower": model.vision_tower,
        "multi_modal_projector": model.multi_modal_projector,
        "language_model": model.language_model,
        "lm_head": stock.lm_head,
    }
    part, _, rest = tap.path.partition(".")
    if part not in roots:
        raise ValueError(f"the tap {tap.path!r} must begin with one of {', '.join(roots)}")
    modules = dict(roots[part].named_modules())
    if rest not in modules:
        paths = [f"{part}.{path}" for path in modules if path]
        near = difflib.get_close_matches(tap.path, paths, n=3, cutoff=0.3)
        raise ValueError(f"the tap {tap.path!r} names no module of the model; near it are {', '.join(near)}")
    return modules[rest]


class Taps:
    """Reads chosen places of one model while `watch` is open.

    What a module gives may be a tuple or an output object: its first tensor is read. The tensors are those of
    the forward itself, with their graph, so a loss on them trains what they come from.
    """

    def __init__(self, stock: LlavaForConditionalGeneration, taps: Sequence[Tap]) -> None:
        """Raises ValueError for a path that the model does not have."""
        self._modules = {tap: tapped_module(stock, tap) for tap in taps}

    @contextmanager
    def watch(self) -> Iterator[Mapping[Tap, Tensor]]:
        """The tensors of the forwards run inside the block, by tap.

        A block holds one forward of each tapped module. It must be left before the backward: activation
        checkpointing runs modules again there. Raises ValueError on leaving if a tapped module did not run,
        and where one runs twice.
        """
        seen: dict[Tap, Tensor] = {}

        def keep(tap: Tap, value: Any) -> None:
            if tap in seen:
                raise ValueError(
                    f"the module of the tap {str(tap)!r} ran twice in one forward, so it has no single value"
                )
            seen[tap] = _first_tensor(value, tap)

        with ExitStack() as hooks:
            for tap, module in self._modules.items():
                hooks.callback(_hook(module, tap, keep).remove)
            yield seen
        if missing := [str(tap) for tap in self._modules if tap not in seen]:
            raise ValueError(
                f"the module of the tap {missing[0]!r} did not run: the model computes its features without "
                "it; take a layer below vision_feature_layer, or another path"
            )


@torch.no_grad()
def stages_among(taps: Iterable[Tap]) -> dict[Tap, int]:
    """Those that are stages of the tower, and their numbers."""
    return {tap: number for tap in taps if (number := stage_number(tap.path)) is not None}


def tapped_widths(stock: LlavaForConditionalGeneration, taps: Sequence[str]) -> dict[str, int]:
    """How wide the states are that each tap shows, by a forward of two tokens and of one visual token.

    Of a stage of the tower only its shape is asked. A tap is left out that shows no [batch, token, width].
    Nothing random is used up. Ranks that share the model's layers must ask alike. Raises ValueError for a
    path that the model does not have.
    """
    if not taps:
        return {}
    parsed = [Tap.parse(text) for text in dict.fromkeys(taps)]
    stages = stages_among(parsed)
    widths = stage_widths(stock.model.vision_tower, stock.config, stages.values())
    of_stages = {str(tap): widths[number] for tap, number in stages.items()}
    if len(stages) == len(parsed):
        return of_stages
    model, embed = stock.model, stock.model.language_model.get_input_embeddings()
    weight = next(embed.parameters())
    device = weight.device  # layers may be elsewhere, and come when they are called
    is_mixed = len({p.dtype for p in stock.parameters() if p.is_floating_point()}) > 1
    inputs = _two_tokens(device)
    features_INE = torch.zeros(1, 1, vision_config(stock.config).hidden_size, device=device)
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.autocast(device.type, torch.bfloat16) if is_mixed else nullcontext(),
        Taps(stock, [tap for tap in parsed if tap not in stages]).watch() as seen,
    ):
        dtype = next(iter(model.multi_modal_projector.parameters()), weight).dtype
        model.multi_modal_projector(features_INE.to(dtype))
        packed_attention.read_rows(model.language_model, inputs, embed(inputs.input_ids_BT))
    return of_stages | {str(tap): value.shape[2] for tap, value in seen.items() if value.ndim == 3}


def _two_tokens(device: torch.device) -> Inputs:
    """A row of text alone."""
    ids_BT = torch.zeros(1, 2, dtype=torch.long)
    is_visual_BT, is_valid_I = torch.zeros(1, 2, dtype=torch.bool), torch.zeros(0, dtype=torch.bool)
    positions_BT, labels_BT = torch.arange(2).unsqueeze(0), torch.full_like(ids_BT, IGNORE_INDEX)
    places = Places.find(
        labels_BT=labels_BT,
        visual_BT=is_visual_BT,
        position_ids_BT=positions_BT,
        image_is_valid_I=is_valid_I,
    )
    return Inputs(
        input_ids_BT=ids_BT,
        labels_BT=labels_BT,
        position_ids_BT=positions_BT,
        segment_ids_BT=torch.ones_like(ids_BT),
        visual_BT=is_visual_BT,
        pixels_ICHW=torch.zeros(0, 3, 1, 1),
        image_is_valid_I=is_valid_I,
        known_places=places,
    ).to(device)


def _hook(module: nn.Module, tap: Tap, keep: Callable[[Tap, Any], None]) -> Any:
    """Attach `keep` to the side of the module that the tap names; the handle takes it off again."""
    if tap.side == "output":
        return module.register_forward_hook(lambda _module, _inputs, output: keep(tap, output))

    def before(_module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        keep(tap, (*positional, *named.values()))

    return module.register_forward_pre_hook(before, with_kwargs=True)


def _first_tensor(value: Any, tap: Tap) -> Tensor:
    if isinstance(value, Tensor):
        return value
    items = list(value.values()) if isinstance(value, Mapping) else value
    if isinstance(items, list | tuple):
        for item in items:
            if isinstance(item, Tensor):
                return item
    raise ValueError(
        f"the tap {str(tap)!r} reads a {type(value).__name__} without a tensor; take another path"
    )
