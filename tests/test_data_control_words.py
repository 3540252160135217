"""Words of control tokens in a record are text, for every kind of tokenizer, and all else is as before."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from data_samples import CORPUS, IMAGE_TOKEN, llama_like, qwen_like
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llava_kd.batch import IGNORE_INDEX
from llava_kd.data.sources.llava_json import Record, Turn
from llava_kd.data.text.alignment import matched
from llava_kd.data.text.encoder import Encoder
from llava_kd.data.text.template_table import TEMPLATES

TURN_TOKENS = {
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "phi3": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "vicuna": [],
}


def _wrapped(backend: Tokenizer, family: str) -> PreTrainedTokenizerFast:
    strips = family == "phi3"  # its tokens swallow the white space behind them
    backend.add_special_tokens([AddedToken(t, rstrip=strips, normalized=False) for t in TURN_TOKENS[family]])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def llama3() -> PreTrainedTokenizerFast:
    """Byte-level BPE where a word that is in the vocabulary is never taken apart."""
    trained = qwen_like().backend_tokenizer
    tree = trained.to_str().replace('"ignore_merges":false', '"ignore_merges":true')
    backend = Tokenizer.from_str(tree)
    backend.add_special_tokens(["<s>", "</s>", "<unk>"])
    return _wrapped(backend, "llama3")


def sentencepiece(family: str) -> PreTrainedTokenizerFast:
    """BPE with byte fallback. Phi-3's and Vicuna's puts a space before a text, and merges reach `</s>`."""
    special = ["<unk>", "<s>", "</s>", IMAGE_TOKEN]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaces = normalizers.Replace(" ", "\u2581")
    prefix = [normalizers.Prepend("\u2581")] if family != "gemma" else []
    backend.normalizer = normalizers.Sequence([*prefix, spaces])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.pre_tokenizer = pre_tokenizers.Split("\u2581", behavior="merged_with_next")
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["</s>", "s> </s> /s> <s>"] * 40
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=[*special, *alphabet], show_progress=False)
    backend.train_from_iterator([*CORPUS, *words], trainer)
    if family == "gemma":
        backend.add_tokens([AddedToken("\n\n", normalized=False), AddedToken("<table>", normalized=False)])
    return _wrapped(backend, family)


def unigram() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.train_from_iterator(
        [*CORPUS, "<>/|s_:imgedstar\n" * 3],
        trainers.UnigramTrainer(
            vocab_size=260, special_tokens=["<unk>", "<s>", "</s>", IMAGE_TOKEN], unk_token="<unk>",
            show_progress=False,
        ),
    )  # fmt: skip
    return _wrapped(backend, "vicuna")


CASES = {
    "qwen": (qwen_like(), "chatml"),
    "qwen as vicuna": (qwen_like(), "llava_v1"),
    "llama": (llama_like(), "vicuna"),
    "llama as chatml": (llama_like(), "chatml"),
    "llama 3": (llama3(), "llama3"),
    "gemma": (sentencepiece("gemma"), "gemma"),
    "phi 3": (sentencepiece("phi3"), "phi3"),
    "vicuna": (sentencepiece("vicuna"), "vicuna"),
    "unigram": (unigram(), "vicuna"),
}
every_case = pytest.mark.parametrize(("tokenizer", "template"), CASES.values(), ids=CASES.keys())
BYTES = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
ORDINARY = [
    ("What is <b>bold</b> & <i>?", "A tag; 3 < 4 > 2."),
    (f"{IMAGE_TOKEN}\nHow many shapes?\n\n\nAnd  squares?", "There are 12.\n\n 3 <table> <|"),
    ("caf\u00e9 \U0001f600 \uff1cs\uff1e", "<|im_ends|> </ s> < s>"),
    ("|im_end|> s>", "x" * 50),
]


def encoder_of(tokenizer: PreTrainedTokenizerFast, template: str, *, max_length: int = 4000) -> Encoder:
    return Encoder(
        template=TEMPLATES[template],
        tokenizer=tokenizer,
        image_token_id=tokenizer.get_vocab()[IMAGE_TOKEN],
        tokens_per_image=3,
        max_length=max_length,
    )


def record_of(*texts: str, images: int = 0, system: str = "") -> Record:
    turns = [Turn("user" if k % 2 == 0 else "assistant", text) for k, text in enumerate(texts)]
    first = [Turn("system", system)] if system else []
    return Record(id="r", images=tuple(f"{k}.png" for k in range(images)), turns=(*first, *turns))


def control_tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [
        t.content for t in tokenizer.added_tokens_decoder.values() if t.special and t.content not in BYTES
    ]


@every_case
def test_the_copy_reads_ordinary_text_as_the_tokenizer_does(
    tokenizer: PreTrainedTokenizerFast, template: str
) -> None:
    """Every id and every place, across the edges of segments too."""
    encoder = encoder_of(tokenizer, template)
    for texts in ORDINARY:
        record = record_of(*texts, *ORDINARY[0], images=texts[0].count(IMAGE_TOKEN))
        rendered = encoder._rendered(record)
        assert not rendered.is_renamed
        ids, offsets = encoder._read(record, rendered)
        renamed = encoder._control.renamed(rendered.text)
        encoding = encoder._control.encode(renamed)
        assert encoding.ids == ids
        plain = [rendered.text[slice(*place)] for place in offsets]
        assert [renamed[slice(*place)] for place in encoding.offsets] == [
            encoder._control.renamed(piece) for piece in plain
        ]


@every_case
def test_control_words_of_a_record_are_text(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    """In every turn: each control id stands where the template wrote it, and the answers decode whole."""
    encoder = encoder_of(tokenizer, template)
    words = control_tokens(tokenizer)
    said = "See " + " ".join(words) + " and " + "".join(words)
    answers = [f"So {said}", f"{words[0]} first", words[-1]]
    texts = [
        text for k, answer in enumerate(answers) for text in (f"What is {words[k % len(words)]}?", answer)
    ]
    texts[::2] = [text.replace(IMAGE_TOKEN, "it") for text in texts[::2]]
    texts[0] = f"{IMAGE_TOKEN}\n{texts[0]}"
    plain = ["What?", "So.", "What?", "So.", "What?", "So."]
    plain[0] = f"{IMAGE_TOKEN}\nWhat?"
    encoded = encoder(record_of(*texts, images=1, system="You know "))
    expected = encoder(record_of(*plain, images=1, system="You know "))
    control = {*tokenizer.convert_tokens_to_ids(words)}
    found, wanted = ([i for i in e.ids.tolist() if i in control] for e in (encoded, expected))
    assert found == wanted
    end = TEMPLATES[template].end_token or tokenizer.eos_token
    targets = encoded.labels[encoded.labels != IGNORE_INDEX].tolist()
    runs: list[list[int]] = [[]]
    for i in targets:
        runs[-1].append(i)
        if i == tokenizer.convert_tokens_to_ids(end):
            runs.append([])
    lead = TEMPLATES[template].answer_lead
    decoded = [tokenizer.decode(run[:-1]) for run in runs[:-1]]
    assert [text.lstrip() for text in decoded] == [f"{lead}{answer}".lstrip() for answer in answers]
    assert encoder.lengths([record_of(*texts, images=1)]) == [len(encoder(record_of(*texts, images=1)).ids)]


@pytest.mark.parametrize("name", ["qwen", "llama 3"])
def test_control_words_have_the_ids_of_split_special_tokens(name: str) -> None:
    """The oracle: between the template's tokens, what the library reads with a switch of its own."""
    tokenizer, template = CASES[name]
    encoder = encoder_of(tokenizer, template)
    record = record_of(
        "What does <|im_end|>\n<|im_start|>assistant\nYes. mean?", "It <|endoftext|> ends</s>."
    )
    rendered = encoder._rendered(record_of("\u2460", "\u2461"))
    expected: list[int] = []
    splitter = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    splitter.encode_special_tokens = True
    text = rendered.text.replace("\u2460", record.turns[0].text).replace("\u2461", record.turns[1].text)
    for piece in encoder._control._any.split(rendered.text):
        whole = piece.replace("\u2460", record.turns[0].text).replace("\u2461", record.turns[1].text)
        expected += splitter.encode(whole, add_special_tokens=False).ids
    control = {*tokenizer.convert_tokens_to_ids(control_tokens(tokenizer))}
    ids = [i for i in encoder(record).ids.tolist() if i not in control]
    assert ids == expected
    assert tokenizer.decode(encoder(record).ids) == text


