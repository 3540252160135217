"""A core or a GPU for each of the processes that run beside each other."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from llava_kd.assembly.runs.children import Children
from llava_kd.search.running.schedule import Job

CLI = (sys.executable, "-m", "llava_kd.cli")
# Keep freed memory: fetching it from the system anew costs a tenth of a step of small models.
_KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 31),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(64 << 20),
}


class Slots:
    """A core or a GPU for each job that runs."""

    def __init__(self, children: Children, environments: Sequence[Mapping[str, str]]) -> None:
        self.environments = environments
        self._children = children

    def start(self, job: Job, slot: int) -> subprocess.Popen:
        return self._children.start(job.command, job.log, self.environments[slot])

    def ended(self, process: subprocess.Popen) -> int | None:
        return self._children.ended(process)

    def stop(self, process: subprocess.Popen) -> None:
        """It saves and ends."""
        process.terminate()

    def is_stopping(self) -> bool:
        return bool(self._children.asked)


def environments(
    trees: Sequence[Mapping[str, object]], num_jobs: int | None, *, is_whole: bool = False
) -> list[dict[str, str]]:
    """Of each job that may run at once, for stages with these settings.

    `is_whole`: a job takes devices by its own means.
    """
    if is_whole:
        return [dict(os.environ)] * (num_jobs or 1)
    devices = [] if all(_is_for_cpu(tree) for tree in trees) else gpus()
    if devices:
        count = num_jobs or len(devices)
        return [{**os.environ, "CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]} for slot in range(count)]
    alone = {"OMP_NUM_THREADS": "1", **_KEEP_MEMORY, **os.environ}
    return [alone] * (num_jobs or len(os.sched_getaffinity(0)))


def _is_for_cpu(tree: Mapping[str, object]) -> bool:
    engine = tree.get("engine")
    return isinstance(engine, Mapping) and engine.get("device") == "cpu"


def gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them: those of this process, or all that nvidia-smi lists."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip() and name.strip() != "-1"]
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = listed.stdout.splitlines() if listed.returncode == 0 else []
    return [str(k) for k, line in enumerate(lines) if line.startswith("GPU ")]
