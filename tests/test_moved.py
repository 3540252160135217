"""Old names of modules still lead to them."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from llava_kd.moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_gives_the_module_itself_and_warns(old: str) -> None:
    new = importlib.import_module(MOVED[old])
    spec = new.__spec__
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {MOVED[old]}"):
        assert importlib.import_module(old) is new
    assert new.__spec__ is spec


def test_the_import_of_the_package_is_light() -> None:
    """Old names cost nothing until they are used."""
    code = "import sys, llava_kd; print(sorted({'torch', 'transformers', 'yaml'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
