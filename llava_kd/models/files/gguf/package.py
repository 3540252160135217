"""The one door to the package `gguf`, which is an extra."""

from __future__ import annotations

from types import ModuleType


def gguf_package() -> ModuleType:
    """Raises ValueError where it is not installed."""
    try:
        import gguf  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            "GGUF files need the package gguf: pip install 'llava_kd[gguf]'; `--format hf` writes without it"
        ) from error
    return gguf
