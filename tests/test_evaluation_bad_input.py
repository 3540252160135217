"""Evaluation of bad input: one line that says what to do, exit status 2, and no answer lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_benchmarks as tiny
from safetensors.torch import load_file, save_file
from tiny_llava import make_tiny_llava
from tiny_towers import make_language_model, make_tower
from transformers import LlavaProcessor

from llava_kd.cli import main
from llava_kd.data.text.template_table import TEMPLATES
from llava_kd.evaluation.answers import read_lines
from llava_kd.evaluation.benchmarks.base import Quirks
from llava_kd.evaluation.benchmarks.catalogue import BENCHMARKS
from llava_kd.evaluation.benchmarks.run import describe, verify
from llava_kd.evaluation.generation.prompt import model_inputs, render_talk
from llava_kd.evaluation.generation.questions import read_llava_json
from llava_kd.models.files.checkpoint import compose, save_stock

TEN = "vqav2, gqa, vizwiz, scienceqa, textvqa, mme, mmbench, mmbench_cn, pope, mmmu"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("model") / "tiny", layers=1)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tiny.write_gqa(tmp_path / "data")
    tiny.write_pope(tmp_path / "data")
    return tmp_path / "data"


TALK = [{"from": "human", "value": "<image>\nQ?"}, {"from": "gpt", "value": "a"}]


def run(model: Path, root: Path, out: Path, benchmark: str, *more: str) -> int:
    words = [f"--model={model}", f"--benchmark={benchmark}", f"--data={root}", f"--out={out}"]
    return main(["eval", *words, "--max_new_tokens=2", *more])


def refused(model: Path, root: Path, benchmark: str, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """The line that a refused evaluation prints."""
    out = root.parent / "out"
    assert run(model, root, out, benchmark, *more) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("llava-kd ")]
    assert len(lines) == 1
    return lines[0].removeprefix("llava-kd eval: ")


def test_a_missing_file(model: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / "gqa/testdev_balanced_questions.json"
    path.unlink()
    said = refused(model, root, "pope,gqa", capsys)
    assert said == f"gqa needs {path}, which is not there; see eval/README.md for the layout"
    assert not list((root.parent / "out").rglob("answers*"))  # nothing was asked of the one that is whole


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("file", "{}/gqa: Not a directory; a file stands where a folder must be; name another path"),
        ("file/x", "{}/gqa: Not a directory; a file stands where a folder must be; name another path"),
    ],
)
def test_an_out_that_no_folder_can_be(
    model: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str, message: str
) -> None:
    (tmp_path / "file").touch()
    assert run(model, root, tmp_path / out, "gqa") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"llava-kd eval: {message.format(tmp_path / out)}"


def test_an_out_that_is_a_model(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_tiny_llava(tmp_path / "model", layers=1)
    names = sorted(path.name for path in model.iterdir())
    record = {"id": "1", "image": "gqa/images/n0.jpg", "conversations": TALK}
    (root / "test.json").write_text(json.dumps([record]))
    words = [f"--model={model}", f"--data={root / 'test.json'}", f"--out={model}"]
    assert main(["eval", *words]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"llava-kd eval: {model} holds a model, which answers would change; give another --out"
    assert sorted(path.name for path in model.iterdir()) == names
    words[1] = f"--data={root}"
    assert main(["eval", *words]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith(f"no test file {root}; name the benchmarks of a folder with --benchmark")


def test_names_of_benchmarks_may_have_spaces_between(model: Path, root: Path, tmp_path: Path) -> None:
    assert run(model, root, tmp_path / "out", "pope, gqa") == 0


def test_two_releases_of_pope(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """2,910 questions in the random category, as in LLaVA's file, against 3,000 labels."""
    tiny.write_pope(tmp_path, per_category=2)
    rows = [
        {"question_id": k, "image": f"{k // 6}.jpg", "text": f"Is there a thing{k % 6} in the image?"}
        for k in range(3000)
    ]
    questions = [
        json.loads(line) for line in (tmp_path / "pope/llava_pope_test.jsonl").read_text().splitlines()
    ]
    others = [row for row in questions if row["category"] != "random"]
    asked = [row | {"question_id": 9000 + k, "category": "random"} for k, row in enumerate(rows[:2910])]
    tiny.write_lines(tmp_path / "pope/llava_pope_test.jsonl", [*asked, *others])
    labels = [row | {"label": ("yes", "no")[row["question_id"] % 2]} for row in rows]
    tiny.write_lines(tmp_path / "pope/coco/coco_pope_random.json", labels)
    said = refused(model, tmp_path, "pope", capsys)
    assert said == (
        f"{tmp_path}/pope/llava_pope_test.jsonl and {tmp_path}/pope/coco/coco_pope_random.json are of "
        "different releases: 90 labels have no question. The random category has 2,910 rows in one and "
        "3,000 in another; take the labels of POPE commit e3e39262 for LLaVA's question file"
    )
    tiny.write_lines(tmp_path / "pope/coco/coco_pope_random.json", labels[:2910])
    assert len(BENCHMARKS["pope"].read(tmp_path, Quirks())) == 2910 + len(others)


