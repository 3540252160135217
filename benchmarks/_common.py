"""What the benchmarks share: flags, who and where, interleaved timing, peak memory, table and JSON."""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

Value = str | float | int | bool | None
Row = dict[str, Value]

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "numpy",
    "pillow",
    "simplejpeg",
    "liger-kernel",
    "fla-core",
    "orda-kernel",
    "deepspeed",
)
L2_FLUSH_BYTES = 256 * 2**20


def parser(description: str) -> argparse.ArgumentParser:
    """The flags that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=here)
    parser.add_argument("--json", type=Path, help="write the rows and where they were measured to this file")
    parser.add_argument("--threads", type=int, help="CPU threads of PyTorch (default: its own choice)")
    return parser


def meta(*, device: str, **extra: Value) -> dict[str, Value | dict[str, str]]:
    """Date, commit, hardware and versions: what a reader needs to repeat the figures or to doubt them."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "device": device,
        "hardware": _hardware(device),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version(), **_versions()},
        **extra,
    }


def _commit() -> str:
    """Short hash of HEAD, with `+` where tracked files differ from it."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=here, check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def _hardware(device: str) -> str:
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    names = [
        line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")
    ]
    threads = torch.get_num_threads()
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {threads} threads"


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def interleaved_median(
    calls: Mapping[str, Callable[[], object]],
    *,
    device: str,
    repeats: int,
    warmup: int = 1,
    budget_s: float = float("inf"),
) -> dict[str, float]:
    """Median seconds of each call, run in turn so that a slow moment of the machine meets all of them.

    Stops early, after at least one round, once `budget_s` seconds have gone. On CUDA each call is timed by
    events after the L2 cache was overwritten.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for _ in range(warmup):
        for call in calls.values():
            call()
    for _ in range(repeats):
        for name, call in calls.items():
            seconds[name].append(seconds_of(call, device=device))
        if time.perf_counter() - start > budget_s:
            break
    return {name: statistics.median(values) for name, values in seconds.items()}


def seconds_of(call: Callable[[], object], *, device: str) -> float:
    """Seconds that one call takes."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device).zero_()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def peak_extra_bytes(call: Callable[[], object], *, device: str) -> int | None:
    """Bytes that a call holds at its peak beyond what was held before it; None where it cannot be read.

    On CUDA from PyTorch's allocator; on Linux CPUs from the peak resident set, which is reset first.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # else freed memory that is used again would not count
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    before = _resident_bytes("VmRSS")
    call()
    return max(0, _resident_bytes("VmHWM") - before)


def _resident_bytes(field: str) -> int:
    for line in _lines("/proc/self/status"):
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def write_json(path: Path, *, meta: Mapping[str, object], rows: Sequence[Row]) -> None:
    """`{"meta": ..., "rows": [...]}`, the form that benchmarks/make_docs.py reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"meta": meta, "rows": list(rows)}, indent=1) + "\n")


def print_table(rows: Sequence[Row], columns: Sequence[str]) -> None:
    """The rows as a Markdown table, numbers to four digits."""
    print(markdown_table(rows, columns), flush=True)


def markdown_table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """The rows as a Markdown table; a missing figure is `-`."""
    cells = [[_text(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    lines = [list(columns), ["-" * width for width in widths], *cells]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def _text(value: Value) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3e}" if value and not 1e-3 <= abs(value) < 1e5 else f"{value:.4g}"
    return str(value)
