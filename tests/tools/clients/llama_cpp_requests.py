"""Raw requests to llama.cpp's own server over HTTP; run by a Python that has xllamacpp.

    python llama_cpp_requests.py JOBS.json

JOBS is a list of {"directory", "requests", "out"}, and a request {"path", "body"}. The file `out` holds the
server's answer to each request.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import xllamacpp
from openai_requests import post


def server_of(directory: str, *, parallel: int = 1) -> xllamacpp.Server:
    params = xllamacpp.CommonParams()
    params.model.path = f"{directory}/model.gguf"
    params.mmproj.path = f"{directory}/mmproj.gguf"
    params.n_ctx, params.n_parallel, params.warmup = 1024 * parallel, parallel, False
    params.cpuparams.n_threads = 1
    return xllamacpp.Server(params)


def answers(directory: str, requests: list[dict]) -> list[dict]:
    server = server_of(directory)
    return [post(server.listening_address + request["path"], request["body"]) for request in requests]


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        found = {"answers": answers(job["directory"], job["requests"])}
        Path(job["out"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
