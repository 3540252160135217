"""Other people's programs, each in a pinned environment of its own, made on first use.

    python tests/tools/environments.py llama_cpp vllm

`LLAVA_KD_<TOOL>` names a Python that has the tool; without it one is made below `LLAVA_KD_TOOLS` (by default
`.tools` in the project) from `pins/<TOOL>.txt`, which names every package that is installed. Those of
`SHARED` see this project's packages behind their own, so that torch is not installed once more. A tool that
cannot be installed raises `NotRunError`: nothing is known of it then. A pin with `===` keeps out a build of
the same version with a suffix (`+cpu`), which pip may find elsewhere and torchvision does not load beside.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
PINS = Path(__file__).parent / "pins"
SHARED = frozenset(
    {"bitsandbytes", "lmms_eval", "openvino", "transformers_4", "transformers_floor", "transformers_serve"}
)
INSTALL_SECONDS = 1800


class NotRunError(Exception):
    """The tool is not here, so nothing was seen."""


def python_of(tool: str) -> str:
    """A Python that has the tool."""
    if named := os.environ.get(f"LLAVA_KD_{tool.upper()}"):
        return named
    pins = PINS / f"{tool}.txt"
    folder = Path(os.environ.get("LLAVA_KD_TOOLS", ROOT / ".tools"))
    root = folder / f"{tool}-{hashlib.sha256(pins.read_bytes()).hexdigest()[:8]}"
    python, done = root / "bin" / "python", root / "installed"
    if not done.is_file():
        venv.create(root, clear=True)
        words = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps"]
        _install([*words, "--disable-pip-version-check", "-r", str(pins)])
        if tool in SHARED:
            (site,) = root.glob("lib/python*/site-packages")
            (site / "zz_shared.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
        done.touch()
    return str(python)


def _install(words: list[str]) -> None:
    try:
        made = subprocess.run(words, capture_output=True, text=True, check=False, timeout=INSTALL_SECONDS)
    except subprocess.TimeoutExpired:
        raise NotRunError(f"{words[-1]} was not installed within {INSTALL_SECONDS} s") from None
    if made.returncode:
        raise NotRunError(f"{words[-1]} cannot be installed: {made.stderr.strip()[-300:]}")


def run(python: str, script: Path, *words: str, timeout: float = 540) -> None:
    """Of a tool's Python, which must not see the packages of this one. Raises RuntimeError with its log."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    made = subprocess.run(
        [python, str(script), *words],
        env={**environment, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    if made.returncode:
        raise RuntimeError(f"{script.name} ended with {made.returncode}: {made.stderr[-2000:]}")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(name, python_of(name), flush=True)
