"""TinyLLaVA_Factory, LLaVA-KD and LLaVA-1.5 checkpoints as stock LLaVA directories.

TinyLLaVA and LLaVA-KD keep `language_model/`, `vision_tower/` and `connector/` apart, the connector's weights
being `_connector.0` and `_connector.2` of a two-layer MLP. LLaVA-1.5 keeps one directory whose state has
`model.mm_projector.0` and `.2` beside a language model's own keys, and names its tower in the config.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from llava_kd.models.checkpoint import Parts, compose_loaded
from llava_kd.models.language_model import prepare_language_model
from llava_kd.models.reading import read_json, read_tokenizer, readable
from llava_kd.models.towers import load_tower

PART_FOLDERS = ("language_model", "vision_tower", "connector")
_STRATEGIES: Mapping[str, Literal["default", "full"]] = {
    **{"patch": "default", "cls_patch": "full", "default": "default", "full": "full"}
}


def convert(source: str | Path, *, vision_tower: str | None = None) -> Parts:
    """The model of `source` in stock form; `vision_tower` replaces the one that a LLaVA-1.5 config names.

    Raises ValueError for another layout, a half-downloaded directory, or parts that do not fit together.
    """
    source = Path(source)
    if not (source / "config.json").is_file():
        raise ValueError(f"{source} has no config.json: give a TinyLLaVA, LLaVA-KD or LLaVA-1.5 directory")
    tree = read_json(source / "config.json")
    folders = [name for name in PART_FOLDERS if (source / name).is_dir()]
    if folders:
        if missing := [name for name in PART_FOLDERS if name not in folders]:
            raise ValueError(f"{source} is half a download: it has {folders} but no {', '.join(missing)}")
        return _from_parts(source, tree)
    if tree.get("model_type") == "llava" and "vision_config" in tree:
        raise ValueError(f"{source} is a stock LLaVA directory already: there is nothing to convert")
    state = read_state(source)
    if not any(name.startswith("model.mm_projector.") for name in state):
        raise ValueError(
            f"{source} has neither {', '.join(PART_FOLDERS)} folders (TinyLLaVA, LLaVA-KD) nor "
            "model.mm_projector weights (LLaVA-1.5)"
        )
    tower = vision_tower or tree.get("mm_vision_tower")
    if tower is None:
        raise ValueError(f"{source}/config.json names no mm_vision_tower; give one with --vision_tower")
    if "model_type" not in tree:
        raise ValueError(f"{source}/config.json has no model_type, such as llava_llama: a half download?")
    projector = {n: t for n, t in state.items() if n.startswith("model.mm_projector.")}
    own = {n.rpartition("vision_tower.")[2]: t for n, t in state.items() if "vision_tower." in n}
    text = {n: t for n, t in state.items() if n not in projector and "vision_tower" not in n}
    config = {
        k: v
        for k, v in tree.items()
        if not k.startswith(("mm_", "tune_mm", "use_mm")) and k != "architectures"
    }
    config["model_type"] = str(tree["model_type"]).removeprefix("llava_").replace("llava", "llama")
    return _assembled(
        source,
        config=config,
        text_state=text,
        tokenizer_folder=source,
        tower=tower,
        projector=projector,
        own_tower=own,
        layer=tree.get("mm_vision_select_layer", -2),
        strategy=tree.get("mm_vision_select_feature", "patch"),
    )


def _from_parts(source: Path, tree: Mapping[str, object]) -> Parts:
    folder = source / "language_model"
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    config = config or tree.get("text_config")
    if not isinstance(config, dict):
        raise ValueError(f"{source} has no text_config and {folder} no config.json")
    layer, strategy = (
        tree.get("vision_feature_layer", -2),
        tree.get("vision_feature_select_strategy", "patch"),
    )
    if not isinstance(layer, int):
        raise ValueError(f"{source}: vision_feature_layer must be one layer; got {layer}")
    return _assembled(
        source,
        config=config,
        text_state=read_state(folder),
        tokenizer_folder=folder if (folder / "tokenizer_config.json").is_file() else source,
        tower=str(source / "vision_tower"),
        projector=read_state(source / "connector"),
        layer=layer,
        strategy=str(strategy),
    )


def _assembled(
    source: Path,
    *,
    config: dict,
    text_state: Mapping[str, Tensor],
    tokenizer_folder: Path,
    tower: str,
    projector: Mapping[str, Tensor],
    layer: int,
    strategy: str,
    own_tower: Mapping[str, Tensor] | None = None,
) -> Parts:
    """`own_tower`: weights of the tower that the checkpoint has itself, trained perhaps, by stock names."""
    if strategy not in _STRATEGIES:
        raise ValueError(
            f"{source}: the select strategy must be one of {list(_STRATEGIES)}; got {strategy!r}"
        )
    causal = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    _load(causal, text_state, f"{source}: the language model")
    causal.tie_weights()
    tokenizer = read_tokenizer(str(tokenizer_folder))
    prepare_language_model(causal, tokenizer, str(source))
    loaded = load_tower(tower, feature_layer=layer, dtype=torch.float32)
    if own_tower:
        _load_own_tower(loaded.model, own_tower, f"{source}: its own vision tower")
    parts = compose_loaded(
        loaded,
        causal,
        tokenizer,
        vision_feature_layer=layer,
        vision_feature_select_strategy=_STRATEGIES[strategy],
    )
    renamed = {}
    for name, tensor in projector.items():
        stem, _, kind = name.rpartition(".")
        number = {"0": "linear_1", "2": "linear_2"}.get(stem.rpartition(".")[2])
        if number is None:
            raise ValueError(f"{source}: the connector must be a two-layer GELU MLP; it has {name}")
        renamed[f"{number}.{kind}"] = tensor
    _load(parts.stock.model.multi_modal_projector, renamed, f"{source}: the connector")
    return parts


def _load_own_tower(tower: torch.nn.Module, own: Mapping[str, Tensor], what: str) -> None:
    """The checkpoint's weights into the tower that its config names; ValueError where they are another's."""
    expected = tower.state_dict()
    inner = "vision_model." if any(name.startswith("vision_model.") for name in expected) else ""
    kept = {n: t for n, t in own.items() if "position_ids" not in n}
    renamed = {f"{inner}{n.removeprefix('vision_model.')}": t for n, t in kept.items()}
    _load(tower, {**{n: t for n, t in expected.items() if n not in renamed}, **renamed}, what)


def _load(module: torch.nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """ValueError naming the first tensor that is missing, left over, or of another shape."""
    expected = module.state_dict()
    tied = {"lm_head.weight"} - set(state)
    if missing := sorted(set(expected) - set(state) - tied):
        raise ValueError(f"{what} lacks {len(missing)} weights, such as {missing[0]}: a half download?")
    if extra := sorted(n for n in set(state) - set(expected) if "rotary_emb" not in n):
        raise ValueError(f"{what} has {len(extra)} weights that its config does not know, such as {extra[0]}")
    for name, tensor in expected.items():
        if name in state and state[name].shape != tensor.shape:
            raise ValueError(
                f"{what} does not fit: {name} is {tuple(state[name].shape)} where its config needs "
                f"{tuple(tensor.shape)}"
            )
    module.load_state_dict({n: state.get(n, t) for n, t in expected.items()})


def read_state(folder: Path) -> dict[str, Tensor]:
    """Weights of a folder in fp32: safetensors, or pickles read with weights only, by their index if any.

    Raises ValueError naming a file that the index lists and the folder lacks.
    """
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            names = sorted(set(read_json(folder / index).get("weight_map", {}).values()))
            break
    else:
        found = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
        names = sorted(path.name for path in found)[:1]
    if not names:
        raise ValueError(f"{folder} has no weights (model.safetensors or pytorch_model.bin)")
    state: dict[str, Tensor] = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{folder} is half a download: its index lists {name}, which is not there")
        with readable("the weights", str(path)):
            if path.suffix == ".safetensors":
                part = load_file(path)
            else:
                part = torch.load(path, map_location="cpu", weights_only=True)
        state |= {n: t.float() if t.is_floating_point() else t for n, t in part.items()}
    return state
