"""Distil a large LLaVA-style multimodal model into a small one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llava_kd import moved

if TYPE_CHECKING:
    from llava_kd.api import Chat, Run, evaluate, load, report, train

__version__ = "0.1.0"
__all__ = ["Chat", "Run", "__version__", "evaluate", "load", "report", "train"]

moved.install()


def __getattr__(name: str) -> object:
    """What `llava_kd.api` offers, when it is first asked for: importing the package reads no model code."""
    if name in __all__:
        from llava_kd import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
