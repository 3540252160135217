"""`transformers serve`, over HTTP."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from openai_requests import of_server, started
from protocol import Answers, work

PROGRAM = "from transformers.cli.transformers import main; main()"  # the program is in another environment
SERVED = ["serve", "OUT", "--port", "8000"]  # as docs/serving.md has it
MORE = ["--device", "cpu", "--dtype", "float32"]


@contextlib.contextmanager
def opened(directory: str) -> Iterator[Answers]:
    filled = {"OUT": directory, "8000": "{port}"}
    words = [sys.executable, "-c", PROGRAM, *(filled.get(word, word) for word in SERVED), *MORE]
    with started(words, "/health", 900) as url:
        yield of_server(url, directory)


if __name__ == "__main__":
    work(opened, "transformers", "torch")
