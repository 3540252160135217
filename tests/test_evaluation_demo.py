"""Answers, probabilities and maps of the demo against plain transformers; what cannot be asked."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_llava import make_tiny_llava

from llava_kd.evaluation.demo.asking import MAX_QUESTION, Answer, Look, Respondent, Token, ask_all
from llava_kd.evaluation.demo.columns import columns, heat
from llava_kd.evaluation.demo.respondents import load, named

QUESTION = "What is this?"


def png(width: int = 40, height: int = 30) -> bytes:
    buffer = io.BytesIO()
    picture = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    picture.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def respondents(teacher_dir: Path, student_dir: Path) -> list[Respondent]:
    return load([f"teacher={teacher_dir}", f"student={student_dir}"], max_new_tokens=7)


@pytest.fixture(scope="module")
def answers(respondents: list[Respondent]) -> list[Answer]:
    return ask_all(respondents, png(), QUESTION)


def stock_answer(respondent: Respondent) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """Ids, [N, V] probabilities of each step, and [P] mean eager attention of the answer on the picture."""
    processor, model = respondent.generator.processor, respondent.generator.model
    text = processor.apply_chat_template(
        [{"role": "user", "content": f"<image>\n{QUESTION}"}], add_generation_prompt=True, tokenize=False
    )
    given = processor(text=text, images=Image.open(io.BytesIO(png())), return_tensors="pt")
    made = model.generate(
        **given,
        max_new_tokens=7,
        do_sample=False,
        eos_token_id=respondent.generator.end_ids,
        output_scores=True,
        return_dict_in_generate=True,
    )
    start = given["input_ids"].shape[1]
    new = made.sequences[0, start:].tolist()
    kernel = model.model.language_model.config._attn_implementation
    model.model.language_model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            output = model(
                input_ids=made.sequences, pixel_values=given["pixel_values"], output_attentions=True
            )
    finally:
        model.model.language_model.set_attn_implementation(kernel)
    at_picture = given["input_ids"][0] == model.config.image_token_id
    attention_TT = torch.stack([layer[0].mean(0) for layer in output.attentions]).mean(0)
    places = slice(start - 1, start - 1 + len(new))
    looked_P = attention_TT[places, :start][:, at_picture].mean(0)
    return new, torch.stack(made.scores)[:, 0].softmax(-1), looked_P


def test_answers_probabilities_and_maps_are_those_of_plain_transformers(
    respondents: list[Respondent], answers: list[Answer]
) -> None:
    for respondent, answer in zip(respondents, answers, strict=True):
        new, probabilities_NV, looked_P = stock_answer(respondent)
        assert answer.name == respondent.name
        assert answer.text == respondent.generator.decode(torch.tensor([new]))[0]
        assert len(answer.tokens) == len(new)
        assert answer.is_cut == (new[-1] not in respondent.generator.end_ids)
        for token, number, row_V in zip(answer.tokens, new, probabilities_NV, strict=True):
            assert token.probability == pytest.approx(float(row_V[number]), abs=1e-4)
            row_V[number] = -1
            assert token.other_probability == pytest.approx(float(row_V.max()), abs=1e-4)
        assert answer.look is not None
        assert answer.blind == ""
        torch.testing.assert_close(answer.look.patches_RK.flatten(), looked_P, rtol=1e-3, atol=1e-6)
        assert answer.look.on_picture == pytest.approx(float(looked_P.sum()), rel=1e-3)


def test_an_answer_is_the_same_beside_another_and_alone(
    respondents: list[Respondent], answers: list[Answer]
) -> None:
    """Both at once, each asked by several threads, with questions of other lengths between."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        longer = [pool.submit(ask_all, respondents, png(), f"{QUESTION} {'now ' * k}") for k in range(3)]
        again = [pool.submit(ask_all, respondents, png(), QUESTION) for _ in range(3)]
        assert all(not answer.fault for one in longer for answer in one.result())
        for one in again:
            for got, expected in zip(one.result(), answers, strict=True):
                assert (got.text, got.tokens) == (expected.text, expected.tokens)


def test_an_ended_answer_shows_its_end_and_is_not_cut(student_dir: Path) -> None:
    (respondent,) = load([str(student_dir)], max_new_tokens=5)
    head, end = respondent.generator.model.lm_head, respondent.generator.end_ids[0]
    head.register_forward_hook(
        lambda _m, _i, logits_BTV: torch.nn.functional.one_hot(
            torch.full(logits_BTV.shape[:2], end), logits_BTV.shape[2]
        ).float()
    )
    (answer,) = ask_all([respondent], png(), QUESTION)
    assert len(answer.tokens) == 1
    assert not answer.is_cut
    assert answer.text == ""
    assert answer.tokens[0].text == respondent.generator.processor.tokenizer.convert_ids_to_tokens(end)


