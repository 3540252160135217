"""A checkpoint of another layout as stock LLaVA, and what its files say of the prompt it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from llava_kd.models.files.checkpoint import Parts
from llava_kd.models.files.convert.assembly import Pieces, assemble
from llava_kd.models.files.convert.layouts import PART_FOLDERS, Layout, read_layout
from llava_kd.models.files.convert.lora import CONFIG, merged
from llava_kd.models.files.convert.weights import below, read_state
from llava_kd.models.reading import read_json

# What LLaVA's code puts around a picture, and adds to a tokenizer in this order when it loads.
IMAGE_MARKS = ("<im_start>", "<im_end>")
_IMAGE_PATCH = "<im_patch>"
_TOWER, _PROJECTOR = "model.vision_tower.vision_tower.", "model.mm_projector."
_LLAVA_KEYS = ("mm_", "tune_", "use_mm", "freeze_", "unfreeze_", "image_", "tokenizer_", "vision_", "s2")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What decides the prompt: whose code trained it, the conversation that its config names, if any, the
    names of its model, and what it had around a picture."""

    is_tiny: bool
    conversation: str | None
    names: tuple[str, ...]
    image_marks: tuple[str, str] | None = None
    has_frozen_language_model: bool = False


def convert(source: str | Path, *, vision_tower: str | None = None) -> tuple[Parts, Origin]:
    """The model of `source` in stock form, and where its prompt comes from.

    `vision_tower` replaces the tower that a config names; a tower whose weights the checkpoint has itself
    keeps them, and takes its image processor from there. Raises ValueError for another layout, a half
    download, or parts that do not fit together.
    """
    source = Path(source)
    layout, tree = read_layout(source)
    if layout == "llava":
        pieces = _llava(source, tree, vision_tower)
    else:
        pieces = _tiny(source, tree, layout, vision_tower)
    return assemble(pieces), _origin(source, tree, layout)


def _tiny(source: Path, tree: Mapping, layout: Layout, vision_tower: str | None) -> Pieces:
    """TinyLLaVA_Factory's: three folders, or one state with the same three names before its weights."""
    vision = tree.get("vision_config") or {}
    named = [tree.get("vision_model_name_or_path"), vision.get("model_name_or_path")]
    if any("mof" in str(name).lower().partition(":")[0] for name in named if name):
        raise ValueError(f"{source} has two vision towers (mof), where stock LLaVA has one; take another")
    if layout == "parts":
        states, configs = _part_folders(source)
    else:
        whole = read_state(source)
        states = {
            "language_model": below(whole, "language_model."),
            "vision_tower": below(whole, "vision_tower._vision_tower."),
            "connector": below(whole, "connector._connector."),
        }
        configs = {}
        if absent := [name for name in PART_FOLDERS if not states[name]]:
            raise ValueError(f"{source} is an incomplete download: it has no weights of {', '.join(absent)}")
        if lost := sorted(set(whole) - {n for n in whole if n.partition(".")[0] in PART_FOLDERS}):
            raise ValueError(f"{source} has weights of no known part, such as {lost[0]}")
    text = configs.get("language_model") or tree.get("text_config")
    if not isinstance(text, dict):
        raise ValueError(f"{source} has no text_config and {source / 'language_model'} no config.json")
    own = [str(f) for f in (source / "vision_tower", source) if (f / "preprocessor_config.json").is_file()]
    names = [str(name).rpartition(":")[2] for name in reversed(named) if name]
    if not (places := [*([vision_tower] if vision_tower else []), *own, *names]):
        raise ValueError(f"{source}/config.json names no vision tower; give one with --vision_tower")
    tokenizer = str(tree.get("tokenizer_name_or_path") or tree.get("llm_model_name_or_path") or source)
    return Pieces(
        source=source,
        text_config=text,
        text_state=states["language_model"],
        tokenizers=(str(source / "language_model"), str(source), tokenizer),
        tower=places[0],
        tower_config=configs.get("vision_tower") or vision or None,
        tower_state=states["vision_tower"],
        projector=below(states["connector"], "_connector.") or states["connector"],
        projector_kind=tree.get("connector_type"),
        layer=tree.get("vision_feature_layer", -2),
        strategy=str(tree.get("vision_feature_select_strategy", "patch")),
        aspect=tree.get("image_aspect_ratio"),
        version=tree.get("transformers_version"),
    )


