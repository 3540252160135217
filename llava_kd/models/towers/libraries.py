"""Towers of timm and open_clip: as the stock transformers class where their tokens agree, else adapted.

Shape legend: I images, C channels, H height, W width, N tokens, E width.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from transformers import PreTrainedModel

from llava_kd.models.tower_source import Option, TowerSource, nearest
from llava_kd.models.towers.adapted import (
    AdaptedTower,
    AdaptedTowerConfig,
    attribute,
    hidden_states,
    num_prefix_tokens,
)
from llava_kd.models.towers.plain_vit import (
    PlainViT,
    activation_of,
    put_together,
    take_open_clip_apart,
    take_timm_apart,
)

TOLERANCE = 1e-5  # of the largest value, in fp32
_AFTER_TRUNK = ("norm.", "fc_norm.", "head", "attn_pool.")  # poolers and heads: no token passes them
_RESAMPLE: Mapping[str, int] = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4}


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """What a tower wants to see: a square of `size`, with each channel normalised."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int = 3


@dataclass(frozen=True, kw_only=True)
class Trunk:
    """A library's own module and how to build it again."""

    module: nn.Module
    library: str
    architecture: str
    arguments: Mapping[str, object]
    pixels: Pixels
    plain: PlainViT | None


def library_tower(source: TowerSource, *, feature_layer: int) -> tuple[PreTrainedModel, Pixels]:
    """The tower in fp32, and its pixels. Stock where the library's weights fit a stock class exactly."""
    load = _timm_trunk if source.library == "timm" else _open_clip_trunk
    trunk = load(source)
    stock = None if trunk.plain is None else put_together(trunk.plain)
    if stock is not None and _agrees(stock, trunk, feature_layer):
        return stock, trunk.pixels
    return adapted(trunk, feature_layer), trunk.pixels


@torch.no_grad()
def _agrees(stock: PreTrainedModel, trunk: Trunk, feature_layer: int) -> bool:
    """Whether a stock model gives the trunk's own tokens on a picture of noise."""
    size = trunk.pixels.size
    pixels_ICHW = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    theirs = hidden_states(trunk.module, trunk.library, pixels_ICHW)[feature_layer]
    ours = stock(pixels_ICHW, output_hidden_states=True).hidden_states[feature_layer]
    return ours.shape == theirs.shape and bool(
        (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max().clamp_min(1)
    )


def adapted(trunk: Trunk, feature_layer: int) -> AdaptedTower:
    size = trunk.pixels.size
    with torch.no_grad():
        states = hidden_states(trunk.module, trunk.library, torch.zeros(1, 3, size, size))
    if not -len(states) <= feature_layer < 0:
        raise ValueError(
            f"vision_feature_layer of {trunk.library}:{trunk.architecture} must be from -{len(states)} to "
            f"-1; got {feature_layer}"
        )
    state_INE = states[feature_layer]
    prefix = num_prefix_tokens(trunk.module)
    grid = round((state_INE.shape[1] - prefix) ** 0.5)
    if grid * grid != state_INE.shape[1] - prefix or grid < 2 or size // (size // grid) != grid:
        raise ValueError(
            f"{trunk.library}:{trunk.architecture} gives {state_INE.shape[1]} tokens for {size} x {size} "
            "pixels, which is no square grid of patches: it has no patch tokens that a LLaVA could read"
        )
    config = AdaptedTowerConfig(
        library=trunk.library,
        architecture=trunk.architecture,
        arguments=json.dumps(dict(trunk.arguments)),
        image_size=size,
        patch_size=size // grid,
        hidden_size=state_INE.shape[2],
        num_prefix_tokens=prefix,
        feature_layer=feature_layer,
    )
    tower = AdaptedTower(config)
    fit = tower.trunk.load_state_dict(trunk.module.state_dict(), strict=False)
    if missing := [name for name in fit.missing_keys if not name.startswith(_AFTER_TRUNK)]:
        raise ValueError(f"{trunk.library}:{trunk.architecture} lacks the weights {missing[:3]} ...")
    return tower.eval()


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"towers of {name} need it installed: pip install 'llava_kd[towers]'") from error


def _timm_trunk(source: TowerSource) -> Trunk:
    timm = _library("timm")
    options = source.constructor_options()
    path = Path(source.name)
    name = source.name
    if path.is_dir():
        tree = json.loads((path / "config.json").read_text())
        name, options = tree["architecture"], {**tree.get("model_args", {}), **options}
    elif "/" not in name and name.split(".")[0] not in timm.list_models():
        raise ValueError(f"timm has no model {name!r}{nearest(name, timm.list_models())}")
    if path.is_dir():
        created = f"local-dir:{path}"
    else:
        created = name if "/" not in name else f"hf-hub:{name}"
    create = functools.partial(timm.create_model, created, pretrained=source.is_pretrained, num_classes=0)
    try:
        module, options = _created(create, options, source.image_size)
    except (TypeError, AssertionError, RuntimeError, OSError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"timm cannot make vision tower {source.name!r} with {options}: {text}") from error
    if "/" in name:
        name = attribute(module, "pretrained_cfg", dict)["architecture"]
    size = options.get("img_size", source.image_size)  # a directory's own arguments may have one
    return timm_trunk(
        module.eval(),
        architecture=name.split(".")[0],
        arguments=options,
        size=size if isinstance(size, int) else None,
    )