def test_the_map_of_a_tower_with_a_class_token_leaves_it_out(tmp_path: Path) -> None:
    for strategy, missing in (("full", 0), ("default", 0)):
        directory = make_tiny_llava(tmp_path / strategy, tower="clip", strategy=strategy)
        (answer,) = ask_all(load([str(directory)], max_new_tokens=2), png(), QUESTION)
        assert answer.fault == ""
        assert answer.look is not None
        assert answer.look.patches_RK.shape == (4, 4)
        assert int((answer.look.patches_RK == 0).sum()) == missing
    directory = make_tiny_llava(tmp_path / "dropped", strategy="default")
    (answer,) = ask_all(load([str(directory)], max_new_tokens=2), png(), QUESTION)
    assert answer.look is not None
    assert answer.look.patches_RK[0, 0] == 0
    assert int((answer.look.patches_RK == 0).sum()) == 1


def test_a_model_whose_attention_cannot_be_read_answers_without_a_map(student_dir: Path, monkeypatch) -> None:
    from llava_kd.models import mllm

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("`objective.visual_kl` would read other maps: it adds something; drop the term")

    with monkeypatch.context() as patched:
        patched.setattr(mllm, "check_maps", refuse)
        (respondent,) = load([str(student_dir)], max_new_tokens=2)
    (answer,) = ask_all([respondent], png(), QUESTION)
    assert answer.tokens
    assert answer.look is None
    assert answer.blind == "no map: the attention of this 'qwen2' model cannot be read (it adds something)"
    assert answer.blind.replace("'", "&#x27;") in columns([answer])


@pytest.mark.parametrize(
    ("picture", "question", "message"),
    [
        (png(), "  ", "there is no question"),
        (png(), "<image>", "there is no question"),
        (png(), "a" * (MAX_QUESTION + 1), f"has {MAX_QUESTION + 1} characters, and may have {MAX_QUESTION}"),
        (png(20_000, 5_000), QUESTION, "picture cannot be read: an image may have at most"),
        (png()[:60], QUESTION, "picture cannot be read"),
        (b"no picture", QUESTION, "picture cannot be read"),
        (b"", QUESTION, "picture cannot be read: the image file is empty"),
    ],
)
def test_what_no_model_can_be_asked_is_refused_by_name(
    respondents: list[Respondent], picture: bytes, question: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        ask_all(respondents, picture, question)
    assert "\n" not in str(refused.value)


def test_what_one_model_alone_cannot_be_asked_stands_in_its_column(
    respondents: list[Respondent], student_dir: Path, tmp_path: Path
) -> None:
    (long_winded,) = load([str(student_dir)], max_new_tokens=1_000_000)
    answers = ask_all([respondents[0], long_winded], png(), QUESTION)
    assert answers[0].tokens
    assert "positions: ask a shorter question" in answers[1].fault
    twice = ask_all(respondents, png(), "Is <image> like <image>?")
    assert all("several placeholders <image>" in answer.fault for answer in twice)


def test_models_are_named_as_a_person_calls_them(
    student_dir: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "kd" / "stage2"
    shutil.copytree(student_dir, run / "model")
    found = named([str(run), f"the teacher={teacher_dir}"])
    assert list(found.items()) == [("kd/stage2", run / "model"), ("the teacher", teacher_dir)]


def test_models_that_are_none_are_refused_by_name(student_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 to 4 models, got 5"):
        named([str(student_dir)] * 5)
    with pytest.raises(ValueError, match="two models would be shown as"):
        named([str(student_dir)] * 2)
    with pytest.raises(ValueError, match=r"has no config.json"):
        named([str(tmp_path)])
    with pytest.raises(ValueError, match="no model directory"):
        named([str(tmp_path / "nowhere")])
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="has no finished student yet"):
        named([str(tmp_path)])


def test_columns_show_text_as_text_and_heat_lies_where_the_look_was() -> None:
    patches_RK = torch.zeros(2, 2)
    patches_RK[1, 0] = 0.2
    token = Token(text="<b> ", probability=0.75, other="&", other_probability=0.125)
    picture = Image.new("RGB", (10, 10), (0, 90, 0))
    answer = Answer(
        name="<i>",
        text="<script>",
        tokens=(token,),
        seen=picture,
        look=Look(patches_RK=patches_RK, on_picture=0.2),
    )
    html = columns([answer, Answer(name="b", fault="<no>")])
    assert not {"<script>", "<i>", "<b>", "<no>"} & {
        html[k : k + n] for n in (3, 4, 8) for k in range(len(html))
    }
    assert "75.0%" in html
    assert "12.5%" in html
    assert "20% of its attention is on the picture" in html
    hot = heat(picture, answer.look) if answer.look else picture
    low_left, high_right = hot.getpixel((40, hot.height - 40)), hot.getpixel((hot.width - 40, 40))
    assert isinstance(low_left, tuple)
    assert isinstance(high_right, tuple)
    assert low_left[0] > high_right[0]
    assert low_left[1] < high_right[1]
