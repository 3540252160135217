"""A GGUF file, tensor by tensor and in rows, so that no more than one weight is in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava_kd.models.files.gguf.package import gguf_package
from llava_kd.tensor_files import writing

BLOCK = 32  # numbers that share a scale in Q8_0 and Q4_0
BLOCKED = ("Q8_0", "Q4_0")
KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
_CHUNK = 1 << 22  # numbers


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor of the file: `read` gives it in any floating type, and only then is it in memory.

    `whole` keeps it in float32 whatever the file's type is, as llama.cpp wants what it does not multiply.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    whole: bool = False

    def kind(self, wanted: str) -> str:
        """Its type in a file of type `wanted`: F16 where rows cannot be cut into blocks.

        Only layers of the language model get four bits; words and head keep eight, and so does the tower.
        """
        if self.whole or len(self.shape) == 1:
            return "F32"
        if wanted in BLOCKED and self.shape[-1] % BLOCK:
            return "F16"
        return "Q8_0" if wanted == "Q4_0" and not self.name.startswith("blk.") else wanted


def unblocked(entries: Sequence[Entry]) -> list[Entry]:
    """Those that Q8_0 and Q4_0 leave in F16."""
    return [entry for entry in entries if entry.kind("Q8_0") == "F16"]


def write_gguf(
    path: Path, arch: str, entries: Sequence[Entry], describe: Callable[[Any], None], *, kind: str
) -> None:
    """Write and read back. `describe` adds the metadata to gguf's writer; `kind` is one of `KINDS`' values.

    Raises ValueError for a number that the type cannot hold, OSError where the file cannot be written.
    """
    gguf = gguf_package()
    with writing(path):
        writer = gguf.GGUFWriter(path, arch)
        describe(writer)
        writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for entry in entries:
            own = gguf.GGMLQuantizationType[entry.kind(kind)]
            per_block, block_bytes = gguf.GGML_QUANT_SIZES[own]
            size = prod(entry.shape) // per_block * block_bytes
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), size, raw_dtype=own)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (stream,) = writer.fout
        for entry in entries:
            writer.write_padding(stream, stream.tell())
            for piece in _pieces(entry, entry.kind(kind)):
                stream.write(piece.tobytes())
        writer.write_padding(stream, stream.tell())
        stream.flush()
        os.fsync(stream.fileno())
        writer.close()
    _check(path, entries, kind)


def _pieces(entry: Entry, kind: str) -> Iterator[np.ndarray]:
    gguf = gguf_package()
    tensor = entry.read().detach()
    if tuple(tensor.shape) != entry.shape:
        raise AssertionError(f"{entry.name} is {tuple(tensor.shape)}, not {entry.shape}")
    rows = tensor.reshape(-1, entry.shape[-1])
    for piece in rows.split(max(1, _CHUNK // rows.shape[1])):
        if kind == "BF16":
            yield piece.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
            continue
        values = piece.float().numpy()
        if not np.isfinite(values).all():
            raise ValueError(f"{entry.name} holds a number that is not finite; the model is broken")
        if kind == "F16" and np.abs(values).max(initial=0) > np.finfo(np.float16).max:
            raise ValueError(
                f"{entry.name} holds {np.abs(values).max():.4g}, more than float16 can; take --dtype "
                "bfloat16 or float32"
            )
        yield gguf.quantize(values, gguf.GGMLQuantizationType[kind])


def _check(path: Path, entries: Sequence[Entry], kind: str) -> None:
    """The file as its reader sees it must hold these tensors; OSError otherwise: a disk has lost some."""
    found = read_back(path)
    wanted = {entry.name: (entry.kind(kind), entry.shape) for entry in entries}
    if found != wanted:
        raise OSError(f"{path} does not hold what was written into it; is the disk full?")


def read_back(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each tensor of a file; ValueError where it is cut."""
    gguf = gguf_package()
    try:
        tensors = gguf.GGUFReader(path).tensors
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{path} is no whole GGUF file ({error}); export it again") from error
    return {
        tensor.name: (tensor.tensor_type.name, tuple(int(size) for size in reversed(tensor.shape)))
        for tensor in tensors
    }
