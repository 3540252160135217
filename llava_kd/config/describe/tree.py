"""The settings of a section one by one: dotted key, type, range, default and line of help."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Literal, Union, cast, get_args, get_origin, get_type_hints

import yaml
from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from typing_extensions import Doc

from llava_kd.config.checks import SCALARS, nearest, words_of
from llava_kd.config.ranges import flat, split
from llava_kd.config.reading import plain


@dataclass(frozen=True, kw_only=True)
class Setting:
    """`default` is None where there is none, and empty for a section that is there without being named.

    `value` is what may be given, in words. `section` holds the settings below this one.
    """

    key: str
    value: str
    default: str | None
    doc: str
    section: type | None


def walk(section: type, prefix: str = "") -> Iterator[Setting]:
    """Every setting, each section followed by what it holds.

    A key goes on after `[]` into the sections of a list, and after `.NAME` into those under names.
    """
    hints = get_type_hints(section, include_extras=True)
    for field in fields(section):
        kind = hints[field.name]
        held, below = _section_in(kind)
        setting = Setting(
            key=f"{prefix}{field.name}",
            value=in_words(kind),
            default=_default(field),
            doc=doc_of(kind),
            section=held,
        )
        yield setting
        if held is not None:
            yield from walk(held, f"{setting.key}{below}.")


def branch(section: type, key: str) -> list[Setting]:
    """The setting `key`, and those below it. ValueError, with the nearest names, where there is none."""
    every = list(walk(section))
    found = [s for s in every if s.key == key or s.key.startswith((f"{key}.", f"{key}["))]
    if not found:
        raise ValueError(f"no setting `{key}`{nearest(key, [s.key for s in every])}")
    return found


def in_yaml(value: object) -> str:
    """On one line."""
    text = yaml.safe_dump(plain(value), default_flow_style=True, width=10**9, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def doc_of(kind: object) -> str:
    """The line of help that a type carries."""
    return next((one.documentation for one in split(kind)[1] if isinstance(one, Doc)), "")


def without_null(kind: object) -> tuple[object, tuple[object, ...], bool]:
    """A type without None, all that it and its parts are annotated with, and whether None was there."""
    bare, metadata = split(kind)
    if get_origin(bare) in (Union, types.UnionType):
        options = get_args(bare)
        held, own = split(next(option for option in options if option is not type(None)))
        return held, (*own, *metadata), type(None) in options
    return bare, metadata, False


def words_beside(kind: object) -> tuple[str, ...]:
    """The words that a type takes beside its values."""
    bare, _ = split(kind)
    return words_of(bare) if get_origin(bare) in (Union, types.UnionType) else ()


def in_words(kind: object) -> str:
    """A type, its range, and whether it may be null."""
    bare, metadata, takes_null = without_null(kind)
    words = ", ".join([_bare_in_words(bare), *_range_in_words(metadata)])
    others = [*words_beside(kind), *(["null"] if takes_null else [])]
    comma = "," if "," in words else ""
    return f"{words}{comma} or {' or '.join(others)}" if others else words


def _bare_in_words(kind: object) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return "a section"
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is dict:
        return f"{in_words(arguments[1])} under each name"
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)}, each {in_words(arguments[0])}"
    if origin in (list, tuple):
        return f"a list, each {in_words(arguments[0])}"
    return SCALARS[cast(type, kind)]


def _range_in_words(metadata: Iterable[object]) -> Iterator[str]:
    words = {Gt: "more than", Ge: "at least", Lt: "less than", Le: "at most"}
    for one in flat(metadata):
        match one:
            case Gt(end) | Ge(end) | Lt(end) | Le(end):
                yield f"{words[type(one)]} {end}"
            case MinLen(length):
                yield f"at least {length} of them"
            case MaxLen(length):
                yield f"at most {length} of them"


def _section_in(kind: object) -> tuple[type | None, str]:
    """The section that a type holds, and what a key has between its own name and theirs."""
    bare, _, _ = without_null(kind)
    below = {list: "[]", dict: ".NAME"}.get(cast(type, get_origin(bare)), "")
    part = without_null(get_args(bare)[-1])[0] if below else bare
    return (cast(type, part), below) if is_dataclass(part) else (None, "")


def _default(field: Field) -> str | None:
    if field.default is not MISSING:
        return in_yaml(field.default)
    if field.default_factory is not MISSING:
        return "" if is_dataclass(field.default_factory) else in_yaml(field.default_factory())
    return None
