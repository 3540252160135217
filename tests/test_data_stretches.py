"""Answers in step where the two tokenizers differ: as bytes of the text.

Shape legend: B rows, T tokens, S stretches, V and U vocabularies, D width.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from data_samples import IMAGE_TOKEN, entry, llama_like, loader_of, qwen_like, side, write_dataset
from tiny_objectives import objective_of
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from llava_kd.batch import IGNORE_INDEX, Batch, Inputs, StretchRows
from llava_kd.data.batches.packing import Packing
from llava_kd.data.sources.conversation import Record, Turn
from llava_kd.data.sources.llava_json import LlavaJson
from llava_kd.data.text.encoder import Encoded, Encoder
from llava_kd.data.text.stretches import Speller, stretched
from llava_kd.data.text.template_table import TEMPLATES
from llava_kd.distill.taught import Taught
from llava_kd.distill.terms.cross.response_cross import ResponseCross
from llava_kd.distill.terms.seen import Seen
from llava_kd.losses.cross.stretches import Words
from llava_kd.models.mllm import Prediction
from llava_kd.models.words.pairs import pairs_of
from llava_kd.models.words.spelling import spelled

QWEN, LLAMA = qwen_like(), llama_like()
TOKENIZERS = {"qwen": QWEN, "llama": LLAMA}
ANSWERS = ("There are 3 small triangles and 12 squares", "caf\u00e9 \U0001f600\u6f22", "yes\n\nno", "", "7")
PAIRS = [
    (("chatml", "qwen"), ("chatml", "llama")),
    (("vicuna", "llama"), ("vicuna", "qwen")),
    (("vicuna", "qwen"), ("chatml", "llama")),
    (("llava_v1", "qwen"), ("vicuna", "llama")),
]


def talk(answers: tuple[str, ...] = ANSWERS) -> Record:
    turns = []
    for number, answer in enumerate(answers):
        asked = f"{IMAGE_TOKEN}\n" * (number == 0) + f"Part {number}?"
        turns += [Turn("user", asked), Turn("assistant", answer)]
    return Record(id="talk", images=("a.png",), turns=tuple(turns))


def encode(
    template: str, tokenizer: PreTrainedTokenizerFast, record: Record, max_length: int = 900
) -> Encoded:
    return Encoder(
        template=TEMPLATES[template], tokenizer=tokenizer, tokens_per_image=3, max_length=max_length,
        image_token_id=tokenizer.get_vocab()[IMAGE_TOKEN],
    )(record)  # fmt: skip


def speller(template: str, tokenizer: PreTrainedTokenizerFast) -> Speller:
    return Speller(spelled(tokenizer), frozenset({TEMPLATES[template].end_token_id(tokenizer)}))


def both(
    pair: tuple[tuple[str, str], tuple[str, str]], record: Record, lengths: tuple[int, int] = (900, 900)
) -> tuple[list[Encoded], list[Speller]]:
    sides = [(template, TOKENIZERS[name]) for template, name in pair]
    before = [encode(*one, record, length) for one, length in zip(sides, lengths, strict=True)]
    spellers = [speller(*one) for one in sides]
    made = stretched(record, (before[0], before[1]), (spellers[0], spellers[1]))
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(made, before, strict=True))
    return list(made), spellers


def groups(one: Encoded) -> list[list[int]]:
    """Places of each stretch; its tokens lie side by side, and all are targets."""
    assert one.stretches is not None
    found = [
        (one.stretches == number).nonzero().squeeze(1).tolist()
        for number in range(1, int(one.stretches.max()) + 1)
    ]
    for places in found:
        assert places == list(range(places[0], places[-1] + 1))
        assert bool((one.labels[places] != IGNORE_INDEX).all())
    return found


def boundaries(one: Encoded, speller: Speller, answer: int, text: bytes) -> set[int]:
    """Bytes of an answer before which, or after which, a token ends: the oracle, from the end backwards."""
    places = [
        p for p in (one.labels != IGNORE_INDEX).nonzero().squeeze(1).tolist() if one.spans[p, 0] == answer
    ]
    at, found = len(text), {len(text)}
    for place in reversed(places[:-1]):  # the last is the end token
        at -= len(speller.bytes_of[int(one.ids[place])] or b"")
        found.add(at)
    return {at for at in found if at >= 0}


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_stretches_lie_between_neighbouring_boundaries_of_both(pair) -> None:
    (mine, theirs), spellers = both(pair, talk())
    leads = {TEMPLATES[template].answer_lead.encode() for template, _ in pair}
    lead = leads.pop() if len(leads) == 1 else b""  # a common one is compared too
    wanted = []
    for number, answer in enumerate(ANSWERS):
        text = lead + answer.encode()
        common = sorted(
            boundaries(mine, spellers[0], number, text) & boundaries(theirs, spellers[1], number, text)
        )
        wanted += [text[a:b] for a, b in pairwise(common)] + ["end"]
    found: list[bytes | str] = []
    for a, b in zip(groups(mine), groups(theirs), strict=True):
        texts = spellers[0].text(mine, a), spellers[1].text(theirs, b)
        assert texts[0] == texts[1]
        if texts[0] is None:
            assert int(mine.ids[a[0]]) in spellers[0].ends
            assert int(theirs.ids[b[0]]) in spellers[1].ends
        found.append("end" if texts[0] is None else texts[0])
    assert found == wanted
    assert any(len(a) > 1 or len(b) > 1 for a, b in zip(groups(mine), groups(theirs), strict=True))


def test_one_tokenizer_has_a_stretch_a_token() -> None:
    """Also where several tokens are one character."""
    record = talk()
    one = encode("chatml", QWEN, record)
    s = speller("chatml", QWEN)
    mine, theirs = stretched(record, (one, one), (s, s))
    assert all(len(places) == 1 for places in groups(mine))
    assert mine.stretches is not None
    assert theirs.stretches is not None
    assert torch.equal(mine.stretches > 0, one.labels != IGNORE_INDEX)
    assert torch.equal(mine.stretches, theirs.stretches)


def test_a_cut_side_has_the_stretches_that_it_reads() -> None:
    pair = PAIRS[0]
    whole, _ = both(pair, talk())
    length = len(whole[1].ids) - 12
    cut, _ = both(pair, talk(), (900, length))
    kept = len(groups(cut[0]))
    assert cut[1].is_truncated
    assert 0 < kept < len(groups(whole[0]))
    assert groups(cut[0]) == groups(whole[0])[:kept]


def test_answers_of_other_texts_are_refused_by_name() -> None:
    record = talk(("There are 3 squares", "no"))
    mine, theirs = (
        encode("chatml", QWEN, record),
        encode("chatml", LLAMA, talk(("There are 3 circles!", "no"))),
    )
    spellers = speller("chatml", QWEN), speller("chatml", LLAMA)
    with pytest.raises(
        ValueError, match=r"record 'talk': .* answer 1 has 19 characters .* and 20 for the teacher"
    ):
        stretched(record, (mine, theirs), spellers)
    fewer = encode("chatml", LLAMA, talk(("There are 3 squares",)))
    with pytest.raises(ValueError, match="answer 2 has 2 characters for the student and no for the teacher"):
        stretched(record, (mine, fewer), spellers)


def test_nothing_spelled_alike_is_refused_by_name() -> None:
    """One side has unknown tokens alone, and is cut before its end."""
    record = talk(("There are 3 squares",))
    mine, theirs = encode("chatml", QWEN, record), encode("chatml", LLAMA, record)
    mute = Speller([None] * len(LLAMA), frozenset())
    with pytest.raises(ValueError, match=r"record 'talk': student and teacher must spell some .* alike"):
        stretched(record, (mine, theirs), (speller("chatml", QWEN), mute))


def test_an_answer_that_one_side_does_not_read_keeps_its_end() -> None:
    """As where a tokenizer drops all characters of it: the text is in no stretch, and the others are."""
    record = talk(("7", "There are 12"))
    mine, theirs = encode("chatml", QWEN, record), encode("chatml", LLAMA, record)
    targets = (theirs.labels != IGNORE_INDEX).nonzero().squeeze(1).tolist()
    dropped = [p for p in targets if theirs.spans[p, 0] == 0][:-1]
    labels = theirs.labels.clone()
    labels[dropped] = IGNORE_INDEX
    spellers = speller("chatml", QWEN), speller("chatml", LLAMA)
    left, right = stretched(record, (mine, replace(theirs, labels=labels)), spellers)
    whole, _ = stretched(record, (mine, theirs), spellers)
    assert len(groups(left)) == len(groups(right)) == len(groups(whole)) - 1
    assert groups(left) == groups(whole)[1:]


def by_hand(tokens: list[tuple[bytes, int, int]]) -> tuple[Encoded, Speller]:
    """An answer of these tokens alone: what each spells, and the characters of the answer that it covers."""
    ids = torch.arange(len(tokens))
    spans = torch.tensor([[0, first, stop, 0] for _, first, stop in tokens], dtype=torch.int32)
    one = Encoded(ids=ids, labels=ids, visual=torch.zeros(len(tokens), dtype=torch.bool), spans=spans)
    return one, Speller([text for text, *_ in tokens], frozenset())


def test_a_lead_that_both_sides_cut_otherwise_is_in_no_stretch() -> None:
    """Two tokens of the template's line ends against one: the same bytes, and no characters to align by."""
    (mine, one), (theirs, other) = (
        by_hand([(b"\n", 0, 0), (b"\n", 0, 0), (b"a", 0, 1)]),
        by_hand([(b"\n\n", 0, 0), (b"a", 0, 1)]),
    )
    left, right = stretched(talk(("a",)), (mine, theirs), (one, other))
    assert groups(left) == [[2]]
    assert groups(right) == [[1]]


