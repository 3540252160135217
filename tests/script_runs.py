"""`scripts/train.sh` as a shell starts it, and whatever of it is still there."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts" / "train.sh"
PATIENCE = 180  # seconds: two ranks on a machine with ten other processes take a minute to import and save


class Run:
    """One start of the script, in a group of its own, its output in a pipe as before `| tee`."""

    def __init__(
        self,
        config: Path,
        output: Path,
        *,
        num_ranks: int,
        num_workers: int,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.mark = uuid.uuid4().hex
        words = [str(config), f"--output_dir={output}", f"--data.num_workers={num_workers}"]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.process = subprocess.Popen(
            ["bash", str(SCRIPT), *words],
            env={
                **os.environ,
                "PATH": path,
                "NPROC": str(num_ranks),
                "CHAOS_MARK": self.mark,
                **(environment or {}),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def end(self) -> str:
        """What it said, up to the last process that holds the pipe; nobody of it is there then."""
        said, _ = self.process.communicate(timeout=PATIENCE)
        assert not self.left(), said
        return said

    def left(self) -> list[str]:
        """Processes that have inherited its mark, wherever they have moved to."""
        found = []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            try:
                if self.mark.encode() in environ.read_bytes():
                    found.append((environ.parent / "cmdline").read_text().replace("\0", " "))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # ended since it was listed, or another user's
        return found
