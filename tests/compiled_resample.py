"""The part in C, built from the source as it stands, and what it must compute; also a program: see `main`.

Needs no PyTorch, so that a sanitised build can be run alone.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import numpy as np

SOURCES = Path(__file__).parents[1] / "llava_kd" / "data" / "pixels"
SANITISED = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
HALF = 1 << 21
MOST_SUM = ((1 << 31) - 1 - HALF) // 255  # of the absolute weights of an output, so that no int32 overflows
Axis = tuple[np.ndarray, np.ndarray]  # first inputs [T], weights [T, K]


def has_compiler() -> bool:
    return shutil.which("cc") is not None and Path(sysconfig.get_path("include"), "Python.h").exists()


def build(folder: Path, *flags: str, planted: tuple[str, str] | None = None) -> Path:
    """The shared library in `folder`; `planted` is a piece of resample.h and what to put in its place."""
    for name in ("_resample.c", "resample.h"):
        text = (SOURCES / name).read_text()
        if planted is not None and name == "resample.h":
            assert text.count(planted[0]) == 1, planted
            text = text.replace(*planted)
        (folder / name).write_text(text)
    library = folder / "_resample.so"
    warnings = ("-Wall", "-Wextra", "-Werror") if planted is None else ("-w",)
    command = ["cc", "-shared", "-fPIC", "-DPy_LIMITED_API=0x030B0000", *(flags or ("-O3",)), *warnings]
    include = f"-I{sysconfig.get_path('include')}"
    done = subprocess.run(
        [*command, include, "_resample.c", "-o", str(library)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return library


def load(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_resample", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(module: ModuleType, kernel: str, pixels: np.ndarray, rows: Axis, columns: Axis) -> np.ndarray:
    out = np.full((len(rows[0]), len(columns[0]), 3), 77, np.uint8)
    module.resize(kernel, pixels, *pixels.shape[:2], *rows, *columns, out)
    return out


def oracle(pixels: np.ndarray, rows: Axis, columns: Axis) -> np.ndarray:
    """The definition in 64-bit integers: across, to bytes, down, to bytes."""

    def along_first(values: np.ndarray, axis: Axis) -> np.ndarray:
        dense = np.zeros((len(axis[0]), len(values)), np.int64)
        for row, first, weights in zip(dense, *axis, strict=True):
            row[first : first + len(weights)] = weights[: len(values) - first]
        sums = np.tensordot(dense, values.astype(np.int64), 1)
        return np.clip((sums + HALF) >> 22, 0, 255).astype(np.uint8)

    across = along_first(pixels.transpose(1, 0, 2), columns).transpose(1, 0, 2)
    return along_first(across, rows)


def random_axis(rng: np.random.Generator, length: int) -> Axis:
    """Any axis inside the bounds; some go to the bound of a sum, to the last unit, some make halves."""
    out, taps = int(rng.integers(1, 40)), 4 * int(rng.integers(1, 6))
    first = np.sort(rng.integers(0, length, out)).astype(np.int32)
    parts = rng.normal(size=(out, taps)) * (rng.random((out, taps)) < 0.8)
    parts[:, 0] += 1e-3
    beyond = first[:, None] + np.arange(taps) >= length
    parts[beyond] = 0
    kind = rng.integers(3)
    if kind == 0:
        quarters = rng.integers(-2, 3, (out, taps))
        quarters[beyond | (np.arange(taps) >= 4)] = 0
        return first, (quarters << 20).astype(np.int32)
    is_extreme = kind == 1
    most = MOST_SUM if is_extreme else int(MOST_SUM * rng.random())
    weights = np.trunc(parts * (most / np.abs(parts).sum(1, keepdims=True))).astype(np.int64)
    if is_extreme:
        weights[:, 0] += np.where(weights[:, 0] < 0, -1, 1) * (MOST_SUM - np.abs(weights).sum(1))
    return first, weights.astype(np.int32)


def random_case(rng: np.random.Generator) -> tuple[np.ndarray, Axis, Axis]:
    height, width = (int(rng.integers(1, most)) for most in rng.choice([3, 50, 300], 2))
    kind = rng.integers(3)
    pixels = rng.choice(np.array([0, 255] if kind else range(256), np.uint8), (height, width, 3))
    if kind == 2:
        pixels[:] = 255
    return pixels, random_axis(rng, height), random_axis(rng, width)


def differs(module: ModuleType, cases: int, seed: int = 0) -> str | None:
    """The first of some random cases that a kernel of `module` gets wrong."""
    rng = np.random.default_rng(seed)
    for number in range(cases):
        pixels, rows, columns = random_case(rng)
        expected = oracle(pixels, rows, columns)
        for kernel in module.kernels():
            if not np.array_equal(call(module, kernel, pixels, rows, columns), expected):
                return f"{kernel}, case {number}: {pixels.shape} to {expected.shape}"
        table = rng.random((3, 256), np.float32)
        out = np.zeros((1, 3, *pixels.shape[:2]), np.float32)
        module.look_up(pixels, pixels.shape[0] * pixels.shape[1], table, out)
        if not np.array_equal(out[0], np.stack([table[c][pixels[..., c]] for c in range(3)])):
            return f"look_up, case {number}"
    return None


def main() -> None:
    """LIBRARY CASES: exit 1 where a case differs."""
    sys.exit(differs(load(Path(sys.argv[1])), int(sys.argv[2])))


if __name__ == "__main__":
    main()