def test_annotations_without_answer_id(tmp_path: Path) -> None:
    """Ten plain humans stay ten: the official code makes one of them and scores 0. It is noted."""
    tiny.write_vqav2_val(tmp_path, answer_ids=False)
    benchmark = BENCHMARKS["vqav2_val"]
    questions = benchmark.read(tmp_path, Quirks())
    assert benchmark.score is not None
    right = {"262148000": "2", "262148001": "yes", "262148002": "Red bus."}
    score = benchmark.score(tmp_path, questions, right, Quirks())
    assert score.value == 100
    (note,) = [note for note in score.notes if "answer_id" in note]
    assert note.startswith("3 annotations lack answer_id")


def test_pope_takes_no_lost_picture_for_a_yes(model: Path, root: Path) -> None:
    """Its rule reads an empty answer as yes, which half of its questions have."""
    (root / "pope/val2014/COCO_val2014_000000000000.jpg").unlink()
    out = root.parent / "pope"
    assert run(model, root, out, "pope") == 0
    lost = {a["id"] for a in read_lines(out / "pope/answers.jsonl") if "error" in a}
    scored = [json.loads(line) for line in (out / "pope/scored.jsonl").read_text().splitlines()]
    found = {(item["id"] in lost, item["reading"], item["score"]) for item in scored if item["id"] in lost}
    assert len(lost) == 2
    assert found == {(True, "none", 0.0)}


@pytest.mark.parametrize("is_there", [True, False], ids=["cut", "missing"])
def test_a_picture_that_cannot_be_read_counts_as_wrong_and_is_asked_again_once_mended(
    model: Path,
    root: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    is_there: bool,
) -> None:
    path, out = root / "gqa/images/n2.jpg", root.parent / "out"
    whole = path.read_bytes()
    path.write_bytes(whole[:40]) if is_there else path.unlink()
    assert run(model, root, out, "gqa") == 0
    told = "1 of 3 questions have no readable picture and count as wrong"
    assert told in caplog.text
    assert f"question '202': cannot read {path}: " in caplog.text
    assert f"- gqa: {told}" in capsys.readouterr().out
    before = {answer["id"]: answer for answer in read_lines(out / "gqa/answers.jsonl")}
    assert [name for name, answer in before.items() if "error" in answer] == ["202"]
    assert before["202"]["answer"] == ""
    path.write_bytes(whole)
    assert run(model, root, out, "gqa") == 0
    after = {answer["id"]: answer for answer in read_lines(out / "gqa/answers.jsonl")}
    assert "error" not in after["202"]
    assert {**before, "202": after["202"]} == after
    assert told not in capsys.readouterr().out


