"""Tensors of an ONNX file by name, read from its protobuf bytes: no package but numpy is needed for that.

Only what a state dictionary needs is read: initialisers in float32, and which of them each MatMul takes,
since an export names those `onnx::MatMul_1966`. Field numbers are those of onnx.proto: ModelProto.graph 7;
GraphProto.node 1, initializer 5; NodeProto.input 1, name 3, op_type 4; TensorProto.dims 1, data_type 2,
float_data 4, name 8, raw_data 9.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_FLOAT = 1


@dataclass(frozen=True, kw_only=True)
class Node:
    name: str
    kind: str
    inputs: tuple[str, ...]


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7


def fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field of a message: whole numbers, or bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        else:
            size = {1: 8, 5: 4}[kind]
        if at + size > len(data):
            raise ValueError("it ends in the middle of a message")
        yield key >> 3, data[at : at + size]
        at += size


def _text(value: int | memoryview) -> str:
    assert isinstance(value, memoryview)
    return bytes(value).decode()


def _tensor(data: memoryview) -> tuple[str, np.ndarray | None]:
    """Name and numbers; None for another type than float32."""
    dims: list[int] = []
    kind, name, raw = 0, "", b""
    for number, value in fields(data):
        if number == 1 and isinstance(value, int):
            dims.append(value)
        elif number == 1 and isinstance(value, memoryview):  # packed
            at = 0
            while at < len(value):
                size, at = _varint(value, at)
                dims.append(size)
        elif number == 2:
            assert isinstance(value, int)
            kind = value
        elif number == 8:
            name = _text(value)
        elif number in (4, 9) and isinstance(value, memoryview):
            raw += bytes(value)
    if kind != _FLOAT:
        return name, None
    return name, np.frombuffer(raw, dtype="<f4").reshape(dims).copy()


def _node(data: memoryview) -> Node:
    inputs, name, kind = [], "", ""
    for number, value in fields(data):
        if number == 1:
            inputs.append(_text(value))
        elif number == 3:
            name = _text(value)
        elif number == 4:
            kind = _text(value)
    return Node(name=name, kind=kind, inputs=tuple(inputs))


def read_onnx(path: Path) -> tuple[dict[str, np.ndarray], list[Node]]:
    """Float tensors by name, and the nodes. Raises ValueError for a file that is none, or cut."""
    tensors: dict[str, np.ndarray] = {}
    nodes: list[Node] = []
    try:
        for number, value in fields(memoryview(path.read_bytes())):
            if number != 7 or not isinstance(value, memoryview):
                continue
            for part, content in fields(value):
                if part == 5 and isinstance(content, memoryview):
                    name, numbers = _tensor(content)
                    if numbers is not None:
                        tensors[name] = numbers
                elif part == 1 and isinstance(content, memoryview):
                    nodes.append(_node(content))
    except (IndexError, KeyError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path} is no whole ONNX file: {error}") from error
    if not tensors:
        raise ValueError(f"{path} is no ONNX file with weights in it")
    return tensors, nodes


def named_weights(tensors: dict[str, np.ndarray], nodes: list[Node]) -> dict[str, np.ndarray]:
    """As PyTorch names them: the matrix of `/a/b/MatMul` is `a.b.weight`, which PyTorch holds transposed."""
    found = {name: value for name, value in tensors.items() if not name.startswith("onnx::")}
    for node in nodes:
        if node.kind == "MatMul" and len(node.inputs) == 2 and node.inputs[1] in tensors:
            owner = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            found[f"{owner}.weight"] = tensors[node.inputs[1]].T.copy()
    return found
