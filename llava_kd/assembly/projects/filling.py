"""Values put into the text of a stage file, whose comments and order stay."""

from __future__ import annotations

import re
from collections.abc import Mapping

import yaml

from llava_kd.config.trees import UniqueKeyLoader, set_dotted

_LINE = re.compile(r"^(?P<head>(?P<indent> *)(?P<key>\w+):)(?P<value> [^#\n]*?)?(?P<comment>\s+#.*)?$")


def fill(text: str, values: Mapping[str, object]) -> str:
    """`text` with `values` by dotted name. It is YAML of sections, a setting a line, or `{a: 1}` on it."""
    lines = text.splitlines()
    wanted = yaml.load(text, Loader=UniqueKeyLoader)
    for dotted, value in values.items():
        set_dotted(wanted, dotted, value)
        section, _, rest = dotted.partition(".")
        _fill_one(lines, section, rest, value, wanted)
    filled = "\n".join(lines) + "\n"
    if yaml.load(filled, Loader=UniqueKeyLoader) != wanted:
        raise RuntimeError(f"the stage file could not be filled in correctly; it became:\n{filled}")
    return filled


def _fill_one(lines: list[str], section: str, rest: str, value: object, wanted: dict) -> None:
    top = next((i for i, line in enumerate(lines) if re.match(rf"{section}:", line)), None)
    if top is None:
        lines.append(f"{section}: {_flow(wanted[section])}")
        return
    end = next((i for i in range(top + 1, len(lines)) if re.match(r"\w", lines[i])), len(lines))
    if not rest or not _is_block(lines[top]):
        kept = lines[top]
        del lines[top + 1 : _after_block(lines, top, end)]
        lines[top] = _with_value(kept, wanted[section])
        return
    name = rest.partition(".")[0]
    held = next((i for i in range(top + 1, end) if re.match(rf"  {name}:", lines[i])), None)
    if held is not None:
        lines[held] = _with_value(lines[held], wanted[section][name])
        return
    last = max(i for i in range(top, end) if i == top or lines[i].startswith("  "))
    lines.insert(last + 1, f"  {name}: {_flow(wanted[section][name])}")


def _is_block(line: str) -> bool:
    found = _LINE.match(line)
    return found is not None and not (found["value"] or "").strip()


def _after_block(lines: list[str], top: int, end: int) -> int:
    inside = [i for i in range(top + 1, end) if lines[i].startswith("  ")]
    return inside[-1] + 1 if inside else top + 1


def _with_value(line: str, value: object) -> str:
    found = _LINE.match(line)
    if found is None:
        raise RuntimeError(f"not a line of a stage file: {line!r}")
    return f"{found['head']} {_flow(value)}{found['comment'] or ''}"


def _flow(value: object) -> str:
    """One line of YAML that reads back as it was."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, sort_keys=False, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
