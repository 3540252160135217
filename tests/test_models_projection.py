"""Which tokens of another tokenizer the mass of a token goes to, by what they spell."""

from __future__ import annotations

import pytest
from tiny_llava import merged_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llava_kd.models.words.pairs import pairs_of
from llava_kd.models.words.projection import rules_of


def byte_level(*merged: str, prefix: bool = False) -> PreTrainedTokenizerFast:
    """The 256 letters in an order of their own, then words that merge from the left."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(["</s>", *letters])}
    merges = []
    for word in merged:
        for stop in range(2, len(word) + 1):
            if word[:stop] not in vocabulary:
                vocabulary[word[:stop]] = len(vocabulary)
                merges.append((word[: stop - 1], word[stop - 1]))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def sentence_piece() -> PreTrainedTokenizerFast:
    """Puts a space before what it reads, as Llama 2's does; has letters, their bytes, and few words."""
    names = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581201ab", "\u2581a"]
    scores = [(name, 0.0 if name == "\u2581a" else -1.0) for name in names]
    backend = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def rules(
    source: PreTrainedTokenizerFast, target: PreTrainedTokenizerFast, spread: float = 0.0
) -> dict[str, dict[str, float]]:
    """By names, of the sources that are not the same token on both sides."""
    ends = source.get_vocab()["</s>"], target.get_vocab()["</s>"]
    pairs = pairs_of(source, target, ends, student_rows=len(source), teacher_rows=len(target))
    same = dict(zip(pairs.student, pairs.teacher, strict=True))
    made, found = rules_of(source, target, same, spread=spread), {}
    for a, b, weight in zip(made.source, made.target, made.weight, strict=True):
        if a in same:
            assert (b, weight) == (same[a], 1.0)
        else:
            row = found.setdefault(source.convert_ids_to_tokens(a), {})
            row[target.convert_ids_to_tokens(b)] = row.get(target.convert_ids_to_tokens(b), 0.0) + weight
    assert made.exact == len(same)
    assert made.split == len(found)
    assert made.without == len(source) - made.exact - made.split
    for row in found.values():
        assert sum(row.values()) == pytest.approx(1)
    return found


def test_a_token_goes_to_the_first_piece_of_its_text_or_is_spread() -> None:
    numbers, digits = byte_level("201", "abcdef"), byte_level("ab", "cd", "20")
    found = rules(numbers, digits)
    assert found["201"] == {"20": 1.0}
    assert found["abcd"] == {"ab": 1.0}
    assert rules(digits, numbers)["cd"] == {"c": 1.0}
    spread = rules(numbers, digits, 0.1)
    assert spread["201"] == pytest.approx({"20": 1 / 1.1, "1": 0.1 / 1.1})
    assert spread["abcdef"] == pytest.approx(
        {"ab": 1 / 1.111, "cd": 0.1 / 1.111, "e": 0.01 / 1.111, "f": 0.001 / 1.111}
    )
    long = rules(byte_level("abcdef"), byte_level(), 0.5)["abcdef"]
    assert long == pytest.approx({"a": 8 / 15, "b": 4 / 15, "c": 2 / 15, "d": 1 / 15})  # four at most


def test_pieces_are_those_that_the_other_tokenizer_writes() -> None:
    """Not its longest tokens: `abc` is there, but merges begin with b and c."""
    vocabulary = {
        letter: i for i, letter in enumerate(["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    more = ["bc", "ab", "abc"]
    vocabulary |= {word: len(vocabulary) + i for i, word in enumerate(more)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("b", "c"), ("a", "b"), ("ab", "c")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    target = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert rules(byte_level("abcd"), target)["abcd"] == {"a": 1.0}


def test_half_letters_and_spaces_that_a_tokenizer_adds_are_matched_by_bytes() -> None:
    """Of a letter of three bytes the first two; and `201` within a word, which is no ` 201`."""
    euro = "\u00e2\u0124\u00ac"  # as byte-level tokenizers write its bytes
    halves = byte_level(euro, "201", "\u0120ab")
    found = rules(halves, sentence_piece())
    assert found[euro[:2]] == {"<0xE2>": 1.0}
    assert found[euro] == {"<0xE2>": 1.0}
    assert found["201"] == {"2": 1.0}
    assert found["\u0120ab"] == {"\u2581a": 1.0}
    assert rules(byte_level("201"), byte_level("20", prefix=True))["201"] == {"20": 1.0}


def test_a_tokenizer_onto_itself_is_the_identity_and_control_tokens_stay_behind() -> None:
    merged = merged_tokenizer()
    assert rules(merged, merged) == {}
    assert rules(merged, byte_level()).keys().isdisjoint({"<pad>", "<image>"})


def test_a_spread_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match="at least 0 and below 1; got 1"):
        rules_of(merged_tokenizer(), merged_tokenizer(), {}, spread=1.0)
