"""Values as YAML gave them, held to the types and ranges of their settings; messages name the dotted key."""

from __future__ import annotations

import difflib
import math
import re
import types
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Literal, Union, get_args, get_origin, get_type_hints


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


# Which numbers a setting may take, by its own name or that of the mapping it is in.
_POSITIVE = {"lr", "lr_by_part", "eps", "max_grad_norm", "temperature", "max_length", "global_batch_size"}
_POSITIVE |= {"micro_batch_size", "epochs", "max_steps", "every", "keep", "timeout_minutes"}
_POSITIVE |= {"num_questions", "max_new_tokens", "batch_size", "vision_tower_last_layers", "rank", "alpha"}
_POSITIVE |= {"packs_per_step", "max_tokens", "max_images"}
_NOT_NEGATIVE = {"weight", "weight_decay", "seed", "num_workers", "progress_line", "image_cache_mb"}
_SHARES = {"dropout", "betas", "warmup_ratio", "max_bad_rate", "mix", "first", "last"}
_BELOW_ONE = {"dropout", "betas"}
# What the libraries behind them can hold; others are bounded by what fp32 can compute with.
_MOST = {"timeout_minutes": 525_600, "seed": 2**63 - 1, "num_workers": 1024}
_MOST_OF_OTHERS = 1e12
_SCALARS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def check_value(value: object, kind: type, where: str) -> None:
    """ValueError naming the dotted key `where` if `value`, as YAML gave it, is not of that `kind`."""
    if is_dataclass(kind):
        check_section(value, kind, where)
    elif get_origin(kind) in (Union, types.UnionType):
        options = get_args(kind)
        if value is not None or type(None) not in options:
            check_value(value, next(option for option in options if option is not type(None)), where)
    elif get_origin(kind) is Literal:
        choices = [str(choice) for choice in get_args(kind)]
        near = _nearest(str(value), choices)
        require(
            value in get_args(kind), f"`{where}` must be one of {', '.join(choices)}; got {value!r}{near}"
        )
    elif get_origin(kind) in (list, tuple):
        require(isinstance(value, list | tuple), f"`{where}` must be a list; got {value!r}")
        assert isinstance(value, list | tuple)
        length = len(get_args(kind)) if get_origin(kind) is tuple else len(value)
        require(len(value) == length, f"`{where}` must be a list of {length}; got {value!r}")
        for number, item in enumerate(value):
            check_value(item, get_args(kind)[0], f"{where}[{number}]")
            doubled = get_args(kind)[0] is str and item in value[:number]
            require(not doubled, f"`{where}` names {item!r} twice; name it once")
    elif get_origin(kind) is dict:
        require(isinstance(value, dict), f"`{where}` must be `name: value` lines; got {value!r}")
        assert isinstance(value, dict)
        for name, item in value.items():
            check_value(item, get_args(kind)[1], f"{where}.{name}")
    else:
        require(_is_scalar(value, kind), f"`{where}` must be {_SCALARS[kind]}; got {value!r}")
        if kind is str:
            require(bool(str(value).strip()), f"`{where}` is empty; give it a value, or null where it may be")
        if kind in (int, float):
            _check_range(float(str(value)), where)


def _check_range(number: float, where: str) -> None:
    names = set(re.split(r"[.\[]", where))
    require(math.isfinite(number), f"`{where}` must be finite; got {number}")
    if names & _POSITIVE:
        require(number > 0, f"`{where}` must be more than 0; got {number:g}")
    elif names & _NOT_NEGATIVE:
        require(number >= 0, f"`{where}` must not be negative; got {number:g}")
    elif names & _SHARES:
        require(0 <= number <= 1, f"`{where}` must be from 0 to 1; got {number:g}")
    if names & _BELOW_ONE:
        require(number < 1, f"`{where}` must be below 1; got {number:g}")
    most = min((_MOST[name] for name in names & _MOST.keys()), default=_MOST_OF_OTHERS)
    require(abs(number) <= most, f"`{where}` must be at most {most:g}; got {number:g}")


def check_section(value: object, section: type, where: str) -> None:
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
        check_value(item, kinds[key], f"{where}.{key}" if where else key)
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