def test_a_letter_that_one_side_writes_in_bytes_is_one_stretch() -> None:
    """Its two bytes cover the same character, and one token of the other side; what follows is apart."""
    (mine, one), (theirs, other) = (
        by_hand([(b"\xc3", 0, 1), (b"\xa9", 0, 1), (b"t", 1, 2)]),
        by_hand([(b"\xc3\xa9", 0, 1), (b"t", 1, 2)]),
    )
    for sides, expected in (((0, 1), [[0, 1], [2]]), ((1, 0), [[0], [1]])):
        both_sides = [((mine, one), (theirs, other))[k] for k in sides]
        encoded, spellers = zip(*both_sides, strict=True)
        assert groups(stretched(talk(("\u00e9t",)), encoded, spellers)[0]) == expected


def test_spelling_is_that_of_the_decoder() -> None:
    for tokenizer in (QWEN, LLAMA):
        names = spelled(tokenizer)
        text = "There are 3 small: caf\u00e9 \U0001f600\n\nno"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert b"".join(names[i] or b"?" for i in ids) == text.encode()
        assert names[tokenizer.get_vocab()[IMAGE_TOKEN]] is None


def test_pairs_are_tokens_of_equal_bytes_and_the_two_ends() -> None:
    ends = TEMPLATES["chatml"].end_token_id(QWEN), TEMPLATES["vicuna"].end_token_id(LLAMA)
    found = pairs_of(QWEN, LLAMA, ends, student_rows=len(QWEN), teacher_rows=len(LLAMA))
    names = spelled(QWEN), spelled(LLAMA)
    for a, b in zip(found.student, found.teacher, strict=True):
        if (a, b) != ends and names[0][a] is not None:
            assert names[0][a] == names[1][b]
    assert ends in set(zip(found.student, found.teacher, strict=True))
    assert len(set(found.teacher)) == len(found.teacher)
    spelled_by_both = {n for n in names[0] if n} & {n for n in names[1] if n}
    assert len(found.student) >= len(spelled_by_both)
    assert sorted(found.student + found.student_alone) == sorted(QWEN.get_vocab().values())
    assert sorted(found.teacher + found.teacher_alone) == sorted(LLAMA.get_vocab().values())
    letter, byte = LLAMA.get_vocab()["e"], LLAMA.get_vocab()["<0x65>"]
    assert letter in found.teacher
    assert byte in found.teacher_alone
    with pytest.raises(ValueError, match="the teacher's head has 3 rows"):
        pairs_of(QWEN, LLAMA, ends, student_rows=len(QWEN), teacher_rows=3)


