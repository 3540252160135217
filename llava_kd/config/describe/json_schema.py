"""The settings as JSON Schema (draft 2020-12), which editors complete and check YAML with.

It refuses what the loader refuses of a single setting; what must fit together, the loader alone knows. A
number or a word is taken as the type that it has: `"1e-4"` and a text of digits, which the loader reads, too,
are not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, fields, is_dataclass
from typing import Literal, cast, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen

from llava_kd.config.describe.tree import doc_of, without_null, words_beside
from llava_kd.config.ranges import MOST, flat
from llava_kd.config.reading import plain

Node = dict[str, object]

_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}


def json_schema(section: type) -> Node:
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Settings of a stage",
        **_object(section),
    }


def _object(section: type) -> Node:
    hints = get_type_hints(section, include_extras=True)
    properties, required = {}, []
    for field in fields(section):
        node = _node(hints[field.name])
        if doc := doc_of(hints[field.name]):
            node["description"] = doc
        if field.default is not MISSING:
            node["default"] = plain(field.default)
        elif field.default_factory is MISSING:
            required.append(field.name)
        properties[field.name] = node
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _node(kind: object) -> Node:
    bare, metadata, takes_null = without_null(kind)
    nodes: list[Node] = [_bare(bare, metadata)]
    if words := words_beside(kind):
        nodes.append({"enum": list(words)})
    if takes_null:
        nodes.append({"type": "null"})
    return nodes[0] if len(nodes) == 1 else {"anyOf": nodes}


def _bare(kind: object, metadata: Iterable[object]) -> Node:
    origin, parts = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _object(cast(type, kind))
    if origin is Literal:
        return {"enum": list(parts)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _node(parts[1]), **_lengths(metadata, "Properties")}
    if origin is tuple and parts[-1] is not Ellipsis:
        return {
            "type": "array",
            "prefixItems": [_node(part) for part in parts],
            "items": False,
            "minItems": len(parts),
        }
    if origin in (list, tuple):
        is_of_text = without_null(parts[0])[0] is str
        doubles: Node = {"uniqueItems": True} if is_of_text else {}
        return {"type": "array", "items": _node(parts[0]), **doubles, **_lengths(metadata, "Items")}
    node: Node = {"type": _TYPES[cast(type, kind)]}
    if kind is str:
        node["pattern"] = r"\S"
    return node | (_ends(metadata) if kind in (int, float) else {})


def _ends(metadata: Iterable[object]) -> Node:
    node: Node = {}
    for one in flat(metadata):
        match one:
            case Gt(end):
                node["exclusiveMinimum"] = end
            case Ge(end):
                node["minimum"] = end
            case Lt(end):
                node["exclusiveMaximum"] = end
            case Le(end):
                node["maximum"] = end
    if not node.keys() & {"minimum", "exclusiveMinimum"}:
        node["minimum"] = -MOST
    if not node.keys() & {"maximum", "exclusiveMaximum"}:
        node["maximum"] = MOST
    return node


def _lengths(metadata: Iterable[object], what: str) -> Node:
    node: Node = {}
    for one in flat(metadata):
        match one:
            case MinLen(length):
                node[f"min{what}"] = length
            case MaxLen(length):
                node[f"max{what}"] = length
    return node
