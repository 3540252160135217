"""Chat: the streamed pieces are the greedy answer, over several turns and images, of any student."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
import torch
from data_samples import llama_like
from PIL import Image
from tiny_towers import make_language_model, make_tower
from transformers import AutoProcessor

from llava_kd.assembly.parts.models import student_parts
from llava_kd.cli import main
from llava_kd.config import StudentConfig
from llava_kd.data.sources.conversation import Record, Turn
from llava_kd.data.text.encoder import Encoder
from llava_kd.data.text.template_table import TEMPLATES
from llava_kd.evaluation.generation.chat import Chat
from llava_kd.models.files.checkpoint import load_stock, save_stock

# As stock LLaVA-1.5 directories have it: lists of parts only.
PARTS_ONLY = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }} "
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
QUESTIONS = ("What are these?", "And now?")


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
        assert whole.lstrip().startswith(answer)
        assert len(chat.turns) == 2 * (turn + 1)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose tokenizer puts <s> first by itself."""
    directory = make_language_model("llama", tmp_path_factory.mktemp("llm") / "llama", vocab_size=700)
    llama_like().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=["timm-convnext", "timm-hybrid", "open-clip", "open-clip-resnet"])
def student(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, language_model: Path
) -> Path:
    """A student with a tower of another library, two of them without a stock class, as a stage writes it."""
    root = tmp_path_factory.mktemp(request.param)
    config = StudentConfig(
        vision_tower=make_tower(request.param, root / "tower"),
        language_model=str(language_model),
    )
    save_stock(student_parts(config, template="vicuna", seed=1), root / "model")
    return root / "model"


def greedy_from_training_tokens(directory: Path, talk: list[Turn], pictures: list[str]) -> str:
    """Twelve tokens after what training makes of the talk, from the whole of it again and again; as text.

    The characters whose bytes are not all there stay out, as in a stream.
    """
    parts = load_stock(str(directory))
    tokenizer, model = parts.processor.tokenizer, parts.stock.eval()
    encoder = Encoder(
        template=TEMPLATES["vicuna"],
        tokenizer=tokenizer,
        image_token_id=model.config.image_token_id,
        tokens_per_image=parts.tokens_per_image,
        max_length=10_000,
    )
    encoded = encoder(Record(id="", images=tuple(pictures), turns=(*talk, Turn("assistant", "?"))))
    asked = sum(turn.role == "assistant" for turn in talk)
    start = int(((encoded.labels >= 0) & (encoded.spans[:, 0] == asked)).nonzero()[0])
    images = [Image.open(path).convert("RGB") for path in pictures]
    pixels_ICHW = parts.processor.image_processor(images, return_tensors="pt")["pixel_values"]
    new: list[int] = []
    while len(new) < 12 and tokenizer.eos_token_id not in new:
        ids_BT = torch.cat([encoded.ids[:start], torch.tensor(new, dtype=torch.long)]).unsqueeze(0)
        with torch.no_grad():
            new.append(int(model(input_ids=ids_BT, pixel_values=pixels_ICHW).logits[0, -1].argmax()))
    texts = [tokenizer.decode(new[:k], skip_special_tokens=True) for k in range(len(new) + 1)]
    return [text for text in texts if not text.endswith("\ufffd")][-1]


def test_a_student_of_any_tower_answers_as_it_was_trained(student: Path, pictures: list[str]) -> None:
    """Two turns about two images, from the very tokens of training: one <s>, images in the first turn."""
    chat = Chat.load(str(student), pictures, max_new_tokens=12)
    talk: list[Turn] = []
    for question in QUESTIONS:
        talk.append(Turn("user", question if talk else "<image>\n" * 2 + question))
        expected = greedy_from_training_tokens(student, talk, pictures)
        pieces = list(chat.stream(question))
        assert "".join(pieces) == expected.lstrip()
        talk.append(Turn("assistant", expected.strip()))
    assert any(turn.text for turn in talk if turn.role == "assistant")
    assert [(turn["role"], turn["content"]) for turn in chat.turns] == [(t.role, t.text) for t in talk]


def test_the_command_talks_line_by_line(
    student: Path, pictures: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat.load(str(student), pictures, max_new_tokens=4)
    expected = ["".join(chat.stream(question)) for question in QUESTIONS]
    words = ["chat", "--model", str(student), "--max_new_tokens=4", "--image", pictures[0]]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTIONS[0]}\n\n{QUESTIONS[1]}\n"))
    assert main([*words, "--image", pictures[1]]) == 0
    assert capsys.readouterr().out == f"{expected[0]}\n{expected[1]}\n"
    assert main([*words, "--image", pictures[1], QUESTIONS[0]]) == 0
    assert capsys.readouterr().out == f"{expected[0]}\n"


def test_a_template_of_parts_alone_is_spoken_over_several_turns(
    teacher_dir: Path, pictures: list[str], tmp_path: Path
) -> None:
    shutil.copytree(teacher_dir, tmp_path / "model")
    processor = AutoProcessor.from_pretrained(teacher_dir)
    processor.chat_template = processor.tokenizer.chat_template = PARTS_ONLY
    processor.save_pretrained(tmp_path / "model")
    chat = Chat.load(str(tmp_path / "model"), pictures, max_new_tokens=3)
    first = "".join(chat.stream("What is this?")).strip()
    text = f"USER: <image>\n<image>\nWhat is this? ASSISTANT: {first} USER: And that? ASSISTANT:"
    images = [Image.open(path).convert("RGB") for path in pictures]
    inputs = processor(text=text, images=images, return_tensors="pt")
    new = chat.generator.model.generate(**inputs, max_new_tokens=3, do_sample=False)
    expected = processor.tokenizer.decode(new[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    answer = "".join(chat.stream("And that?"))
    assert answer
    assert expected.startswith(answer)


def test_places_for_images_may_be_given_but_must_be_as_many(teacher_dir: Path, pictures: list[str]) -> None:
    def chat() -> Chat:
        return Chat.load(str(teacher_dir), pictures, max_new_tokens=2)

    between = chat()
    list(between.stream("Is <image> like <image>?"))
    assert between.turns[0]["content"] == "Is <image> like <image>?"
    with pytest.raises(ValueError, match="has 1 placeholders <image>, but 2 images"):
        list(chat().stream("Is <image> red?"))
    with pytest.raises(ValueError, match="but 0 images belong to it"):
        list(between.stream("And <image>?"))


def test_a_bad_image_or_an_empty_question_is_refused(teacher_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"cannot read the image .*text.png"):
        Chat.load(str(teacher_dir), [str(tmp_path / "text.png")])
    with pytest.raises(ValueError, match="question is empty"):
        list(Chat.load(str(teacher_dir), []).stream(""))


def test_the_space_before_an_answer_is_not_printed(teacher_dir: Path, pictures: list[str]) -> None:
    chat = Chat.load(str(teacher_dir), pictures[:1], max_new_tokens=3)
    tokenizer, head = chat.generator.processor.tokenizer, chat.generator.model.lm_head
    space, letter = (tokenizer.get_vocab()[token] for token in ("\u0120", "a"))
    said = iter([space, letter, letter])

    def only_next(_module: object, _given: object, logits_BTV: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.full(logits_BTV.shape[:2], next(said)), logits_BTV.shape[2])

    head.register_forward_hook(only_next)
    assert list(chat.stream("What?")) == ["a", "a"]
    assert chat.turns[-1]["content"] == "aa"
