"""How long a record, and a row of records, may be for a language model to read it as if it were alone.

What shows only in rows longer than a probe can try is read from the configuration.
"""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedConfig

# So many tokens are picked out of a whole row, or it is cut into such pieces: other records take the places.
_PICKS = ("index_topk", "indexer_budget", "keep_window_size")
_CUTS = ("attention_chunk_size",)
_PACKABLE_LAYERS = {
    *("full_attention", "sliding_attention", "chunked_attention", "indexed_attention"),
    *("linear_attention", "conv", "hybrid", "hybrid_sliding", "moe", "mamba", "attention"),
}


def check_rows(text: PreTrainedConfig, *, max_length: int, max_tokens: int | None) -> None:
    """ValueError where records of `max_length`, or packed rows of `max_tokens`, are too long for the model.

    `max_tokens` is None where rows hold one record.
    """
    model = f"the {text.model_type!r} language model"
    tree = text.to_dict()
    positions = tree.get("max_position_embeddings") or getattr(text, "max_position_embeddings", None)
    if isinstance(positions, int) and max_length > positions:
        raise ValueError(
            f"`data.max_length` is {max_length}, but {model} has {positions} positions "
            f"(max_position_embeddings): set it to at most {positions}"
        )
    for kind, original in _switches(tree.get("rope_parameters"), tree):
        if max_length > original:
            raise ValueError(
                f"`data.max_length` is {max_length}, but the positions of {model} ({kind} RoPE) change "
                f"for all records of a batch as soon as one is longer than {original} tokens, so that a "
                f"prediction would depend on the batch: set it to at most {original}"
            )
    longest, setting = max_length, "data.max_length"
    if max_tokens is not None:
        longest, setting = max_tokens, "data.packing.max_tokens"
    for name in _PICKS if max_tokens is None else (*_PICKS, *_CUTS):
        width = tree.get(name)
        if isinstance(width, int) and longest > width:
            raise ValueError(
                f"`{setting}` is {longest}, but in a longer row than {width} tokens ({name}) {model} gives a "
                f"record other outputs than alone: set it to at most {width}"
            )
    unknown = set(tree.get("layer_types") or ()) - _PACKABLE_LAYERS
    if max_tokens is not None and unknown:
        raise ValueError(
            f"`data.packing` is not known to keep records apart in the layers {sorted(unknown)} of {model}: "
            "set it to null"
        )


def _switches(rope: object, tree: dict) -> Iterator[tuple[str, int]]:
    """Kind, and the longest row before it turns, of every RoPE that depends on the longest row of a batch."""
    if not isinstance(rope, dict):
        return
    for nested in rope.values():
        yield from _switches(nested, tree)
    kind = rope.get("rope_type") or rope.get("type")
    if kind == "longrope" or (isinstance(kind, str) and "dynamic" in kind):
        original = tree["max_position_embeddings"]
        if kind == "longrope":
            own = rope.get("original_max_position_embeddings")
            original = own or tree.get("original_max_position_embeddings") or original
        yield kind, original