def _created(
    create: Callable[..., nn.Module], options: dict[str, Option], image_size: int | None
) -> tuple[nn.Module, dict[str, Option]]:
    """The module and the options that made it: a ConvNet reads every size and takes no `img_size`."""
    if image_size is None:
        return create(**options), options
    sized = {**options, "img_size": image_size}
    try:
        return create(**sized), sized
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return create(**options), options


def timm_trunk(
    module: nn.Module, *, architecture: str, arguments: Mapping[str, object], size: int | None
) -> Trunk:
    """A timm module that was made with `arguments`; `size` of its pictures, None for its own."""
    from timm.models.vision_transformer import VisionTransformer

    cfg = attribute(module, "pretrained_cfg", dict)
    asked = size or cfg["input_size"][-1]
    plain = None
    if isinstance(module, VisionTransformer) and attribute(module, "patch_embed.img_size", tuple)[0] == asked:
        block = module.blocks[0]
        activation = activation_of(block.get_submodule("mlp"))
        if activation is not None:
            plain = take_timm_apart(
                module.state_dict(),
                image_size=asked,
                num_heads=attribute(block, "attn.num_heads", int),
                eps=attribute(block, "norm1.eps", float),
                activation=activation,
            )
    pixels = Pixels(
        size=asked, mean=cfg["mean"], std=cfg["std"], resample=_RESAMPLE.get(cfg["interpolation"], 3)
    )
    return Trunk(
        module=module,
        library="timm",
        architecture=architecture,
        arguments=arguments,
        pixels=pixels,
        plain=plain,
    )


def _open_clip_trunk(source: TowerSource) -> Trunk:
    open_clip = _library("open_clip")
    path = Path(source.name)
    cfg = _open_clip_config(open_clip, source)
    pretrained = source.options.get("pretrained")
    if isinstance(pretrained, str) and not path.is_dir() and not Path(pretrained).exists():
        tags = open_clip.list_pretrained_tags_by_model(source.name)
        if pretrained not in tags:
            raise ValueError(
                f"open_clip:{source.name} has no weights {pretrained!r}{nearest(pretrained, tags)}; its tags "
                f"are {', '.join(tags) or 'none'}; a path of a file works too"
            )
    model = open_clip.create_model(
        f"local-dir:{path}" if path.is_dir() else source.name,
        pretrained=pretrained if isinstance(pretrained, str) else None,
        load_weights=source.is_pretrained,
    ).eval()
    vision = dataclasses.asdict(open_clip.model.CLIPVisionCfg(**cfg["vision_cfg"]))
    size, seen = vision["image_size"], model.visual.preprocess_cfg
    if source.image_size not in (None, size):
        raise ValueError(f"open_clip:{source.name} takes {size} x {size} pixels; got {source.image_size}")
    resample = _RESAMPLE.get(seen.get("interpolation", "bicubic"), 3)
    pixels = Pixels(size=size, mean=tuple(seen["mean"]), std=tuple(seen["std"]), resample=resample)
    if vision["timm_model_name"]:
        module = model.visual.trunk
        trunk = timm_trunk(module, architecture=vision["timm_model_name"], arguments={}, size=size)
        return dataclasses.replace(trunk, pixels=pixels)
    return Trunk(
        module=model.visual,
        library="open_clip",
        architecture=path.name,
        arguments={
            "embed_dim": cfg["embed_dim"],
            "vision_cfg": cfg["vision_cfg"],
            "quick_gelu": cfg.get("quick_gelu", False),
        },
        pixels=pixels,
        plain=_open_clip_plain(model.visual, vision),
    )


def _open_clip_config(open_clip: ModuleType, source: TowerSource) -> dict:
    """`model_cfg` of a local directory or of a built-in architecture."""
    path = Path(source.name)
    if path.is_dir():
        return json.loads((path / "open_clip_config.json").read_text())["model_cfg"]
    cfg = open_clip.get_model_config(source.name)
    if cfg is None:
        near = nearest(source.name, open_clip.list_models())
        raise ValueError(f"open_clip has no model {source.name!r}{near}")
    if source.is_pretrained and source.options.get("pretrained") is None:
        raise ValueError(
            f"open_clip:{source.name} names an architecture; add ?pretrained=TAG or ?pretrained=FILE, or "
            "?pretrained=false for random weights"
        )
    return cfg


def _open_clip_plain(visual: nn.Module, vision: Mapping[str, int]) -> PlainViT | None:
    from open_clip.transformer import VisionTransformer

    if not isinstance(visual, VisionTransformer):
        return None
    block = visual.transformer.resblocks[0]
    activation = activation_of(block.get_submodule("mlp"))
    if activation is None:
        return None
    return take_open_clip_apart(
        visual.state_dict(),
        image_size=vision["image_size"],
        num_heads=attribute(block, "attn.num_heads", int),
        eps=attribute(block, "ln_1.eps", float),
        activation=activation,
    )
