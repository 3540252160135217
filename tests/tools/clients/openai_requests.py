"""Questions to a server in OpenAI's form, pictures in base64 before the words. Needs nothing but Python."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from protocol import NEW_TOKENS, Answers, Question, last_error


def request_of(question: Question, model: str | None = None) -> dict:
    """The body of `/v1/chat/completions`; greedy."""
    messages = [
        {"role": message["role"], "content": _content(message["role"], message["content"])}
        for message in question
    ]
    body = {"messages": messages, "temperature": 0, "max_tokens": NEW_TOKENS}
    return body if model is None else {"model": model, **body}


def _content(role: str, parts: list[dict]) -> str | list[dict]:
    if role == "assistant":
        return "".join(part["text"] for part in parts)
    return [_picture(Path(part["path"])) if part["type"] == "image" else part for part in parts]


def _picture(path: Path) -> dict:
    content = path.read_bytes()
    kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
    url = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def post(url: str, body: dict, timeout: float = 120) -> dict:
    """The answer as JSON; RuntimeError with what the server says where it refuses."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{error.code}: {error.read().decode()[:1000]}") from None


def of_server(url: str, model: str | None = None) -> Answers:
    """Questions one after the other, or as many at once as `batch` says."""

    def answer(question: Question) -> str:
        found = post(f"{url}/v1/chat/completions", request_of(question, model))
        return found["choices"][0]["message"]["content"] or ""

    def answers(questions: Sequence[Question], batch: int) -> list[str]:
        with ThreadPoolExecutor(batch) as pool:
            return list(pool.map(answer, questions))

    return answers


@contextlib.contextmanager
def started(words: list[str], health: str, seconds: float, **more: str) -> Iterator[str]:
    """The address of a server that `words` start ("{port}" in them is a free one); it ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    url = f"http://127.0.0.1:{port}"
    with tempfile.NamedTemporaryFile("w+", suffix=".txt") as log:
        server = subprocess.Popen(
            [word.replace("{port}", port) for word in words],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **more},
            start_new_session=True,
        )
        try:
            _wait(server, url + health, seconds, Path(log.name))
            yield url
        finally:
            for sign in (signal.SIGTERM, signal.SIGKILL):  # its workers too, which are of its group
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(server.pid, sign)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    server.wait(20)


def _wait(server: subprocess.Popen, url: str, seconds: float, log: Path) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with {server.returncode}: {last_error(log.read_text())}")
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.5)
    raise RuntimeError(f"the server did not answer within {seconds:.0f} s: {last_error(log.read_text())}")
