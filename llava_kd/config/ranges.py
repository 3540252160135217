"""Ranges as types carry them (`Annotated`, by annotated_types), and what a value outside is told."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Protocol, cast, get_args, get_origin

from annotated_types import Ge, GroupedMetadata, Gt, Interval, Le, Lt, MaxLen, MinLen

PositiveInt = Annotated[int, Gt(0)]
PositiveFloat = Annotated[float, Gt(0)]
NotNegativeInt = Annotated[int, Ge(0)]
NotNegativeFloat = Annotated[float, Ge(0)]
Share = Annotated[float, Interval(ge=0, le=1)]

# Where a type names no end of its own: what fp32 can compute with.
MOST = 10**12


class _Sized(Protocol):
    def __len__(self) -> int: ...


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def split(kind: object) -> tuple[object, tuple[object, ...]]:
    """A type without what it is annotated with, and that."""
    if get_origin(kind) is Annotated:
        bare, *metadata = get_args(kind)
        return bare, tuple(metadata)
    return kind, ()


def flat(metadata: Iterable[object]) -> Iterator[object]:
    """Groups such as `Interval` as their parts."""
    for one in metadata:
        if isinstance(one, GroupedMetadata):
            yield from flat(one)
        else:
            yield one


def check_number(value: float, metadata: Sequence[object], where: str) -> None:
    """ValueError naming the dotted key `where` unless `value` is within all of `metadata`."""
    rounded = float(str(value))  # of a whole number too large for a float: infinite
    require(math.isfinite(rounded), f"`{where}` must be finite; got {rounded}")
    for limit in metadata:
        if isinstance(limit, Interval):
            _check_interval(value, limit, where)
        else:
            _check_ends(value, flat([limit]), where)
    ends = list(flat(metadata))
    has_least, has_most = (any(isinstance(e, kinds) for e in ends) for kinds in ((Gt, Ge), (Lt, Le)))
    is_small = (has_most or value <= MOST) and (has_least or value >= -MOST)
    require(is_small, f"`{where}` must be at most {MOST:g}; got {value:g}")


def check_length(value: _Sized, metadata: Iterable[object], where: str) -> None:
    for limit in flat(metadata):
        if isinstance(limit, MinLen):
            least = limit.min_length
            what = "is empty; name at least one" if least == 1 else f"must hold at least {least}"
            require(len(value) >= least, f"`{where}` {what}; got {value!r}")
        elif isinstance(limit, MaxLen):
            most = limit.max_length
            require(len(value) <= most, f"`{where}` must hold at most {most}; got {value!r}")


def _check_interval(value: float, interval: Interval, where: str) -> None:
    low = cast(float | None, interval.ge if interval.gt is None else interval.gt)
    high = cast(float | None, interval.le if interval.lt is None else interval.lt)
    if low is not None and high is not None:
        if interval.gt is not None and interval.lt is not None:
            message = f"`{where}` must be between {low:g} and {high:g}; got {value:g}"
            require(low < value < high, message)
        else:
            require(low <= value <= high, f"`{where}` must be from {low:g} to {high:g}; got {value:g}")
    _check_ends(value, interval, where)


def _check_ends(value: float, ends: Iterable[object], where: str) -> None:
    for limit in ends:
        if isinstance(limit, Gt):
            least = cast(float, limit.gt)
            require(value > least, f"`{where}` must be more than {least:g}; got {value:g}")
        elif isinstance(limit, Ge):
            least = cast(float, limit.ge)
            what = "must not be negative" if least == 0 else f"must be at least {least:g}"
            require(value >= least, f"`{where}` {what}; got {value:g}")
        elif isinstance(limit, Lt):
            most = cast(float, limit.lt)
            require(value < most, f"`{where}` must be below {most:g}; got {value:g}")
        elif isinstance(limit, Le):
            most = cast(float, limit.le)
            require(value <= most, f"`{where}` must be at most {most:g}; got {value:g}")
