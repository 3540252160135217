"""`llava-kd demo` as it is started: asked over HTTP and in a browser, ended, given what it cannot serve."""

from __future__ import annotations

import http.client
import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from llava_kd.cli import main
from llava_kd.evaluation.demo.asking import ask_all
from llava_kd.evaluation.demo.page import address_of, bound
from llava_kd.evaluation.demo.respondents import load

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="gradio, of the extra `demo`, is not installed"
)
QUESTION = "What is this?"
START = "import sys; from llava_kd.cli import main; sys.exit(main(sys.argv[1:]))"


@contextmanager
def served(*words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its address."""
    process = subprocess.Popen(
        [sys.executable, "-c", START, "demo", *words, "--port", "0", "--max_new_tokens", "3"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"open (http://\S+)", line)
        assert found, line or process.communicate()[1]
        yield process, found[1]
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


class Asked:
    """Plain HTTP, as the page itself talks to its server."""

    def __init__(self, address: str) -> None:
        self._place = urlsplit(address).netloc

    def request(self, method: str, path: str, body: bytes = b"", kind: str = "application/json"):
        connection = http.client.HTTPConnection(self._place, timeout=300)
        connection.request(method, path, body, {"Content-Type": kind})
        answer = connection.getresponse()
        text = answer.read().decode("utf-8", "replace")
        connection.close()
        return answer, text

    def upload(self, name: str, data: bytes) -> str:
        mark = "0123456789"
        head = f'--{mark}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        body = head.encode() + data + f"\r\n--{mark}--\r\n".encode()
        answer, text = self.request(
            "POST", "/gradio_api/upload", body, f"multipart/form-data; boundary={mark}"
        )
        assert answer.status == 200, text
        return json.loads(text)[0]

    def ask(self, path: str | None, question: str) -> str:
        """The stream of events of one call."""
        picture = None if path is None else {"path": path, "meta": {"_type": "gradio.FileData"}}
        body = json.dumps({"data": [picture, question]}).encode()
        answer, text = self.request("POST", "/gradio_api/call/ask", body)
        assert answer.status == 200, text
        return self.request("GET", f"/gradio_api/call/ask/{json.loads(text)['event_id']}")[1]


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe"):
            self.found += [value for name, value in attrs if name in ("src", "href") and value]


@needs_gradio
@pytest.mark.slow
def test_the_page_answers_over_http_loads_nothing_from_elsewhere_and_ends_at_ctrl_c(
    teacher_dir: Path, student_dir: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", (40, 30), (200, 40, 20)).save(picture)
    words = (f"teacher={teacher_dir}", f"student={student_dir}")
    expected = ask_all(load(words, max_new_tokens=3), picture.read_bytes(), QUESTION)
    with served(*words) as (process, address):
        assert address.startswith("http://127.0.0.1:")
        asked = Asked(address)
        answer, text = asked.request("GET", "/")
        assert answer.status == 200
        policy = answer.getheader("content-security-policy") or ""
        assert policy.startswith("default-src 'self'")
        assert "http" not in policy
        links = _Links()
        links.feed(text)
        assert links.found
        assert not [link for link in links.found if "//" in link and urlsplit(link).hostname != "127.0.0.1"]
        assert "fonts.g" not in text
        path = asked.upload("a.png", picture.read_bytes())
        said = asked.ask(path, QUESTION)
        html = json.loads(said.partition("event: complete\ndata: ")[2].splitlines()[0])[0]
        assert html.count("<section>") == 2
        assert html.count("<img ") == 2
        for one in expected:
            assert f"<h3>{one.name}</h3>" in html
            assert html.count(f"<td>{one.tokens[0].probability:.1%}</td>") >= 1
        assert "event: error" in asked.ask(None, QUESTION)
        assert "event: error" in asked.ask(path, " ")
        assert "event: error" in asked.ask(asked.upload("b.png", picture.read_bytes()[:50]), QUESTION)
        assert "event: error" in asked.ask(str(picture), QUESTION), "it reads files that were not uploaded"
        assert "event: complete" in asked.ask(path, QUESTION)
        assert asked.request("GET", f"/gradio_api/file={picture}")[0].status == 403
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 130
        assert error.endswith("llava-kd demo: interrupted\n")
        assert not Path(path).exists()


@needs_gradio
@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_the_answers_stand_on_the_page_in_a_browser(student_dir: Path, tmp_path: Path) -> None:
    """It opens with the first question, answered."""
    picture = tmp_path / "a.png"
    Image.new("RGB", (40, 30), (200, 40, 20)).save(picture)
    (expected,) = ask_all(load([f"small={student_dir}"], max_new_tokens=3), picture.read_bytes(), QUESTION)
    assert CHROMIUM is not None
    words = (f"small={student_dir}", "--image", str(picture), "--question", QUESTION)
    with served(*words) as (_, address):
        done = subprocess.run(
            [
                *(
                    CHROMIUM,
                    "--headless",
                    "--no-sandbox",
                    "--disable-gpu",
                    "--disable-quic",
                    "--no-first-run",
                ),
                *("--disable-quic", "--disable-background-networking", "--disable-sync"),
                "--disable-component-update",
                *(f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=60000", "--dump-dom"),
                address,
            ],
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
    assert "<h3>small</h3>" in done.stdout
    assert f"<td>{expected.tokens[0].probability:.1%}</td>" in done.stdout
    assert 'alt="where small looked"' in done.stdout


def test_a_port_in_use_or_no_port_is_refused_in_one_line() -> None:
    with bound("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert address_of(taken) == f"http://127.0.0.1:{port}"
        with pytest.raises(ValueError, match=rf"127.0.0.1:{port} cannot be opened \(Address already"):
            bound("127.0.0.1", port)
    with pytest.raises(ValueError, match="must be 0 to 65535, got 70000"):
        bound("127.0.0.1", 70_000)
    with pytest.raises(ValueError, match=r"no\.such\.host\.invalid:0 cannot be opened"):
        bound("no.such.host.invalid", 0)


def test_what_cannot_be_served_is_one_line_before_a_model_is_read(
    student_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def line(*words: str) -> str:
        assert main(["demo", *words]) == 2
        said = capsys.readouterr().err
        assert said.startswith("llava-kd demo: ")
        assert said.count("\n") == 1
        return said

    assert "has no config.json" in line(str(tmp_path))
    assert "no model directory" in line(str(tmp_path / "none"))
    assert "needs both, --image and --question" in line(str(student_dir), "--question", "What?")
    assert "No such file" in line(str(student_dir), "--image", str(tmp_path / "a.png"), "--question", "What?")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install 'llava_kd[demo]'" in line(str(student_dir))
    monkeypatch.undo()
    if importlib.util.find_spec("gradio") is not None:
        with bound("127.0.0.1", 0) as taken:
            assert "cannot be opened" in line(str(student_dir), "--port", str(taken.getsockname()[1]))
