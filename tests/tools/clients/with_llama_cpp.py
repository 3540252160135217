"""llama.cpp's own server, inside xllamacpp, reading the two files of `export --format gguf`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from llama_cpp_requests import server_of
from openai_requests import of_server
from protocol import Answers, work


@contextlib.contextmanager
def opened(directory: str) -> Iterator[Answers]:
    server = server_of(directory, parallel=10)
    yield of_server(server.listening_address)


if __name__ == "__main__":
    work(opened, "xllamacpp")
