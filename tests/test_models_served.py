"""A finished directory in plain transformers: the pixels and ids of training, and the answers of our eval."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import llama_like, qwen_like
from PIL import Image
from stock_answers import stock_answers
from tiny_llava import make_tiny_llava
from tiny_towers import make_language_model, make_tower
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing
from transformers import AutoProcessor, BitImageProcessor, GenerationConfig, PreTrainedTokenizerFast

from llava_kd.assembly.checkpoints import export_to
from llava_kd.assembly.parts.data import same_tower, served
from llava_kd.assembly.parts.models import speak
from llava_kd.assembly.settings import load
from llava_kd.assembly.train import train
from llava_kd.config import DataConfig, StudentConfig, TrainConfig
from llava_kd.data.pixels.images import ImageTransform, decode
from llava_kd.data.sources.conversation import Record, parse_record
from llava_kd.data.text.encoder import Encoder
from llava_kd.data.text.template_table import TEMPLATES
from llava_kd.evaluation.generation.generate import Generator
from llava_kd.evaluation.generation.questions import Question
from llava_kd.models.files.checkpoint import compose, load_stock, save_stock
from llava_kd.models.files.served import end_of_answer

SAMPLED = {"do_sample": True, "temperature": 2.0, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
# By template: a tower that crops or stretches, a language model, and its tokenizer, whose own end is another
# than the template's for Qwen, and which puts <s> first for Llama.
STUDENTS = {
    "chatml": ("siglip", "qwen2", qwen_like, "<|im_end|>"),
    "vicuna": ("clip", "llama", llama_like, "</s>"),
}


def questions_of(shapes: Path, count: int) -> list[dict]:
    """Of several lengths, about pictures that are not square."""
    questions = []
    for k in range(count):
        image = shapes.parent / f"wide{k}.png"
        if not image.exists():
            noise = torch.randint(0, 256, (20 + 3 * k, 70, 3), generator=torch.Generator().manual_seed(k))
            Image.fromarray(noise.to(torch.uint8).numpy()).save(image)
        questions.append({"text": f"What is it{', please' * (k % 4)}?", "image": str(image)})
    return questions


def trained(root: Path, stage: Callable[..., Path], template: str, aspect: str) -> TrainConfig:
    """A student made of parts, as one stage leaves it."""
    tower, kind, tokenizer, _ = STUDENTS[template]
    directory = make_language_model(kind, root / "llm", vocab_size=900)
    tokenizer().save_pretrained(directory)
    GenerationConfig(eos_token_id=[1, 2], **SAMPLED).save_pretrained(directory)
    student = StudentConfig(vision_tower=make_tower(tower, root / "tower"), language_model=str(directory))
    if tower == "clip":
        student = replace(student, vision_feature_select_strategy="default")
    words = [f"--data.image_aspect={aspect}", f"--output_dir={root / 'run'}"]
    config = load(stage("run", distilled=False, max_steps=1, template=template), words)
    config = replace(config, student=student)
    assert train(config) is None
    return config


def ids_of_training(directory: Path, template: str, question: dict) -> list[int]:
    parts = load_stock(str(directory))
    encoder = Encoder(
        template=TEMPLATES[template],
        tokenizer=parts.processor.tokenizer,
        image_token_id=parts.stock.config.image_token_id,
        tokens_per_image=parts.tokens_per_image,
        max_length=1000,
    )
    talk = [{"from": "human", "value": f"<image>\n{question['text']}"}, {"from": "gpt", "value": "It."}]
    record: Record = parse_record({"image": "a.png", "conversations": talk}, 0)
    encoded = encoder(record)
    return encoded.ids[: int((encoded.labels >= 0).nonzero()[0])].tolist()


def ours(directory: Path, questions: list[dict]) -> list[str]:
    generator = Generator.load(directory, device=torch.device("cpu"), max_new_tokens=24)
    asked = [
        Question(id=str(k), text=f"<image>\n{q['text']}", images=(Path(q["image"]),))
        for k, q in enumerate(questions)
    ]
    return generator.answer(asked)


@pytest.mark.parametrize("aspect", ["square", "pad"])
@pytest.mark.parametrize("template", STUDENTS)
def test_stock_code_sees_what_training_saw(
    tmp_path: Path, stage: Callable[..., Path], shapes_dir: Path, template: str, aspect: str
) -> None:
    config = trained(tmp_path, stage, template, aspect)
    questions = questions_of(shapes_dir, 6)
    export_to(str(tmp_path / "run" / "model"), str(tmp_path / "export"), dtype=None, scores=())
    tower = AutoProcessor.from_pretrained(config.student.vision_tower)
    transform = ImageTransform.from_processor(tower, aspect)  # type: ignore[arg-type]
    for directory in (tmp_path / "run" / "model", tmp_path / "export"):
        found = stock_answers(str(directory), questions)
        assert found["missing"] == []
        assert found["eos_token"] == STUDENTS[template][3]
        for question, ids, pixels in zip(questions, found["ids"], found["pixels"], strict=True):
            assert ids == ids_of_training(directory, template, question)
            trained_CHW = transform(decode(Path(question["image"]).read_bytes()))
            difference = (torch.tensor(pixels) - trained_CHW.flatten()).abs().max()
            assert float(difference) < 0.04  # one step of 255 of the widest channel
        assert found["batched"] == found["alone"] == ours(directory, questions)
        assert len(set(found["alone"])) > 1


def test_a_padded_picture_is_seen_whole_where_the_processor_would_crop(tmp_path: Path) -> None:
    """DINOv2's resizes to a larger edge than it keeps; with a square around the picture, nothing is cut."""
    parts = load_stock(str(make_tiny_llava(tmp_path / "m", layers=1)))
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    crops = BitImageProcessor(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}, image_mean=mean, image_std=std
    )
    parts = replace(parts, processor=copy.copy(parts.processor))
    parts.processor.image_processor = crops
    noise = torch.randint(0, 256, (20, 50, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    square = Image.new("RGB", (50, 50), tuple(int(255 * value) for value in mean))
    square.paste(Image.fromarray(noise.numpy()), (0, 15))
    whole_HWC = np.array(square.resize((32, 32), Image.Resampling.BICUBIC))
    expected_CHW = ((torch.from_numpy(whole_HWC) / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(
        2, 0, 1
    )
    trained_CHW = ImageTransform.from_processor(crops, "pad")(noise)
    torch.testing.assert_close(trained_CHW, expected_CHW, rtol=0, atol=1e-5)
    saved = served(parts, DataConfig(path="", image_aspect="pad")).processor.image_processor
    stock_CHW = saved(images=Image.fromarray(noise.numpy()), return_tensors="pt")["pixel_values"][0]
    assert float((stock_CHW - expected_CHW).abs().max()) < 0.04  # one step of 255 of the widest channel


def test_the_saved_ends_and_sides_are_those_of_the_template(
    tmp_path: Path, stage: Callable[..., Path]
) -> None:
    trained(tmp_path, stage, "chatml", "square")
    model = tmp_path / "run" / "model"
    processor = AutoProcessor.from_pretrained(model)
    assert processor.tokenizer.padding_side == "left"
    assert processor.tokenizer.eos_token_id == end_of_answer(processor)
    generation = GenerationConfig.from_pretrained(model)
    assert generation.eos_token_id == processor.tokenizer.eos_token_id
    assert not generation.do_sample
    saved = json.loads((model / "generation_config.json").read_text())
    assert not set(SAMPLED) - {"do_sample"} & set(saved)


def test_a_student_is_saved_whose_language_model_has_a_temperature_without_sampling(
    tmp_path: Path,
) -> None:
    """Vicuna's file has both. transformers reads it, and refuses to write it with another end of answers."""
    tower, kind, tokenizer, _ = STUDENTS["chatml"]
    language_model = make_language_model(kind, tmp_path / "llm", vocab_size=900)
    tokenizer().save_pretrained(language_model)
    greedy = {"do_sample": False, "temperature": 0.9, "top_p": 0.6}
    (language_model / "generation_config.json").write_text(json.dumps(greedy))
    vision_tower = make_tower(tower, tmp_path / "tower")
    parts = compose(vision_tower=vision_tower, language_model=str(language_model))
    speak(parts, TEMPLATES["chatml"])
    save_stock(parts, tmp_path / "model")
    saved = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert saved["do_sample"] is False
    assert not {"temperature", "top_p"} & set(saved)


def test_a_tokenizer_that_was_padding_is_saved_without(tmp_path: Path) -> None:
    parts = load_stock(str(make_tiny_llava(tmp_path / "m", layers=1)))
    tokenizer: PreTrainedTokenizerFast = parts.processor.tokenizer
    tokenizer(["a", "aaa"], padding=True, truncation=True, max_length=2)
    assert json.loads(tokenizer.backend_tokenizer.to_str())["truncation"] is not None
    save_stock(parts, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert saved["padding"] is saved["truncation"] is None
    live = json.loads(tokenizer.backend_tokenizer.to_str())
    assert live["truncation"] is not None


def test_a_tokenizer_that_ends_every_text_is_saved_without(tmp_path: Path) -> None:
    """Its prompts would end before their answer in all tools that read them by the processor."""
    parts = load_stock(str(make_tiny_llava(tmp_path / "m", layers=1)))
    backend = parts.processor.tokenizer.backend_tokenizer
    pad, end = (backend.token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>"))
    written = TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>",
        pair="<|endoftext|> $A <|im_end|> $B <|im_end|>",
        special_tokens=[("<|endoftext|>", pad), ("<|im_end|>", end)],
    )
    backend.post_processor = Sequence([ByteLevel(trim_offsets=False), written])
    save_stock(parts, tmp_path / "out")
    assert parts.processor.tokenizer("a")["input_ids"][-1] == end
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    prompt = processor.apply_chat_template([{"role": "user", "content": "a"}], add_generation_prompt=True)
    bare = processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert processor(text=[prompt])["input_ids"] == [[pad, *bare]]


def test_a_tower_stays_shared_with_a_teacher_whose_processor_does_not_pad(
    tmp_path: Path, stage: Callable[..., Path], student_dir: Path, teacher_dir: Path
) -> None:
    """The student of a stage with `pad` has a processor that pads; the next stage pads for both sides."""
    config = load(stage("run"), ["--data.image_aspect=pad"])
    first = load_stock(str(student_dir))
    save_stock(served(first, config.data), tmp_path / "model")
    student, teacher = load_stock(str(tmp_path / "model")), load_stock(str(teacher_dir))
    assert student.processor.image_processor.to_dict() != first.processor.image_processor.to_dict()
    assert same_tower(config, student, teacher)
    squares = replace(config, data=replace(config.data, image_aspect="square"))
    assert not same_tower(squares, student, teacher)


@pytest.mark.parametrize(
    ("name", "value", "written"),
    [
        ("num_additional_image_tokens", 1, 17),
        ("vision_feature_select_strategy", "default", 15),
        ("patch_size", 16, 4),
    ],
)
def test_a_processor_that_writes_another_count_than_there_are_features_is_refused(
    tmp_path: Path, name: str, value: object, written: int
) -> None:
    directory = make_tiny_llava(tmp_path / "m", layers=1)
    path = directory / "processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(
        ValueError, match=rf"writes {written} image tokens .* has 16 features; set .*'{name}'"
    ):
        load_stock(str(directory))


def test_an_image_token_that_the_model_does_not_read_is_refused(tmp_path: Path) -> None:
    directory = make_tiny_llava(tmp_path / "m", layers=1)
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_token_index": 3}))
    with pytest.raises(ValueError, match=r"'<image>' of id \d+, but its model reads images at id 3"):
        load_stock(str(directory))


def test_the_end_of_an_answer_is_found_for_templates_of_parts_alone(tmp_path: Path) -> None:
    processor = load_stock(str(make_tiny_llava(tmp_path / "m", layers=1))).processor
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_of_answer(processor) == end
    processor.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
        "{{ part['text'] }}{% endfor %}<|endoftext|>{% endfor %}"
    )
    assert end_of_answer(processor) == processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    processor.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    assert end_of_answer(processor) is None
    processor.chat_template = None
    assert end_of_answer(processor) is None
