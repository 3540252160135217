"""Settings as text: the tree with its help, the page of the documentation, a stage beside the defaults."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass

from llava_kd.config.describe.tree import Setting, in_yaml, walk
from llava_kd.config.ranges import MOST

_INTRODUCTION = f"""# Settings

`python benchmarks/make_docs.py` generates this page from the types of the settings. `llava-kd config` prints
the same list. `llava-kd config FILE.yaml` prints the settings of a stage, with a comment at each one that is
not the default. Set a key in a stage's YAML file, or after the file on the command line as
`--optim.lr=1e-4`. If the default is "none", you must give a value. `[]` stands for any item of a list, `NAME`
for any name. A number without another limit is at most
{MOST:g}.

`llava-kd config --json_schema > stage.schema.json` writes a JSON Schema: an editor completes and checks a
stage file that starts with `# yaml-language-server: $schema=stage.schema.json`.
"""


def text(settings: Iterable[Setting]) -> str:
    """Two lines a setting: key, what may be given, default; what it is for."""
    return "\n".join(f"{s.key}: {'; '.join(_facts(s))}\n    {s.doc}" for s in settings)


def markdown(section: type) -> str:
    """The page: a table for the settings that belong to no section, and for each section."""
    tables: dict[str, list[Setting]] = {"": []}
    docs: dict[str, Setting] = {}
    for setting in walk(section):
        above = setting.key.rpartition(".")[0]
        tables.setdefault(above, []).append(setting)
        if setting.section is not None:
            docs[setting.key] = setting
    parts = [_INTRODUCTION]
    for name, rows in tables.items():
        of = docs.get(name.removesuffix(".NAME").removesuffix("[]"))
        title = f"`{name}`" if name else "A stage"
        about = f"{of.doc}\n\n" if of is not None else ""
        parts.append(f"## {title}\n\n{about}{_table(rows)}")
    return "\n".join(parts)


def marked(config: object) -> str:
    """The settings of a stage as YAML that loads back; a comment where a value is not the default."""
    return "\n".join(_lines(config, ""))


def _facts(setting: Setting) -> Iterator[str]:
    yield setting.value
    if setting.default != "":
        yield "no default" if setting.default is None else f"default {setting.default}"


def _table(rows: Iterable[Setting]) -> str:
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for row in rows:
        default = f"`{row.default}`" if row.default else ("" if row.default == "" else "none")
        cells = (f"`{row.key.rpartition('.')[2]}`", row.value, default, row.doc)
        lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _lines(section: object, indent: str) -> Iterator[str]:
    assert is_dataclass(section)
    for field in fields(section):
        value = vars(section)[field.name]
        yield from _entry(field.name, value, indent, _mark(field, value))


def _entry(name: str, value: object, indent: str, mark: str) -> Iterator[str]:
    key = in_yaml(name)
    if is_dataclass(value):
        yield f"{indent}{key}:{mark}"
        yield from _lines(value, f"{indent}  ")
    elif isinstance(value, Mapping) and any(is_dataclass(item) for item in value.values()):
        yield f"{indent}{key}:{mark}"
        for below, item in value.items():
            yield from _entry(below, item, f"{indent}  ", "")
    else:
        yield f"{indent}{key}: {in_yaml(value)}{mark}"


def _mark(field: Field, value: object) -> str:
    default = field.default
    if field.default_factory is not MISSING:
        if is_dataclass(field.default_factory):
            return ""  # its own settings are marked
        default = field.default_factory()
    if default is MISSING:
        return "  # no default"
    return "" if value == default else f"  # default: {in_yaml(default)}"
