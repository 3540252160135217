"""The student's weights on their way to the server that writes in its place."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from llava_kd.assembly.asking.client import RefusedError, Server
from llava_kd.parallel.engine import Engine

# What a vLLM of its own development mode does with weights, and what it must forget with the old ones.
RELOAD = "/collective_rpc"
FORGET = ("/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache")


@dataclass
class Publisher:
    """Writes the student below `directory`, and has the server read it; `write` makes a stock directory."""

    server: Server
    directory: Path
    write: Callable[[dict[str, Tensor], Path], object]
    engine: Engine

    def __call__(self, step: int) -> None:
        """On all ranks together. ValueError or OSError on each of them where it fails on the first."""
        weights = self.engine.parameters()
        with self.engine.world.together():
            if self.engine.world.is_main:
                # Each into a directory of its own: a server may hold on to files that it has read.
                folder = self.directory / f"step-{step:08d}"
                self.write(weights, folder)
                self._hand_over(folder)
                for older in self.directory.glob("step-*"):
                    if older != folder:
                        shutil.rmtree(older)

    def _hand_over(self, folder: Path) -> None:
        path = str(folder.absolute())
        try:
            self.server.tell(RELOAD, {"method": "reload_weights", "kwargs": {"weights_path": path}})
            for forget in FORGET:
                self.server.tell(forget, {})
        except RefusedError as error:
            more = [
                (error.status == 404, "start the server in its development mode, with VLLM_SERVER_DEV_MODE=1")
            ]
            raise ValueError(
                f"{self.server.address} did not load the new weights from {path}: "
                f"{self.server.remedied(error, more)}"
            ) from None
