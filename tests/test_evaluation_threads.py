"""A fast tokenizer pads as its last caller asked: no two threads may have one between them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_llava import make_tiny_llava

from llava_kd.assembly.parts.data import make_source, side
from llava_kd.assembly.parts.slices import read_slices, slice_scorer
from llava_kd.assembly.settings import load
from llava_kd.assembly.stage import assemble
from llava_kd.evaluation.answers import answers_file, read_lines
from llava_kd.evaluation.generation.generate import Generator, generate
from llava_kd.evaluation.generation.questions import Question
from llava_kd.models.files.checkpoint import load_stock
from llava_kd.parallel.world import World

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


@contextmanager
def beside(work: Callable[[], object]) -> Iterator[list[BaseException]]:
    """`work` again and again in a thread of its own, which takes turns with this one as often as can be."""
    over, failed = threading.Event(), []

    def run() -> None:
        try:
            while not over.is_set():
                work()
        except BaseException as error:
            failed.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield failed
    finally:
        over.set()
        thread.join()
        sys.setswitchinterval(interval)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[Question]:
    path = tmp_path_factory.mktemp("images") / "a.png"
    Image.new("RGB", (8, 8)).save(path)
    return [
        Question(id=str(k), text=f"<image>\nWhat{' now' * (k % 7)}?", images=(path,), truth="red")
        for k in range(150)
    ]


def test_answers_read_ahead_beside_a_thread_that_tokenizes_without_padding(
    questions: list[Question], tmp_path: Path
) -> None:
    directory = make_tiny_llava(tmp_path / "model", hidden=16, heads=2, layers=1)
    generator = Generator.load(directory, device=torch.device("cpu"), max_new_tokens=1)
    quiet = tmp_path / "quiet"
    quiet.mkdir()
    generate(generator, questions, out_dir=quiet, batch_size=3, progress=False)
    texts = ["How many?", "Is there a circle?"]
    with beside(lambda: generator.processor.tokenizer(texts, add_special_tokens=False)) as failed:
        generate(generator, questions, out_dir=tmp_path, batch_size=3, progress=False)
    assert not failed
    assert read_lines(answers_file(tmp_path)) == read_lines(answers_file(quiet))


def test_slices_are_asked_while_the_loader_reads_ahead(stage, shapes_dir: Path) -> None:
    part = {"data": str(shapes_dir / "test.json"), "num_questions": 40}
    evaluate = {"every": 1, "slices": {"test": part}, "batch_size": 2, "max_new_tokens": 1}
    config = load(stage("run", distilled=False, evaluate=evaluate))
    student = load_stock(str(config.student.checkpoint))
    _, engine = assemble(config, ALONE, student, None, say=lambda _: None)
    assert config.evaluate is not None
    score = slice_scorer(config.evaluate, read_slices(config), student, engine)
    source = make_source(config.data)
    records = [source.record(i) for i in range(len(source))]
    encoder = side(student, config.data).encoder()
    expected = encoder.lengths(records)

    def read_ahead() -> None:
        assert encoder.lengths(records[:2]) == expected[:2], "records were padded to one length"

    with beside(read_ahead) as failed:
        for _ in range(12):
            score()
    assert not failed


def test_how_a_tokenizer_was_last_called_is_no_part_of_what_it_is(stage, student_dir: Path) -> None:
    parts = load_stock(str(student_dir))
    reader = side(parts, load(stage("run")).data)
    before = reader.text_fingerprint
    parts.processor.tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=5)
    assert reader.text_fingerprint == before
