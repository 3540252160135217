"""Chat: the streamed pieces are the greedy answer, over several turns and images."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from llava_kd.evaluation.chat import Chat


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"{k}.png" for k in range(2)]
    for k, path in enumerate(paths):
        Image.new("RGB", (40, 30), (90 * k, 40, 200)).save(path)
    return [str(path) for path in paths]


def test_pieces_are_the_greedy_answer_of_the_whole_conversation(
    teacher_dir: Path, pictures: list[str]
) -> None:
    chat = Chat.load(str(teacher_dir), pictures, max_new_tokens=6)
    processor, model = chat.generator.processor, chat.generator.model
    for turn, question in enumerate(("What is this?", "And that?")):
        asked = [*chat.turns, {"role": "user", "content": "<image>\n" * 2 * (turn == 0) + question}]
        text = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=text, images=chat.images, return_tensors="pt")
        expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        answer = "".join(chat.stream(question))
        new = expected[0, inputs["input_ids"].shape[1] :].tolist()
        ends = [i for i, token in enumerate(new) if token in chat.generator.end_ids]
        whole = processor.tokenizer.decode(new[: ends[0] if ends else None], skip_special_tokens=True)
        assert whole.startswith(answer)
        assert len(chat.turns) == 2 * (turn + 1)


def test_a_bad_image_or_an_empty_question_is_refused(teacher_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"cannot read the image .*text.png"):
        Chat.load(str(teacher_dir), [str(tmp_path / "text.png")])
    with pytest.raises(ValueError, match="question is empty"):
        list(Chat.load(str(teacher_dir), []).stream(""))
