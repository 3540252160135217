"""How much each teacher counts, before the first step."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llava_kd.assembly.settings import tables_of
from llava_kd.config import TrainConfig
from llava_kd.data.sources.conversation import Source
from llava_kd.data.sources.kinds import Place, open_source
from llava_kd.losses.targets.mixture import histograms, log_fusion_weights

MOST_RECORDS = 20_000  # of a source; of a larger one as many, evenly spaced


def log_weights(config: TrainConfig, source: Source, tokenizer: PreTrainedTokenizerBase) -> Tensor | None:
    """Of each teacher, the first one first; None where every record has its own.

    ValueError for records that cannot be read or hold no answer.
    """
    assert config.teacher is not None
    several = config.teacher.several
    assert several is not None
    number = 1 + len(several.checkpoints)
    if several.weights == "agreement":
        return None
    if several.weights == "uniform":
        return torch.zeros(number).log_softmax(0)
    if several.weights == "given":
        return torch.tensor(several.shares, dtype=torch.float64).log()
    kinds = tables_of(config).sources
    follow = config.data.follow_symlinks
    sources = {
        path: open_source(Place(path=path, images=None, follow_symlinks=follow), kinds)
        for path in several.records
    }
    counted = [answer_types(source, tokenizer, "data")]
    counted += [
        answer_types(sources[path], tokenizer, f"teacher.several.records {path}") for path in several.records
    ]
    types = sorted(set().union(*counted))
    own_K, *theirs = histograms([[one[kind] for kind in types] for one in counted])
    return log_fusion_weights(own_K, torch.stack(theirs), beta=several.beta)


def answer_types(source: Source, tokenizer: PreTrainedTokenizerBase, where: str) -> Counter[int]:
    """How often each token begins an answer: the type of an answer is its first token."""
    numbers = np.linspace(0, len(source) - 1, min(len(source), MOST_RECORDS)).round().astype(int).tolist()
    found: Counter[int] = Counter()
    for i in numbers:
        for turn in source.record(i).turns:
            if turn.role == "assistant":
                ids = tokenizer.encode(turn.text.strip(), add_special_tokens=False)
                found.update(ids[:1])
    if not found:
        raise ValueError(
            f"`{where}` must contain answers to weight teachers by `histograms`; it has none: choose other "
            "weights, or other data"
        )
    return found
