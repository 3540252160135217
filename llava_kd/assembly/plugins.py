"""What can be named in settings and on the command line: the package's own tables, with those of plug-ins.

A plug-in is a Python file, or a module, that a user names. It holds any of the literal tables below under
their own names, with the values that the package's own tables hold. Nothing is registered by importing it:
each call gives longer copies of the tables, which are handed down.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from transformers import AutoConfig, AutoModel, PreTrainedModel

from llava_kd.data.sources.kinds import SOURCES, SourceKind
from llava_kd.data.sources.plugged import plugged
from llava_kd.data.text.template import Template
from llava_kd.data.text.template_choice import AUTO
from llava_kd.data.text.template_table import TEMPLATES
from llava_kd.distill.terms import TERMS
from llava_kd.distill.terms.term import Term
from llava_kd.evaluation.benchmarks.base import Benchmark
from llava_kd.evaluation.benchmarks.catalogue import BENCHMARKS
from llava_kd.models.towers.families import FAMILIES, Family
from llava_kd.plugin_file import PluginFile, described, find


@dataclass(frozen=True, kw_only=True)
class Tables:
    """Every table by which a name becomes a part, and the plug-ins that lengthened them."""

    terms: Mapping[str, type[Term]] = dataclasses.field(default_factory=lambda: TERMS)
    towers: Mapping[str, Family] = dataclasses.field(default_factory=lambda: FAMILIES)
    sources: Mapping[str, SourceKind] = dataclasses.field(default_factory=lambda: SOURCES)
    templates: Mapping[str, Template] = dataclasses.field(default_factory=lambda: TEMPLATES)
    benchmarks: Mapping[str, Benchmark] = dataclasses.field(default_factory=lambda: BENCHMARKS)
    plugins: tuple[PluginFile, ...] = ()

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the plug-ins, by what they are."""
        return {f"plug-in {plugin.name}": plugin.sha256 for plugin in self.plugins}


OURS = Tables()


def with_plugins(names: Sequence[str]) -> Tables:
    """The tables with those of the named plug-ins, in their order.

    Raises ValueError, naming the plug-in, for one that is not there, cannot be imported, holds no table, or
    one with a name that exists or a value that the table cannot hold.
    """
    tables = OURS
    for plugin in map(find, names):
        tables = _longer(tables, plugin, plugin.module())
    return tables


def _longer(tables: Tables, plugin: PluginFile, module: ModuleType) -> Tables:
    held = {name: vars(module)[name] for name in _KINDS if name in vars(module)}
    for name in vars(module):
        near = difflib.get_close_matches(name, _KINDS, n=1, cutoff=0.8)
        if name.isupper() and name not in _KINDS and near:
            raise ValueError(f"plug-in {plugin.name} defines {name}; rename it to {near[0]}")
    if not held:
        raise ValueError(
            f"plug-in {plugin.name} must define a table, but has none; add one of {', '.join(_KINDS)}"
        )
    changes: dict[str, object] = {"plugins": (*tables.plugins, plugin)}
    for name, rows in held.items():
        kind = _KINDS[name]
        where = f"plug-in {plugin.name}: {name}"
        known: Mapping[str, object] = vars(tables)[kind.table]
        if not isinstance(rows, dict) or not rows:
            raise ValueError(f"{where} must be a dict of names and values; got {rows!r:.80}")
        for key, value in rows.items():
            if key in known:
                raise ValueError(f"{where} must not reuse the existing name {key!r}; choose another name")
            if fault := kind.fault(key, value):
                raise ValueError(f"{where}[{key!r}] {fault}")
        changes[kind.table] = {**known, **{k: kind.entry(v, plugin) for k, v in rows.items()}}
    return dataclasses.replace(tables, **changes)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """`fault` says in words why an entry cannot stand in the table; `entry` is what is put there."""

    table: str
    fault: Callable[[Any, Any], str]
    entry: Callable[[Any, PluginFile], object] = lambda value, plugin: value


def _of_term(name: object, value: object) -> str:
    if not isinstance(name, str) or not name.isidentifier():
        return "must have a name of letters, digits and underscores, because YAML files and logs use it"
    if not isinstance(value, type) or not issubclass(value, Term):
        return f"must be a class of llava_kd.distill.terms.term.Term; got {value!r:.80}"
    if not dataclasses.is_dataclass(value) or "__dataclass_params__" not in vars(value):
        return "must be a dataclass of its settings: @dataclass(frozen=True, kw_only=True)"
    if not value.label:
        return "must have a `label` for the report"
    if value.total is Term.total and value.head_request is Term.head_request:
        return "must provide a `total`, or a request to the head"
    return ""


def _of_tower(name: object, value: object) -> str:
    if not isinstance(value, Family):
        return f"must be a llava_kd.models.towers.families.Family; got {value!r:.80}"
    kind = value.model_class
    if not issubclass(kind, PreTrainedModel) or kind.config_class is None:
        return "must have a model_class of transformers' PreTrainedModel, with its config_class"
    if kind.config_class.model_type != name:
        return f"must have the model_type of its configuration as its key: {kind.config_class.model_type!r}"
    return ""


def _of_source(name: object, value: object) -> str:
    if not isinstance(name, str) or not name.startswith(".") or "." in name[1:] or len(name) < 2:
        return "must have a suffix such as '.csv' as its key"
    return _not_a(SourceKind, value)


def _of_template(name: object, value: object) -> str:
    if fault := _not_a(Template, value):
        return fault
    return _misnamed(name, value.name) or ("must not be named auto" if name == AUTO else "")  # type: ignore[attr-defined]


def _of_benchmark(name: object, value: object) -> str:
    if fault := _not_a(Benchmark, value):
        return fault
    if name == "all" or not isinstance(name, str) or "," in name:
        return "must have a name without a comma, and not `all`"
    return _misnamed(name, value.name)  # type: ignore[attr-defined]


def _not_a(kind: type, value: object) -> str:
    return (
        "" if isinstance(value, kind) else f"must be a {kind.__module__}.{kind.__name__}; got {value!r:.80}"
    )


def _misnamed(name: object, own: str) -> str:
    return "" if own == name else f"must have its own name as its key: {own!r}"


def _tower(family: Family, plugin: PluginFile) -> Family:
    """Known to transformers too, whose `from_pretrained` finds a tower by its type in its own table."""
    kind = family.model_class
    try:
        AutoConfig.register(kind.config_class.model_type, kind.config_class, exist_ok=True)
        AutoModel.register(kind.config_class, kind, exist_ok=True)
    except ValueError as error:
        raise ValueError(f"plug-in {plugin.name}: TOWERS: {described(error)}") from error
    return dataclasses.replace(family, is_stock=False)


_KINDS: Mapping[str, _Kind] = {
    "TERMS": _Kind(table="terms", fault=_of_term),
    "TOWERS": _Kind(table="towers", fault=_of_tower, entry=_tower),
    "SOURCES": _Kind(table="sources", fault=_of_source, entry=plugged),
    "TEMPLATES": _Kind(table="templates", fault=_of_template),
    "BENCHMARKS": _Kind(table="benchmarks", fault=_of_benchmark),
}
