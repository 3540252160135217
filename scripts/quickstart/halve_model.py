"""`halve_model.py RUN/model OUT`: a trained model as it is shipped, in half precision, without paths."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration


def main() -> None:
    model, out = (Path(word) for word in sys.argv[1:])
    if out.exists():
        shutil.rmtree(out)
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("README.md"))
    LlavaForConditionalGeneration.from_pretrained(out, dtype=torch.bfloat16).save_pretrained(out)


if __name__ == "__main__":
    main()