def words() -> Words:
    ends = TEMPLATES["chatml"].end_token_id(QWEN), TEMPLATES["chatml"].end_token_id(LLAMA)
    found = pairs_of(QWEN, LLAMA, ends, student_rows=len(QWEN), teacher_rows=len(LLAMA))
    columns = (found.student, found.teacher, found.student_alone, found.teacher_alone)
    return Words(
        **dict(
            zip(("student_K", "teacher_K", "student_A", "teacher_B"), map(torch.tensor, columns), strict=True)
        )
    )


def batches(folder: Path, **told) -> list[Batch]:
    """All records of one epoch; the third has a picture that cannot be read."""
    path = write_dataset(folder, [entry(number, rounds=1 + number % 3) for number in range(6)])
    (folder / "images").joinpath(sorted(p.name for p in (folder / "images").iterdir())[2]).write_bytes(b"bad")
    loader = loader_of(
        source=LlavaJson(path, folder),
        student=side(template="chatml", tokenizer=QWEN),
        teacher=side(template="chatml", tokenizer=LLAMA),
        spellers=(speller("chatml", QWEN), speller("chatml", LLAMA)),
        seed=0, global_batch_size=6, max_bad_rate=1.0, **told,
    )  # fmt: skip
    return next(loader.batches(0, 1))


def texts(inputs: Inputs, rows: StretchRows, names: tuple[bytes | None, ...]) -> list[list[bytes | None]]:
    """What the tokens of each stretch spell, from the ids where they are predicted."""
    targets_N = inputs.targets_BT.flatten()
    return in_order(targets_N[rows.first_S], targets_N[rows.further_R], rows.stretch_R, names)


def in_order(
    firsts_S: Tensor, further_R: Tensor, stretch_R: Tensor, names: tuple[bytes | None, ...]
) -> list[list[bytes | None]]:
    found = [[names[i]] for i in firsts_S.tolist()]
    for token, stretch in zip(further_R.tolist(), stretch_R.tolist(), strict=True):
        found[stretch].append(names[token])
    return found