def test_an_image_root_without_any_image_stops_before_the_model_is_loaded(
    model: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (root / "gqa/images").iterdir():
        path.unlink()
    (model / "model.safetensors").rename(model / "aside.safetensors")
    try:
        said = refused(model, root, "gqa", capsys)
    finally:
        (model / "aside.safetensors").rename(model / "model.safetensors")
    assert "all 3 images are missing; check the image root:" in said


def test_one_row_of_mmbench_without_a_picture(model: Path, tmp_path: Path) -> None:
    tiny.write_mmbench(tmp_path)
    table = next((tmp_path / "mmbench").glob("*.tsv"))
    text = table.read_text(encoding="utf-8")
    picture = next(word for word in text.split("\t") if len(word) > 64 and " " not in word)
    assert "mmbench: ready" in describe(verify("mmbench", tmp_path))
    table.write_text(text.replace(picture, picture[:-9], 1), encoding="utf-8")
    assert "1 images cannot be read: question" in describe(verify("mmbench", tmp_path))
    assert run(model, tmp_path, tmp_path / "out", "mmbench") == 0
    assert sum("error" in answer for answer in read_lines(tmp_path / "out/mmbench/answers.jsonl")) >= 1


def test_a_second_benchmark_joins_the_table_of_the_first(
    model: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = root.parent / "out"
    assert run(model, root, out, "gqa") == run(model, root, out, "pope") == 0
    head, _, own, *_ = (out / "table.md").read_text().splitlines()
    cells = dict(zip(head.split(" | "), own.split(" | "), strict=True))
    assert "-" not in (cells["GQA"].strip("*"), cells["POPE"].strip("*"))
    assert set(json.loads((out / "summary.json").read_text())["values"]) == {"gqa", "pope"}
    other = make_tiny_llava(root.parent / "runs/first/model", layers=1, seed=9)
    assert run(other, root, out, "gqa") == 2  # answers of another model are not mixed in
    assert run(other, root, root.parent / "other", "pope", "--limit=2") == 0
    head, _, own, *_ = (root.parent / "other/table.md").read_text().splitlines()
    cells = dict(zip(head.split(" | "), own.split(" | "), strict=True))
    assert "(first 2 only)" in cells["POPE"]
    assert "runs/first" in own
    assert json.loads((root.parent / "other/summary.json").read_text())["values"] == {}


@pytest.mark.parametrize("kind", ["llava_next", "qwen2_5_vl", "paligemma", "llava_onevision"])
def test_another_family_is_not_sent_to_convert(
    kind: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps({"model_type": kind}))
    said = refused(tmp_path / "model", root, "pope", capsys)
    assert said.endswith(f"got '{kind}', a family that is not supported")


def test_what_a_hub_id_or_a_gguf_folder_needs(root: Path, tmp_path: Path, capsys) -> None:
    said = refused(Path("some-org/some-model"), root, "pope", capsys)
    assert "as an id of the hub it is neither in the cache" in said
    assert "hf download some-org/some-model --local-dir DIR" in said
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model-q4.gguf").write_bytes(b"GGUF")
    assert "GGUF model of llama.cpp" in refused(tmp_path / "model", root, "pope", capsys)


def test_a_model_that_lacks_weights_answers_nothing(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers would draw them at random."""
    directory = make_tiny_llava(tmp_path / "half", layers=1)
    state = load_file(directory / "model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if "multi_modal_projector" not in name}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 4 weights" in refused(directory, root, "pope", capsys)
    assert main(["chat", f"--model={directory}", "What?"]) == 2
    assert "lacks 4 weights" in capsys.readouterr().err


def test_a_model_of_captions_alone_says_so(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = make_tiny_llava(tmp_path / "first", layers=1)
    processor = LlavaProcessor.from_pretrained(directory)
    processor.chat_template = TEMPLATES["plain"].chat_template_for(processor.tokenizer)
    processor.save_pretrained(directory)
    assert "trained on captions alone" in refused(directory, root, "pope", capsys)
    assert not list((root.parent / "out").rglob("answers.jsonl"))
    assert main(["chat", f"--model={directory}", "What?"]) == 2
    assert "trained on captions alone" in capsys.readouterr().err


def test_a_template_that_refuses_a_system_turn_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As those of Gemma and Mistral do; the record with one is not the first."""
    directory = make_tiny_llava(tmp_path / "m", layers=1)
    processor = LlavaProcessor.from_pretrained(directory)
    own = processor.chat_template
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    talk = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "a"}]
    brief = [{"from": "system", "value": "Be brief."}, *talk]
    path = tmp_path / "test.json"
    path.write_text(json.dumps([{"id": "a", "conversations": talk}, {"id": "b", "conversations": brief}]))
    for out, template, said in (
        ("a", refuses + own, "fails on a talk of system, user: no system role"),
        ("b", "{% for m in messages %}{{ m.content", "fails on a talk of user: unexpected end of template"),
    ):
        processor.chat_template = template
        processor.save_pretrained(directory)
        assert main(["eval", f"--model={directory}", f"--data={path}", f"--out={tmp_path / out}"]) == 2
        assert said in capsys.readouterr().err
    assert main(["chat", f"--model={directory}", "What?"]) == 2
    assert "fails on a talk of user" in capsys.readouterr().err


def test_answers_cut_in_the_middle_of_a_line(
    model: Path, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As a kill leaves them: the whole lines stay as they are, the cut one is asked again."""
    out = root.parent / "out"
    assert run(model, root, out, "gqa") == 0
    answers = out / "gqa/answers.jsonl"
    whole = answers.read_bytes()
    lines = whole.splitlines(keepends=True)
    answers.write_bytes(b"".join(lines[:-1]) + lines[-1][:25])
    assert run(model, root, out, "gqa") == 0
    assert answers.read_bytes() == whole
    assert (
        f"{answers} ends in the middle of a line (25 bytes): the line is dropped, "
        "its question is answered again" in caplog.text
    )


def test_an_unknown_benchmark_lists_the_ten(
    model: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(model, root, "pope,mmvet", capsys)
    assert said.startswith(f"no benchmark 'mmvet'; the ten are {TEN}, others ")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "no model directory {}"),
        ({}, "{} has no config.json; give a directory that save_pretrained wrote"),
        (
            {"config.json": '{"model_type": "llava_qwen2"}'},
            "{} must hold a stock LLaVA model (model_type 'llava' in config.json), got 'llava_qwen2'; "
            "run `llava-kd convert` on a TinyLLaVA or LLaVA-1.5 directory first",
        ),
        ({"config.json": '{"model_type": "llava"}'}, "{} has no .safetensors weights"),
        ({"config.json": "{"}, "{}/config.json is not a model's configuration ("),
    ],
    ids=["nothing", "empty", "original LLaVA", "no weights", "half a config"],
)
def test_a_model_directory_that_is_not_stock(
    files: dict[str, str] | None, message: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "model"
    if files is not None:
        directory.mkdir()
        for name, text in files.items():
            (directory / name).write_text(text)
    said = refused(directory, root, "pope", capsys)
    assert said.startswith(message.format(directory))


def test_a_student_with_an_adapted_tower_answers(root: Path, tmp_path: Path) -> None:
    """No stock class holds its tower, but this package does."""
    line = make_tower("timm-convnext", tmp_path)
    llm = make_language_model("qwen2", tmp_path / "llm")
    parts = compose(vision_tower=line, language_model=str(llm))
    parts.processor.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    save_stock(parts, tmp_path / "student")
    assert run(tmp_path / "student", root, tmp_path / "out", "gqa") == 0
    assert len(read_lines(tmp_path / "out/gqa/answers.jsonl")) == 3


def test_the_word_image_in_a_question_without_picture_is_asked_as_text(model: Path, tmp_path: Path) -> None:
    words = "What does the word <image> mean?"
    talk = [{"from": "human", "value": words}, {"from": "gpt", "value": "a picture"}]
    path, out = tmp_path / "test.json", tmp_path / "out"
    path.write_text(json.dumps([{"id": "word", "conversations": talk}]))
    assert main(["eval", f"--model={model}", f"--data={path}", f"--out={out}", "--max_new_tokens=2"]) == 0
    [answer] = read_lines(out / "answers.jsonl")
    assert answer["question"] == words
    assert "error" not in answer
    processor = LlavaProcessor.from_pretrained(model)
    [question] = read_llava_json(path)
    prompt = render_talk(processor, question.messages, has_images=False)
    [ids] = model_inputs(processor, [prompt], [])["input_ids"]
    assert processor.image_token_id not in ids
    assert words in processor.tokenizer.decode(ids)
