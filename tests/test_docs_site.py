"""The site of docs/: built without a warning, whole, and readable in a browser, narrow and wide."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from browser import browser, needs_chromium

from llava_kd.api import NAMES

ROOT = Path(__file__).parents[1]
MKDOCS = Path(os.environ.get("MKDOCS", ROOT / ".venv-docs/bin/mkdocs"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MKDOCS.is_file(), reason="no MkDocs here: bash scripts/docs.sh installs it"),
]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *words: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site") / "site"
    environment = {**os.environ, "MKDOCS": str(MKDOCS), "SITE": str(out)}
    done = subprocess.run(
        ["bash", "scripts/docs.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_every_page_is_built_and_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = [path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")]
    for page in pages:
        built = site / "index.html" if page.name == "index" else site / page / "index.html"
        text = built.read_text()
        loaded = re.findall(r"""<(?:script|link|img|iframe)[^>]*(?:src|href)=["']?(https?:[^"'\s>]*)""", text)
        assert not loaded, page
    shown = (site / "api/index.html").read_text()
    assert 'id="llava_kd.distill.terms.term.Term"' in shown
    assert not [name for name in NAMES if f'id="llava_kd.api.{name}"' not in shown]
    assert ":::" not in shown


@needs_chromium
def test_pages_are_read_narrow_and_wide_light_and_dark(address: str, tmp_path: Path) -> None:
    with browser(tmp_path / "browser") as page:
        for path in ("", "settings/", "methods/", "api/"):
            for width in (390, 1280):
                for dark in (False, True):
                    page.open(f"{address}/{path}", width=width, dark=dark)
                    scheme = page.evaluate("document.body.getAttribute('data-md-color-scheme')")
                    assert scheme == ("slate" if dark else "default")
                    found = page.check("article")
                    assert found["read"][0] > 20
                    assert found["overflow"] == []
                    # The signs for copying show when the pointer is on a block.
                    assert [text for text in found["contrast"] if "md-code__button" not in text] == [], path