def _part_folders(source: Path) -> tuple[dict[str, dict], dict[str, dict]]:
    """Weights and configs of the three folders."""
    if missing := [name for name in PART_FOLDERS if not (source / name).is_dir()]:
        there = sorted(set(PART_FOLDERS) - set(missing))
        raise ValueError(f"{source} is an incomplete download: it has {there} but no {', '.join(missing)}")
    states = {name: read_state(source / name) for name in PART_FOLDERS}
    if (source / CONFIG).is_file():
        states = merged(source, states)
    paths = {name: source / name / "config.json" for name in PART_FOLDERS}
    return states, {name: read_json(path) for name, path in paths.items() if path.is_file()}


def _llava(source: Path, tree: Mapping, vision_tower: str | None) -> Pieces:
    """LLaVA's: one state; the tower by name, or with weights of its own where it was trained."""
    state = read_state(source)
    projector = below(state, _PROJECTOR)
    tower = vision_tower or tree.get("mm_vision_tower")
    if not projector:
        raise ValueError(
            f"{source} has neither {', '.join(PART_FOLDERS)} folders (TinyLLaVA, LLaVA-KD) nor "
            "model.mm_projector weights (LLaVA-1.5)"
        )
    if "model.image_newline" in state:
        raise ValueError(
            f"{source} is a LLaVA-NeXT (1.6) checkpoint: it has an image_newline, which stock LLaVA does not "
            "support; take a LLaVA-1.5 one"
        )
    if tower is None:
        raise ValueError(f"{source}/config.json names no mm_vision_tower; give one with --vision_tower")
    if "model_type" not in tree:
        raise ValueError(
            f"{source}/config.json has no model_type, such as llava_llama: an incomplete download?"
        )
    marks = (_IMAGE_PATCH, *IMAGE_MARKS) if tree.get("mm_use_im_patch_token", True) else IMAGE_MARKS
    config = {k: v for k, v in tree.items() if not k.startswith(_LLAVA_KEYS) and k != "architectures"}
    return Pieces(
        source=source,
        text_config={**config, "model_type": _text_type(str(tree["model_type"]))},
        text_state={n: t for n, t in state.items() if "mm_projector" not in n and "vision_tower" not in n},
        tokenizers=(str(source),),
        tower=str(tower),
        tower_config=None,
        tower_state=_own_tower(source, tree, state),
        projector=projector,
        projector_kind=tree.get("mm_projector_type"),
        layer=tree.get("mm_vision_select_layer", -2),
        strategy=str(tree.get("mm_vision_select_feature", "patch")),
        aspect=tree.get("image_aspect_ratio"),
        added_tokens=marks if tree.get("mm_use_im_start_end") else (),
        version=tree.get("transformers_version"),
    )


def _own_tower(source: Path, tree: Mapping, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Empty where the tower that the config names was frozen. ValueError where a trained one is lost."""
    parts = {"vision_tower": _TOWER, "mm_projector": _PROJECTOR}
    for part, prefix in parts.items():
        if lost := sorted(name for name in state if part in name and not name.startswith(prefix)):
            raise ValueError(
                f"{source} has the weight {lost[0]}, and LLaVA's code names those of that part {prefix}*; "
                "rename them, or they would be left out"
            )
    own = below(state, _TOWER)
    tuned = tree.get("unfreeze_mm_vision_tower") or "vision_tower" in str(tree.get("mm_tunable_parts"))
    if tuned and not own:
        raise ValueError(
            f"{source} was trained together with its vision tower (config.json says so), and has no weights "
            f"of it ({_TOWER}*): an incomplete checkpoint? Its projector would not fit another tower"
        )
    return own


def _text_type(kind: str) -> str:
    """`llama` of llava_llama, tiny_llava_llama or plain llava, `qwen2` of llava_qwen."""
    text = kind.removeprefix("tiny_").removeprefix("llava").removeprefix("_")
    return {"": "llama", "qwen": "qwen2"}.get(text, text)


def _origin(source: Path, tree: Mapping, layout: Layout) -> Origin:
    conversation = tree.get("conv_version") or tree.get("conv_mode")
    names = (tree.get("llm_model_name_or_path"), tree.get("_name_or_path"), source.name)
    return Origin(
        is_tiny=layout != "llava" or str(tree.get("model_type")).startswith("tiny"),
        conversation=None if conversation is None else str(conversation),
        names=tuple(str(name) for name in names if name),
        image_marks=IMAGE_MARKS if layout == "llava" and tree.get("mm_use_im_start_end") else None,
        has_frozen_language_model=tree.get("tune_type_llm") == "frozen",
    )
