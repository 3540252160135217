"""The configuration tree and `load`: YAML plus dotted overrides. The only file that imports draccus."""

from __future__ import annotations

import difflib
import io
import math
import re
import types
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Literal, Union, get_args, get_origin, get_type_hints

import draccus
import yaml
from draccus.utils import DraccusException

PARTS = ("vision_tower", "multi_modal_projector", "language_model")

Dtype = Literal["bfloat16", "float16", "float32"]
Divergence = Literal["forward", "reverse", "jsd", "skewed_forward", "skewed_reverse"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """Either `checkpoint`, a LLaVA directory to go on from, or the parts of a new model."""

    checkpoint: str | None = None
    vision_tower: str | None = None
    language_model: str | None = None
    vision_feature_layer: int = -2
    vision_feature_select_strategy: Literal["default", "full"] = "full"

    def __post_init__(self) -> None:
        parts = (self.vision_tower, self.language_model)
        _require(
            (self.checkpoint is not None) != any(parts) and (self.checkpoint is not None or all(parts)),
            "`student` needs either `checkpoint`, or both `vision_tower` and `language_model`; got "
            f"checkpoint={self.checkpoint}, vision_tower={parts[0]}, language_model={parts[1]}",
        )


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """A stock LLaVA directory. `placement`: whole on every rank, or its decoder layers spread over them."""

    checkpoint: str
    dtype: Dtype = "bfloat16"
    placement: Literal["replicated", "fsdp"] = "replicated"


@dataclass(frozen=True, kw_only=True)
class PackingConfig:
    """Rows hold several records, up to both budgets; `micro_batch_size` then counts rows.

    `packs_per_step`: rows of an optimiser step; null takes as many as hold about `global_batch_size` records.
    """

    max_tokens: int
    max_images: int = 64
    packs_per_step: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_images"):
            _require(
                getattr(self, name) > 0, f"`data.packing.{name}` must be positive; got {getattr(self, name)}"
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Records, and how they become sequences.

    `path` is a LLaVA JSON or JSON Lines file with its image root `images` (default: its folder), or a
    pattern of tar shards (`*.tar`) or of tables with embedded images (`*.parquet`, `*.arrow`).
    `visual_alignment`: what to do where the two models have different visual tokens; `resample` interpolates
    the teacher's final hidden states to the student's grid.
    """

    path: str
    images: str | None = None
    template: str = "vicuna"
    max_length: int = 2048
    image_aspect: Literal["square", "pad"] = "square"
    visual_alignment: Literal["refuse", "resample"] = "refuse"
    num_workers: int = 4
    image_cache_mb: int = 0
    packing: PackingConfig | None = None
    max_bad_rate: float = 0.001


@dataclass(frozen=True, kw_only=True)
class CrossEntropyConfig:
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """`mix` is the beta of `jsd` and the alpha of the skewed forms; the others ignore it."""

    weight: float = 1.0
    temperature: float = 1.0
    divergence: Divergence = "forward"
    mix: float = 0.5


@dataclass(frozen=True, kw_only=True)
class RelationConfig:
    """`tap`: where the visual tokens are compared; LM-head logits, hidden states, or projector output."""

    weight: float = 0.5
    tap: Literal["logits", "hidden", "projector"] = "logits"
    centre: bool = False
    normalise: bool = False


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """A term that is absent is off. `losses`: `fast`, or `reference` for the plain formulas."""

    cross_entropy: CrossEntropyConfig | None = None
    response_kl: KLConfig | None = None
    visual_kl: KLConfig | None = None
    relation: RelationConfig | None = None
    losses: Literal["fast", "reference"] = "fast"

    def __post_init__(self) -> None:
        terms = (self.cross_entropy, self.response_kl, self.visual_kl, self.relation)
        _require(any(t is not None for t in terms), "`objective` has no term; give it at least one")

    @property
    def needs_teacher(self) -> bool:
        return any(t is not None for t in (self.response_kl, self.visual_kl, self.relation))


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with a cosine schedule. `lr_by_part` overrides `lr` for the named parts."""

    lr: float
    lr_by_part: dict[str, float] = field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_ratio: float = 0.03
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        unknown = set(self.lr_by_part) - set(PARTS)
        _require(not unknown, f"`optim.lr_by_part` names no part {sorted(unknown)}; parts are {list(PARTS)}")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """`auto` is `single` on one process and `ddp` on several. `zero_stage` is `deepspeed`'s alone; null is 3.

    A rank that waits `timeout_minutes` for the others gives up.
    """

    kind: Literal["auto", "single", "ddp", "fsdp2", "deepspeed"] = "auto"
    zero_stage: Literal[1, 2, 3] | None = None
    precision: Literal["bf16", "fp32"] = "bf16"
    activation_checkpointing: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_minutes: float = 60.0

    def __post_init__(self) -> None:
        _require(
            self.zero_stage is None or self.kind == "deepspeed",
            f"`engine.zero_stage` is {self.zero_stage} but `engine.kind` is {self.kind}: two engines; set "
            "engine.kind to deepspeed, or zero_stage to null",
        )


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """`metrics.jsonl` is always written; the trackers are extra. `progress_line`: where its bar stands."""

    every: int = 10
    wandb_project: str | None = None
    tensorboard: bool = False
    progress: bool = True
    progress_line: int = 0


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Every `every` steps and at the end; the newest `keep` are kept."""

    every: int = 500
    keep: int = 2


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One stage."""

    output_dir: str
    student: StudentConfig
    data: DataConfig
    objective: ObjectiveConfig
    optim: OptimConfig
    trainable: list[str]
    global_batch_size: int
    micro_batch_size: int
    epochs: float = 1.0
    max_steps: int | None = None
    seed: int = 0
    teacher: TeacherConfig | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        unknown = set(self.trainable) - set(PARTS)
        _require(not unknown, f"`trainable` names no part {sorted(unknown)}; parts are {list(PARTS)}")
        _require(bool(self.trainable), f"`trainable` is empty; name at least one of {list(PARTS)}")
        if self.objective.needs_teacher and self.teacher is None:
            raise ValueError(
                "`objective` has distillation terms but `teacher` is null; set teacher.checkpoint, or remove "
                "response_kl, visual_kl and relation"
            )
        if self.teacher is not None and not self.objective.needs_teacher:
            raise ValueError(
                "`teacher` is set but no term of `objective` uses it; add response_kl, visual_kl or "
                "relation, or set teacher to null"
            )
        _require(
            self.global_batch_size % self.micro_batch_size == 0,
            f"`global_batch_size` ({self.global_batch_size}) must be a multiple of `micro_batch_size` "
            f"({self.micro_batch_size})",
        )


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML loader that refuses a key given twice: plain YAML lets the second win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        doubled = sorted({str(key) for key in keys if keys.count(key) > 1})
        if doubled:
            raise ValueError(f"line {node.start_mark.line + 1}: the key {doubled} is given twice")
        return super().construct_mapping(node, deep)


def _apply(tree: dict, override: str) -> None:
    """Set the dotted key of `--a.b=value` in `tree`; the value is read as YAML."""
    if not override.startswith("--") or "=" not in override:
        raise ValueError(f"an override looks like --optim.lr=1e-4; got {override!r}")
    dotted, text = override[2:].split("=", 1)
    *parents, last = dotted.split(".")
    for name in parents:
        if not isinstance(tree.get(name), dict):
            tree[name] = {}
        tree = tree[name]
    tree[last] = yaml.safe_load(text)


def _messages(error: BaseException) -> str:
    """The chain of causes as one line, where then why, without the library's own wrapping words."""
    parts: list[str] = []
    current: BaseException | None = error
    while current is not None:
        text = re.sub(
            r"(Couldn't instantiate class \w+ using the given arguments\.:? ?)+", "", str(current)
        ).strip()
        if text and not any(text in part for part in parts):
            parts.append(text)
        current = current.__cause__
    return " ".join(": ".join(parts).split())


# Which numbers a setting may take, by its own name or that of the mapping it is in.
_POSITIVE = {"lr", "lr_by_part", "eps", "max_grad_norm", "temperature", "max_length", "global_batch_size"}
_POSITIVE |= {"micro_batch_size", "epochs", "max_steps", "every", "keep", "timeout_minutes"}
_NOT_NEGATIVE = {"weight", "weight_decay", "seed", "num_workers", "progress_line"}
_SHARES = {"betas", "warmup_ratio", "max_bad_rate", "mix"}
_SCALARS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _check(value: object, kind: type, where: str) -> None:
    """ValueError naming the dotted key `where` if `value`, as YAML gave it, is not of that `kind`."""
    if is_dataclass(kind):
        _check_section(value, kind, where)
    elif get_origin(kind) in (Union, types.UnionType):
        options = get_args(kind)
        if value is not None or type(None) not in options:
            _check(value, next(option for option in options if option is not type(None)), where)
    elif get_origin(kind) is Literal:
        choices = [str(choice) for choice in get_args(kind)]
        near = _nearest(str(value), choices)
        _require(
            value in get_args(kind), f"`{where}` must be one of {', '.join(choices)}; got {value!r}{near}"
        )
    elif get_origin(kind) in (list, tuple):
        _require(isinstance(value, list | tuple), f"`{where}` must be a list; got {value!r}")
        assert isinstance(value, list | tuple)
        length = len(get_args(kind)) if get_origin(kind) is tuple else len(value)
        _require(len(value) == length, f"`{where}` must be a list of {length}; got {value!r}")
        for number, item in enumerate(value):
            _check(item, get_args(kind)[0], f"{where}[{number}]")
    elif get_origin(kind) is dict:
        _require(isinstance(value, dict), f"`{where}` must be `name: value` lines; got {value!r}")
        assert isinstance(value, dict)
        for name, item in value.items():
            _check(item, get_args(kind)[1], f"{where}.{name}")
    else:
        _require(_is_scalar(value, kind), f"`{where}` must be {_SCALARS[kind]}; got {value!r}")
        if kind in (int, float):
            _check_range(float(str(value)), where)


def _check_range(number: float, where: str) -> None:
    names = set(re.split(r"[.\[]", where))
    _require(math.isfinite(number), f"`{where}` must be finite; got {number}")
    if names & _POSITIVE:
        _require(number > 0, f"`{where}` must be more than 0; got {number:g}")
    elif names & _NOT_NEGATIVE:
        _require(number >= 0, f"`{where}` must not be negative; got {number:g}")
    elif names & _SHARES:
        _require(0 <= number <= 1, f"`{where}` must be from 0 to 1; got {number:g}")


def _check_section(value: object, section: type, where: str) -> None:
    if not isinstance(value, dict):
        name = f"`{where}`" if where else "the file"
        raise ValueError(f"{name} must hold `key: value` lines; got {value!r}")
    kinds = get_type_hints(section)
    known = [f.name for f in fields(section)]
    for key, item in value.items():
        if key not in known:
            of = f" in `{where}`" if where else ""
            near = _nearest(str(key), known)
            raise ValueError(f"no setting `{key}`{of}{near}; the settings are {', '.join(known)}")
        _check(item, kinds[key], f"{where}.{key}" if where else key)
    required = [f.name for f in fields(section) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in required if name not in value]:
        raise ValueError(f"`{where}.{missing[0]}` is missing" if where else f"`{missing[0]}` is missing")


def _nearest(word: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, choices, n=1)
    return f" (did you mean `{near[0]}`?)" if near else ""


def _is_scalar(value: object, kind: type) -> bool:
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        try:
            float(value)
        except ValueError:
            return False
        return True
    accepted = {float: (int, float), str: (str, int, float)}.get(kind, (kind,))
    return isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))


def load(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read `path`, apply overrides such as `--optim.lr=1e-4` or `--teacher=null`, and check the whole.

    Raises ValueError for a missing file, an unknown or doubled key, a value of the wrong type, or settings
    that do not fit together; the message names the file and the key.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no config file {path}; the recipes are scripts/*.yaml")
    try:
        tree = yaml.load(path.read_text(), Loader=_UniqueKeyLoader)
        if not isinstance(tree, dict):
            raise ValueError("the file must hold `key: value` lines")
        for override in overrides:
            _apply(tree, override)
        _check(tree, TrainConfig, "")
        return draccus.decode(TrainConfig, tree)
    except (DraccusException, ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {_messages(error)}") from error


def dump(config: TrainConfig) -> str:
    """YAML text that `load` reads back into an equal tree."""
    stream = io.StringIO()
    draccus.dump(config, stream)
    return stream.getvalue()