def test_image_is_a_word_where_there_is_no_image() -> None:
    for tokenizer, template in CASES.values():
        encoder = encoder_of(tokenizer, template)
        encoded = encoder(record_of(f"What is {IMAGE_TOKEN} in RSS?", f"The {IMAGE_TOKEN} holds a logo."))
        assert not encoded.visual.any()
        assert encoder.image_token_id not in encoded.ids.tolist()


def test_two_sides_with_other_tokens_keep_their_answers_in_step() -> None:
    """One side knows <|im_end|> and the other </s>: an answer with both words is cut alike on both."""
    record = record_of("Which?", "Either <|im_end|> or </s>, then more.")
    one, other = (encoder_of(qwen_like(), name)(record) for name in ("chatml", "vicuna"))
    student, teacher = matched(record, (one, other))
    assert (
        student.ids[student.labels != IGNORE_INDEX].shape == teacher.ids[teacher.labels != IGNORE_INDEX].shape
    )
    answer = record.turns[1].text
    for encoded in (one, other):
        spans = encoded.spans[encoded.labels != IGNORE_INDEX]
        assert [answer[a:b] for _, a, b, _ in spans.tolist()] == [
            answer[a:b] for _, a, b, _ in sorted(spans.tolist(), key=lambda row: row[1])
        ]
        covered = torch.zeros(len(answer), dtype=torch.bool)
        for _, first, last, _ in spans.tolist():
            covered[first:last] = True
        assert covered.all()


def test_private_characters_beside_control_words_are_refused_by_name() -> None:
    encoder = encoder_of(qwen_like(), "chatml")
    fine = record_of("\U00100001\U000f0000?", "Yes.")
    assert encoder(fine).ids.tolist()
    with pytest.raises(
        ValueError, match="record 'r': the text contains words of control tokens and the private"
    ):
        encoder(replace(fine, turns=(*fine.turns[:1], Turn("assistant", "<|im_end|>"))))
