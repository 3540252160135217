"""The blocks of docs/extending.md as files: plug-ins, and changes to a copy of the package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "extending.md").read_text()
PLUGINS = {
    match[1]: match[0]
    for match in re.finditer(r"(?<=^```python\n)# (my_\w+\.py)\n.*?(?=^```)", TEXT, re.S | re.M)
}


def write_plugins(directory: Path) -> dict[str, str]:
    """Every plug-in of the page, as a file; their paths by name."""
    for name, code in PLUGINS.items():
        (directory / name).write_text(code)
    return {name: str(directory / name) for name in PLUGINS}


def section(number: int) -> str:
    return TEXT.split(f"\n## {number}. ")[1].split("\n## ")[0]


def edits(number: int) -> list[tuple[str, str, str]]:
    """File, lines as they are, lines as they become, of the diffs of a section."""
    found = []
    for block in re.findall(r"^```diff\n(.*?)^```", section(number), re.S | re.M):
        for part in re.split(r"^# ", block, flags=re.M)[1:]:
            path, _, body = part.partition("\n")
            lines = [line or " " for line in body.splitlines()]
            before = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
            after = "".join(f"{line[1:]}\n" for line in lines if line[0] in " +")
            found.append((path, before, after))
    return found


class Copy:
    """A copy of the package that the blocks of one section have changed."""

    def __init__(self, directory: Path, number: int, *, leave_out: str = "") -> None:
        """`leave_out` names a file whose changes are forgotten."""
        shutil.copytree(
            ROOT / "llava_kd", directory / "llava_kd", ignore=shutil.ignore_patterns("__pycache__")
        )
        self._directory = directory
        self.touched: set[str] = set()
        for path, before, after in edits(number):
            if path == leave_out:
                continue
            file = directory / path
            text = file.read_text()
            assert text.count(before) == 1, f"{path} holds these lines {text.count(before)} times:\n{before}"
            file.write_text(text.replace(before, after))
            self.touched.add(path)

    def add(self, path: str, text: str) -> None:
        assert not (self._directory / path).exists()
        (self._directory / path).write_text(text)
        self.touched.add(path)

    def run(self, code: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Python code, with words in `sys.argv`, and the copy in the place of the package."""
        sure = "import sys, llava_kd; assert llava_kd.__file__.startswith(sys.argv[0]), llava_kd.__file__\n"
        command = [sys.executable, "-c", f"import sys; sys.argv[0] = {str(self._directory)!r}; {sure}{code}"]
        environment = os.environ | {"PYTHONPATH": str(self._directory), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [*command, *words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
            cwd=self._directory,
        )
