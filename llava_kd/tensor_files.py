"""Model files written as any other file: the umask says who may read them, and a full disk is an OSError."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llava_kd.durable import named


def write_tensors(
    tensors: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str] | None = None
) -> None:
    """A safetensors file. Raises OSError where it cannot be written."""
    with writing(path):
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
            path,
            metadata=None if metadata is None else dict(metadata),
        )
        share(path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What safetensors and tokenizers raise where a file cannot be written, as the OSError that it is.

    Ranks that wait for the one that writes stop for an OSError, and for nothing that they do not know.
    """
    try:
        with named(path):
            yield
    except Exception as error:
        # tokenizers has no exception of its own: it raises the bare class.
        if not isinstance(error, SafetensorError) and type(error) is not Exception:
            raise
        raise OSError(f"{path} cannot be written: {error}") from error


def share(*paths: Path) -> None:
    """Give files the mode that the umask gives a new one; safetensors keeps its own for the owner alone."""
    for path in paths:
        probe = path.with_name(f".{path.name}.mode.partial")  # a name that is swept away after a kill
        probe.touch()
        mode = probe.stat().st_mode
        probe.unlink()
        path.chmod(mode)
