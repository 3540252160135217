"""Planted codes and their exposure: against a count by hand and the stock model itself.

Shape legend: T tokens, V rows of a head.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import llama_like, qwen_like
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava_kd.cli import main
from llava_kd.curation.canary import (
    CHANCE_BITS,
    Canary,
    Planted,
    by_beginning,
    candidates,
    exposure,
    make,
    spelled,
)
from llava_kd.data.sources.conversation import parse_record
from llava_kd.data.text.encoder import Encoder
from llava_kd.data.text.private import Tagger
from llava_kd.data.text.template_table import TEMPLATES


def test_exposure_counts_how_many_are_likelier() -> None:
    assert exposure([-1.0, -2.0, -3.0, -4.0]) == (1, 2.0)
    assert exposure([-3.0, -2.0, -1.0, -4.0]) == (3, pytest.approx(2 - math.log2(3)))
    assert exposure([-1.0] * 4) == (2.5, pytest.approx(2 - math.log2(2.5)))  # all alike: the middle rank
    with pytest.raises(ValueError, match="likelihoods must be finite numbers"):
        exposure([0.0, math.nan])


def test_codes_that_nobody_learned_are_exposed_by_chance() -> None:
    draw = random.Random(0)
    bits = [exposure([draw.random() for _ in range(1000)])[1] for _ in range(2000)]
    assert sum(bits) / len(bits) == pytest.approx(CHANCE_BITS, abs=0.1)


def test_the_same_seed_plants_the_same_codes_and_no_two_are_alike() -> None:
    planted = make(50, digits=2, seed=4)
    assert planted == make(50, digits=2, seed=4) != make(50, digits=2, seed=5)
    assert (
        len({one.code for one in planted.canaries}) == len({one.question for one in planted.canaries}) == 50
    )
    with pytest.raises(ValueError, match=r"--canaries \(11\) must be at most the number of codes, 10"):
        make(11, digits=1, seed=0)


def test_candidates_are_every_code_or_as_many_as_asked() -> None:
    (one,) = make(1, digits=2, seed=0).canaries
    every = candidates(one, 2, 10_000, 0)
    assert every[0] == one.code
    assert sorted(every) == [f"{n:02d}" for n in range(100)]
    for most in (2, 30, 99):
        some = candidates(one, 2, most, 0)
        assert len(some) == len(set(some)) == most
        assert some[0] == one.code


@pytest.mark.parametrize("make_tokenizer", [qwen_like, llama_like])
def test_a_spelling_ends_with_its_code_and_the_planted_span_is_the_code(make_tokenizer) -> None:
    tokenizer = make_tokenizer()
    encoder = Encoder(
        template=TEMPLATES["vicuna"],
        tokenizer=tokenizer,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tokens_per_image=4,
        max_length=200,
    )
    (one,) = make(1, digits=4, seed=1).canaries
    encoded = encoder(one.asked("0173"))
    ids = spelled(encoded, len(one.before) + 4)
    assert tokenizer.decode(ids).strip() == "The code is 0173"
    record = parse_record(one.entry(0), 0)
    scored = Tagger(reads_spans=True)(record, encoder(record))
    assert scored.scores is not None
    assert tokenizer.decode(scored.ids[scored.scores > 0]).strip() == one.code
    short = replace(encoded, labels=encoded.labels[:-4], ids=encoded.ids[:-4], spans=encoded.spans[:-4])
    with pytest.raises(ValueError, match="does not fit into --max_length"):
        spelled(replace(short, is_truncated=True), len(one.before) + 4)


def test_spellings_that_share_a_beginning_are_served_together() -> None:
    groups = by_beginning([(1, 2, 3), (1, 2, 4), (1, 5), (1, 2, 5)])
    assert groups == {(1, 2): [0, 1, 3], (1,): [2]}


# The commands ----


def plant(shapes_dir: Path, out: Path, *words: str) -> int:
    return main(["canary", "insert", f"--data={shapes_dir / 'instructions.json'}", f"--out={out}", *words])


def test_canaries_stand_behind_the_records_and_cannot_be_planted_twice(
    shapes_dir: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "planted.json"
    assert plant(shapes_dir, out, "--canaries=3", "--repeats=2") == 0
    before = json.loads((shapes_dir / "instructions.json").read_text())
    after = json.loads(out.read_text())
    assert after[: len(before)] == before
    planted = Planted.read(tmp_path / "planted.canaries.json")
    copies = after[len(before) :]
    assert len(copies) == 6
    assert len({entry["id"] for entry in copies}) == 6
    for entry, one in zip(copies, planted.canaries * 2, strict=True):
        answer, (span,) = entry["conversations"][1]["value"], entry["private_spans"]
        assert answer[span["start"] : span["stop"]] == one.code
    assert plant(shapes_dir, out) != 0
    assert "the output must be new" in capsys.readouterr().err
    again = ["canary", "insert", f"--data={out}", f"--out={tmp_path / 'again.json'}"]
    assert main(again) != 0
    assert "use the original data" in capsys.readouterr().err


def ask(student_dir: Path, path: Path, out: Path, *words: str) -> dict:
    common = ["canary", "exposure", f"--model={student_dir}", f"--canaries={path}", f"--out={out}"]
    assert main([*common, "--template=vicuna", "--device=cpu", *words]) == 0
    return json.loads(out.read_text())


def log_p_of_stock(directory: Path, one: Canary, image: Path | None) -> list[float]:
    """Of every code, by the stock model and processor, a text at a time."""
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(directory)
    asked = one.question if image is None else f"<image>\n{one.question}"
    found = []
    system = TEMPLATES["vicuna"].render(parse_record(one.entry(0), 0).turns, eos_token="<|im_end|>")[0].text
    prefix = system.split("USER:")[0]
    for code in candidates(one, len(one.code), 10**9, 0):
        text = f"{prefix}USER: {asked} ASSISTANT: {one.before}{code}"
        picture = {} if image is None else {"images": Image.open(image)}
        inputs = processor(text=text, return_tensors="pt", **picture)
        with torch.no_grad():
            log_p_TV = model(**inputs).logits[0].log_softmax(1)
        ids, width = inputs["input_ids"][0], len(one.code)
        found.append(sum(float(log_p_TV[-k - 1, ids[-k]]) for k in range(1, width + 1)))
    return found


@pytest.mark.parametrize("rendered", [False, True])
def test_exposure_is_that_of_the_stock_model(
    shapes_dir: Path, student_dir: Path, tmp_path: Path, rendered: bool
) -> None:
    out, words = tmp_path / "planted.json", ["--canaries=2", "--digits=2", f"--images={tmp_path}"]
    assert plant(shapes_dir, out, *words, *(["--render"] if rendered else [])) == 0
    path = tmp_path / "planted.canaries.json"
    found = ask(student_dir, path, tmp_path / "found.json")
    for one in Planted.read(path).canaries:
        picture = None if one.blank is None else tmp_path / one.blank
        rank, bits = exposure(log_p_of_stock(student_dir, one, picture))
        assert found["canaries"][one.id]["rank"] == rank
        assert found["canaries"][one.id]["exposure"] == pytest.approx(bits)
    assert found["candidates"] == 100


def test_a_rendered_code_is_in_its_picture_and_not_in_the_blank_one(shapes_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "planted.json"
    assert plant(shapes_dir, out, "--canaries=2", "--render", f"--images={tmp_path}") == 0
    for one in Planted.read(tmp_path / "planted.canaries.json").canaries:
        assert one.image is not None
        assert one.blank is not None
        has_ink = [
            bool((np.asarray(Image.open(tmp_path / name).convert("L"))[45:] < 100).any())
            for name in (one.image, one.blank)
        ]
        assert has_ink == [True, False]
        assert json.loads(out.read_text())[-1]["image"].startswith("canaries/")


def test_fewer_candidates_are_said_to_be_drawn(shapes_dir: Path, student_dir: Path, tmp_path, capsys) -> None:
    assert plant(shapes_dir, tmp_path / "p.json", "--canaries=1", "--digits=3") == 0
    found = ask(student_dir, tmp_path / "p.canaries.json", tmp_path / "f.json", "--candidates=16")
    assert found["candidates"] == 16
    said = capsys.readouterr().out
    assert "chance 1.44, at most 4.00 (16 candidates each, drawn from 1000)" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "writes it next to its data"),
        ("[]", "format must be 1"),
        ('{"format": 1, "digits": 4, "canaries": []}', "it needs canaries"),
        ('{"format": 1, "digits": 4, "canaries": [{"id": "a"}]}', "holds no canaries"),
        (
            '{"format": 1, "digits": 4, '
            '"canaries": [{"id": "a", "question": "q", "before": "b", "code": "12"}]}',
            "the code of a must have 4 digits",
        ),
    ],
)
def test_a_file_without_canaries_is_named(
    student_dir: Path, tmp_path: Path, capsys, text: str | None, message: str
) -> None:
    path = tmp_path / "x.canaries.json"
    if text is not None:
        path.write_text(text)
    assert main(["canary", "exposure", f"--model={student_dir}", f"--canaries={path}"]) != 0
    assert message in capsys.readouterr().err
