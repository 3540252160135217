"""What llama.cpp's own server answers over HTTP; run by a Python that has xllamacpp.

    python llama_cpp_answers.py JOBS.json

JOBS is a list of {"directory", "requests", "out"}, and a request {"path", "body"}. The file `out` holds the
server's version and, for each request, its answer.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path

import xllamacpp


def answers(directory: str, requests: list[dict]) -> list[dict]:
    params = xllamacpp.CommonParams()
    params.model.path = f"{directory}/model.gguf"
    params.mmproj.path = f"{directory}/mmproj.gguf"
    params.n_ctx, params.n_parallel, params.warmup = 1024, 1, False
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)
    return [_ask(server.listening_address + request["path"], request["body"]) for request in requests]


def _ask(url: str, body: dict) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        return {"error": error.read().decode()}


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        found = {
            "xllamacpp": importlib.metadata.version("xllamacpp"),
            "answers": answers(job["directory"], job["requests"]),
        }
        Path(job["out"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
