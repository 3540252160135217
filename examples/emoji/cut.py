"""A shallower language model of some layers of another, for a student that a first stage then heals.

python examples/emoji/cut.py LANGUAGE_MODEL OUT --layers 6
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


def kept_layers(depth: int, count: int) -> list[int]:
    """The first, the last, and between them as evenly as it goes."""
    if not 2 <= count <= depth:
        raise ValueError(f"layers must be from 2 to {depth}, the depth of the model; got {count}")
    return [round(k * (depth - 1) / (count - 1)) for k in range(count)]


def cut(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """In place, to be saved and read anew: what a layer knows of its place is still the old one."""
    decoder = model.base_model
    layers = decoder.layers
    assert isinstance(layers, nn.ModuleList)
    decoder.layers = nn.ModuleList(layers[k] for k in kept_layers(len(layers), count))
    model.config.num_hidden_layers = count
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:count]
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source")
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=6)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.source, dtype="float32")
    scratch = arguments.out.with_name(f".{arguments.out.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        cut(model, arguments.layers).save_pretrained(scratch)
    except ValueError as error:
        sys.exit(f"{error}")
    AutoTokenizer.from_pretrained(arguments.source).save_pretrained(scratch)
    shutil.rmtree(arguments.out, ignore_errors=True)
    scratch.rename(arguments.out)


if __name__ == "__main__":
    main()
