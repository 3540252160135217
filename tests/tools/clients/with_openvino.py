"""OpenVINO, by the export of optimum-intel, in the arithmetic of float32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from optimum.intel import OVModelForVisualCausalLM
from protocol import Answers, work
from transformers import AutoProcessor
from with_transformers import of_model

# Else it computes in bfloat16 on processors that have it.
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "1"}


@contextlib.contextmanager
def opened(directory: str) -> Iterator[Answers]:
    model = OVModelForVisualCausalLM.from_pretrained(
        directory, export=True, load_in_8bit=False, ov_config=FLOAT32, compile=True
    )
    yield of_model(model, AutoProcessor.from_pretrained(directory))


if __name__ == "__main__":
    work(opened, "optimum-intel", "openvino", "transformers", "torch")
