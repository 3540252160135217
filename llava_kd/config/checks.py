"""Values as YAML gave them, held to the types and ranges of their settings; messages name the dotted key."""

from __future__ import annotations

import difflib
import types
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Literal, Union, cast, get_args, get_origin, get_type_hints

from llava_kd.config.ranges import check_length, check_number, require, split

SCALARS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def check_value(value: object, kind: object, where: str, metadata: tuple[object, ...] = ()) -> None:
    """ValueError naming the dotted key `where` if `value`, as YAML gave it, is not of that `kind`.

    `metadata`: ranges from around `kind`, such as those of `Annotated[int | None, Gt(0)]`.
    """
    kind, own = split(kind)
    metadata = (*own, *metadata)
    if isinstance(kind, type) and is_dataclass(kind):
        check_section(value, kind, where)
    elif get_origin(kind) in (Union, types.UnionType):
        options = get_args(kind)
        if type(None) in options and _means_off(value, kind):
            raise ValueError(f"`{where}` is switched off by null; write --{where}=null in place of {value!r}")
        if value is not None or type(None) not in options:
            _check_held(value, kind, where, metadata)
    elif get_origin(kind) is Literal:
        choices = [str(choice) for choice in get_args(kind)]
        near = nearest(str(value), choices)
        is_choice = any(value == choice and type(value) is type(choice) for choice in get_args(kind))
        require(is_choice, f"`{where}` must be one of {', '.join(choices)}; got {value!r}{near}")
    elif get_origin(kind) in (list, tuple):
        _check_list(value, kind, where)
        check_length(cast(list, value), metadata, where)
    elif get_origin(kind) is dict:
        require(isinstance(value, dict), f"`{where}` must be a section of `name: value` lines; got {value!r}")
        assert isinstance(value, dict)
        for name, item in value.items():
            check_value(item, get_args(kind)[1], f"{where}.{name}")
        check_length(value, metadata, where)
    else:
        _check_scalar(value, cast(type, kind), where, metadata)


def _means_off(value: object, union: object) -> bool:
    """As people write it: YAML reads `off` and `no` as false, and `none` as text."""
    kind = split(next(option for option in get_args(union) if option is not type(None)))[0]
    is_none = isinstance(value, str) and value.lower() == "none" and value not in words_of(union)
    return (value is False and kind is not bool) or (is_none and kind is not str)


def words_of(union: object) -> tuple[str, ...]:
    """What a union takes beside values of its first type, such as the `std` of `float | Literal["std"]`."""
    first, *others = [option for option in get_args(union) if option is not type(None)]
    del first
    return tuple(str(word) for option in others for word in get_args(option))


def _check_held(value: object, union: object, where: str, metadata: tuple[object, ...]) -> None:
    """Of a union, as its first type, or as one of the words beside it."""
    held = next(option for option in get_args(union) if option is not type(None))
    words = words_of(union)
    if words and isinstance(value, str):
        if value in words:
            return
        kind = cast(type, split(held)[0])
        near = nearest(value, words)
        named = " or ".join((SCALARS[kind], *words))
        require(_is_scalar(value, kind), f"`{where}` must be {named}; got {value!r}{near}")
    check_value(value, held, where, metadata)


def _check_list(value: object, kind: object, where: str) -> None:
    require(isinstance(value, list | tuple), f"`{where}` must be a list; got {value!r}")
    assert isinstance(value, list | tuple)
    kinds = get_args(kind)
    is_fixed = get_origin(kind) is tuple and kinds[-1] is not Ellipsis
    require(
        not is_fixed or len(value) == len(kinds), f"`{where}` must be a list of {len(kinds)}; got {value!r}"
    )
    for number, item in enumerate(value):
        item_kind = kinds[number] if is_fixed else kinds[0]
        check_value(item, item_kind, f"{where}[{number}]")
        doubled = split(item_kind)[0] is str and item in value[:number]
        require(not doubled, f"`{where}` must name {item!r} once; it does so twice")


def _check_scalar(value: object, kind: type, where: str, metadata: tuple[object, ...]) -> None:
    require(_is_scalar(value, kind), f"`{where}` must be {SCALARS[kind]}; got {value!r}")
    if kind is str:
        require(bool(str(value).strip()), f"`{where}` is empty; give it a value, or null where it may be")
    if kind in (int, float):
        check_number(value if isinstance(value, int) else float(str(value)), metadata, where)


def check_section(value: object, section: type, where: str) -> None:
    if not isinstance(value, dict):
        name = f"`{where}`" if where else "the file"
        raise ValueError(f"{name} must hold `key: value` lines; got {value!r}")
    kinds = get_type_hints(section, include_extras=True)
    known = [f.name for f in fields(section)]
    for key, item in value.items():
        if key not in known:
            of = f" in `{where}`" if where else ""
            near = nearest(str(key), known)
            raise ValueError(f"no setting `{key}`{of}{near}; the settings are {', '.join(known)}")
        check_value(item, kinds[key], f"{where}.{key}" if where else key)
    required = [f.name for f in fields(section) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in required if name not in value]:
        raise ValueError(f"`{where}.{missing[0]}` is missing" if where else f"`{missing[0]}` is missing")


def nearest(word: str, choices: Sequence[str]) -> str:
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
