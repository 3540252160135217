"""Other people's programs, each in a pinned environment of its own, made on first use.

`LLAVA_KD_<TOOL>` names a Python that has the tool; without it one is made below `LLAVA_KD_TOOLS` (by default
`.tools` in the project). A tool that cannot be installed raises `NotRunError`: nothing is known of it then.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
PINS = {"llama_cpp": ("xllamacpp==2026.10.11549",)}


class NotRunError(Exception):
    """The tool is not here, so nothing was seen."""


def python_of(tool: str) -> str:
    """A Python that has the tool."""
    if named := os.environ.get(f"LLAVA_KD_{tool.upper()}"):
        return named
    pins = PINS[tool]
    folder = Path(os.environ.get("LLAVA_KD_TOOLS", ROOT / ".tools"))
    root = folder / f"{tool}-{hashlib.sha256(' '.join(pins).encode()).hexdigest()[:8]}"
    python, done = root / "bin" / "python", root / "installed"
    if not done.is_file():
        venv.create(root, with_pip=True, clear=True)
        words = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *pins]
        made = subprocess.run(words, capture_output=True, text=True, check=False, timeout=540)
        if made.returncode:
            raise NotRunError(f"{' '.join(pins)} cannot be installed: {made.stderr.strip()[-300:]}")
        done.touch()
    return str(python)


def run(python: str, script: Path, *words: str) -> None:
    """Of a tool's Python, which must not see the packages of this one. Raises RuntimeError with its log."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    made = subprocess.run(
        [python, str(script), *words],
        env={**environment, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=540,
    )
    if made.returncode:
        raise RuntimeError(f"{script.name} ended with {made.returncode}: {made.stderr[-2000:]}")