PACKING = Packing(max_tokens=600, max_images=8, packs_per_step=2)
LAYOUTS = {
    "rows": {"micro_batch_size": 6},
    "small": {"micro_batch_size": 2},
    "packed": {"micro_batch_size": 6, "packing": PACKING},
    "unpacked": {"micro_batch_size": 6, "packing": PACKING, "one_record_per_row": True},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_sides_of_a_batch_spell_the_same_stretches(layout: str, tmp_path: Path) -> None:
    for batch in batches(tmp_path, **LAYOUTS[layout]):
        assert batch.teacher is not None
        assert batch.stretches is not None
        mine = texts(batch.student, batch.stretches.student, spelled(QWEN))
        theirs = texts(batch.teacher, batch.stretches.teacher, spelled(LLAMA))
        assert len(mine) > 2
        for a, b in zip(mine, theirs, strict=True):
            assert (a == b == [None]) or b"".join(x or b"?" for x in a) == b"".join(x or b"?" for x in b)


def test_a_term_is_shown_the_tokens_that_stand_there(tmp_path: Path) -> None:
    common = replace(objective_of(losses="fast", response_cross=ResponseCross()).common, words=words())
    table_VD = torch.zeros(900, 8)
    for batch in batches(tmp_path, **LAYOUTS["packed"]):
        student, teacher = (
            said(inputs, table_VD, table_VD) for inputs in (batch.student, batch.teacher_inputs)
        )
        seen = Seen("response_cross", ResponseCross().reads, batch, common, student=student, teacher=teacher)
        mine, theirs = (
            in_order(one.first_tokens_S, one.tokens_R, one.stretch_R, spelled(tokenizer))
            for one, tokenizer in zip(seen.stretches(), (QWEN, LLAMA), strict=True)
        )
        assert len(mine) > 2
        for a, b in zip(mine, theirs, strict=True):
            assert (a == b == [None]) or b"".join(x or b"?" for x in a) == b"".join(x or b"?" for x in b)


def test_records_of_one_stretch_each_stay_apart(tmp_path: Path) -> None:
    """As answers of one word that one side alone joins to the space before it: their end is compared."""
    silent = [entry(number) for number in range(2)]
    for raw in silent:
        raw["conversations"][1]["value"] = "a"
    (batch,) = next(
        loader_of(
            source=LlavaJson(write_dataset(tmp_path, silent), tmp_path),
            student=side(template="vicuna", tokenizer=QWEN),
            teacher=side(template="chatml", tokenizer=LLAMA),
            spellers=(speller("vicuna", QWEN), speller("chatml", LLAMA)),
            seed=0, global_batch_size=2, micro_batch_size=2,
        ).batches(0, 1)
    )  # fmt: skip
    assert batch.stretches is not None
    for rows in (batch.stretches.student, batch.stretches.teacher):
        assert len(rows.first_S) == 2
        assert len(rows.further_R) == 0


@pytest.mark.parametrize("layouts", [("rows", "small"), ("packed", "unpacked")], ids=str)
def test_the_loss_does_not_depend_on_the_layout(layouts: tuple[str, str], tmp_path: Path) -> None:
    """One micro-batch or three, rows of one record or of several: the same sum, gradient and figure."""
    drawn = torch.Generator().manual_seed(0)
    table_V, table_U = (torch.randn(900, 8, generator=drawn) for _ in range(2))
    results = []
    for layout in layouts:
        objective = objective_of(losses="fast", response_cross=ResponseCross())
        objective = replace(objective, common=replace(objective.common, words=words()))
        head_VD = table_V[: len(QWEN)].clone().requires_grad_()
        made = batches(tmp_path / layout, **LAYOUTS[layout])
        counts = objective.counts(made[0])
        for batch in made[1:]:
            counts = counts + objective.counts(batch)
        loss, mass = torch.zeros(()), torch.zeros(())
        for batch in made:
            student = said(batch.student, table_V, head_VD)
            taught = Taught(prediction=said(batch.teacher_inputs, table_U, table_U[: len(LLAMA)]))
            found = objective(student, taught, batch, counts)
            found.loss.backward()
            loss, mass = loss + found.loss.detach(), mass + found.means["response_cross/matched_mass"]
            assert found.means.keys() == {"response_cross", "response_cross/matched_mass"}
        results.append((loss, mass, head_VD.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert 0 < float(results[0][1]) < 1


def said(inputs: Inputs, table_VD: Tensor, head_VD: Tensor) -> Prediction:
    hidden_BTD = table_VD[inputs.input_ids_BT]
    images = inputs.num_images
    return Prediction(
        hidden_BTD=hidden_BTD, projected_IND=torch.zeros(images, 1, 8), head_VD=head_VD, bias_V=None
    )
