"""`transformers serve`, over HTTP."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from openai_requests import of_server, started
from protocol import Answers, work

COMMAND = "from transformers.cli.transformers import main; main()"  # the program is in another environment


@contextlib.contextmanager
def opened(directory: str) -> Iterator[Answers]:
    words = [sys.executable, "-c", COMMAND, "serve", directory, "--port", "{port}"]
    with started([*words, "--device", "cpu", "--dtype", "float32"], "/health", 300) as url:
        yield of_server(url, directory)


if __name__ == "__main__":
    work(opened, "transformers", "torch")
