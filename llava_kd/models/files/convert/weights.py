"""Weight files of other layouts, and models filled with exactly these weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from llava_kd.models.reading import read_json, readable

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_SHARD = re.compile(r"(model|pytorch_model)-\d+-of-(\d+)\.(safetensors|bin)")
# Computed from the config: checkpoints of transformers 4 hold them, nothing reads them.
_COMPUTED = ("rotary_emb.inv_freq", "position_ids")


def weight_files(folder: Path) -> list[str]:
    """Names of the files that hold the folder's weights, by the index if there is one; empty without any.

    Raises ValueError for an index that leads out of the folder, and for shards that are not all there.
    """
    for index in _INDEXES:
        if (folder / index).is_file():
            names = read_json(folder / index).get("weight_map")
            if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
                raise ValueError(f"the file {folder / index} must map weights to files under weight_map")
            files = sorted(set(names.values()))
            if outside := [name for name in files if Path(name).name != name]:
                raise ValueError(f"{folder / index} lists {outside[0]!r}, which is not a file in its folder")
            if absent := [name for name in files if not (folder / name).is_file()]:
                raise ValueError(
                    f"{folder} is an incomplete download: its index lists {absent[0]}, which is not there"
                )
            return files
    for name in _WHOLE:
        if (folder / name).is_file():
            return [name]
    return _shards_without_index(folder)


def _shards_without_index(folder: Path) -> list[str]:
    shards: dict[tuple[str, str, str], list[str]] = {}
    for path in sorted(folder.glob("*-of-*")):
        if match := _SHARD.fullmatch(path.name):
            shards.setdefault((match[1], match[2], match[3]), []).append(path.name)
    for (_, count, _), names in shards.items():
        if len(names) == int(count):
            return names
    if shards:
        (_, count, _), names = next(iter(shards.items()))
        raise ValueError(
            f"{folder} is an incomplete download: it has {len(names)} of {int(count)} shards, no index"
        )
    return []


def read_state(folder: Path) -> dict[str, Tensor]:
    """Weights of a folder in fp32: safetensors, or pickles read with weights only.

    Raises ValueError for a folder without weights or with a part of them.
    """
    names = weight_files(folder)
    if not names:
        raise ValueError(f"{folder} has no weights (model.safetensors or pytorch_model.bin)")
    state: dict[str, Tensor] = {}
    for name in names:
        state |= read_tensors(folder / name)
    return state


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of one file, floating ones in fp32. Raises ValueError for a file that holds something else."""
    with readable("the weights", str(path)):
        if path.suffix == ".safetensors":
            part = load_file(path)
        else:
            part = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(part, Mapping) or not all(isinstance(t, Tensor) for t in part.values()):
            raise ValueError("they must be tensors by name, and nothing else")
        return {n: t.detach().float() if t.is_floating_point() else t for n, t in part.items()}


def below(state: Mapping[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    """The weights whose names begin with one of the prefixes, without it."""
    return {
        name.removeprefix(prefix): tensor
        for prefix in prefixes
        for name, tensor in state.items()
        if name.startswith(prefix)
    }


def filled(kind: type, config: PreTrainedConfig, state: Mapping[str, Tensor], what: str) -> PreTrainedModel:
    """A model of class `kind` with these weights; names of transformers 4 and tied heads are understood.

    Raises ValueError naming the first weight that is missing, left over or of another shape.
    """
    kept = {n: t for n, t in state.items() if not n.endswith(_COMPUTED)}
    if whole := [n for n, t in kept.items() if not t.is_floating_point()]:
        raise ValueError(
            f"{what} is quantised ({whole[0]} is {kept[whole[0]].dtype}); convert what it was made from"
        )
    with quiet(), readable("the weights of", what):
        model, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=kept,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    assert isinstance(model, PreTrainedModel)
    shapes = {name: (tuple(found), tuple(needed)) for name, found, needed in info["mismatched_keys"]}
    _complain(what, missing=set(info["missing_keys"]), extra=set(info["unexpected_keys"]), shapes=shapes)
    return model


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """The weights into a plain module, with the errors of `filled`."""
    expected = module.state_dict()
    shapes = {
        name: (tuple(state[name].shape), tuple(tensor.shape))
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    }
    _complain(what, missing=set(expected) - set(state), extra=set(state) - set(expected), shapes=shapes)
    module.load_state_dict(dict(state))


def _complain(
    what: str, *, missing: set[str], extra: set[str], shapes: Mapping[str, tuple[tuple, tuple]]
) -> None:
    if missing:
        raise ValueError(
            f"{what} lacks {len(missing)} weights, such as {sorted(missing)[0]}: an incomplete download?"
        )
    if extra:
        raise ValueError(
            f"{what} has {len(extra)} weights that its config does not know, such as {sorted(extra)[0]}"
        )
    if shapes:
        name, (found, needed) = sorted(shapes.items())[0]
        raise ValueError(f"{what} does not fit: {name} is {found} where its config needs {needed}")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the library's own report of what does not fit: ours is one line."""
    logging = transformers.logging
    before, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bar:
            logging.enable_progress_bar()
