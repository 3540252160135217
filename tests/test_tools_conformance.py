"""Small students in other people's tools: the answers of `llava-kd eval`, and the page about it.

Run with -m slow: the students are trained, about six minutes of a core, and each tool is installed in an
environment of its own, below `LLAVA_KD_TOOLS` (by default `.tools`), where both are found again. What was
measured is left there in `results`, in the form of `benchmarks/results`; from the files in that folder
`python tests/tools/conformance.py` makes the page. The tools that it is given it measures itself.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import shlex
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "tools"), str(ROOT / "tests" / "tools" / "clients")]
import quantised  # noqa: E402
import with_transformers_serve  # noqa: E402
import with_vllm  # noqa: E402
from conformance import (  # noqa: E402
    AS_IT_IS,
    BEGIN,
    END,
    ENOUGH,
    PAGE,
    TOOLS,
    Case,
    Reference,
    compared,
    measured,
    read_results,
    table,
    write_result,
)
from environments import PINS, NotRunError, python_of  # noqa: E402
from openai_requests import of_server  # noqa: E402
from protocol import last_error  # noqa: E402
from questions import BATCHED, COUNT, KINDS, NONE, ONE, TWO  # noqa: E402
from students import make_all, make_data, merges  # noqa: E402

# Tool, student, weights, kind: fewer answers are the same, for the reason that the page gives. Students are
# trained anew on each machine, and one that answers nearly by chance may be here on one and not on another.
STUDENTS = ("siglip-qwen2", "clip-qwen3", "siglip-llama")
KNOWN = {
    *(("openvino", student, "float32", BATCHED) for student in STUDENTS),
    *(("lmms_eval", student, "float32", NONE) for student in STUDENTS),
    *(("llama_cpp", "clip-qwen3", "float32", kind) for kind in KINDS if kind != NONE),
    *(("llama_cpp", "clip-qwen3", weights, ONE) for weights in ("float16", "bfloat16", "q8_0", "q4_0")),
    ("lmms_eval", "siglip-llama", "float32", TWO),
}
ENOUGH_OF_FEW_BITS = 40  # rounding turns answers that were close; CLIP read in the wrong order agrees in 20


FOLDER = Path(os.environ.get("LLAVA_KD_TOOLS", ROOT / ".tools")) / "students"


def key_of(tool: str, row: dict) -> tuple[str, str, str, str]:
    return tool, row["student"], row["weights"], row["questions"]


def short(tool: str, result: dict) -> set[tuple[str, str, str, str]]:
    """Rows with too few of the same answers, but those whose pictures the client should have sized."""
    rows = [row for row in result["rows"] if row["questions"] != AS_IT_IS]
    return {key_of(tool, row) for row in rows if row.get("alike", 0) < enough(tool, row["weights"])}


def enough(tool: str, weights: str) -> int:
    return ENOUGH_OF_FEW_BITS if tool == "bitsandbytes" or weights in ("q8_0", "q4_0") else ENOUGH


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The students, and what is the same for every tool: their exports and the answers of `llava-kd eval`."""
    return Reference(make_all(FOLDER), FOLDER / "data", tmp_path_factory.mktemp("reference"))


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("tool", TOOLS)
def test_sixty_answers_of_each_kind_are_those_of_eval(reference: Reference, tool: str) -> None:
    result = measured(tool, reference, "pytest -m slow -k conformance")
    write_result(FOLDER.parent / "results", result)
    if "not_run" in result:
        pytest.skip(f"not run: {result['not_run']}")
    assert short(tool, result) <= KNOWN, result["rows"]
    assert all(row["of"] == COUNT for row in result["rows"])


def test_the_table_on_the_page_is_that_of_the_files() -> None:
    page = PAGE.read_text()
    assert page.partition(BEGIN)[2].partition(END)[0].strip() == table(read_results())


def test_what_is_short_on_the_page_is_known() -> None:
    results = read_results()
    assert results.keys() <= TOOLS.keys()
    found = set().union(*(short(name, result) for name, result in results.items()))
    assert found <= KNOWN
    for result in results.values():
        assert all(row["of"] == COUNT for row in result["rows"])
        # A student that says the same to everything would agree with anything.
        counts = [row["different_answers_here"] for row in result["rows"] if "alike" in row]
        assert min(counts, default=COUNT) >= 8
        assert bool(result["rows"]) != ("not_run" in result)


def test_answers_are_compared_one_by_one_and_an_error_is_no_pass() -> None:
    case = Case(student="a", weights="float32", kind=KINDS[0], asked=KINDS[0])
    row = compared(case, {"answers": ["red", "two", "red"]}, ["red", "red", "two"])
    assert (row["alike"], row["of"], row["different_answers_here"]) == (1, 3, 2)
    assert row["differences"] == [{"there": "two", "here": "red"}, {"there": "red", "here": "two"}]
    with pytest.raises(ValueError, match="argument 2 is longer"):
        compared(case, {"answers": ["red"]}, ["red", "red"])
    broken = compared(case, {"error": "OSError: gone"}, ["red", "red"])
    assert short("vllm", {"rows": [broken]}) == {("vllm", "a", "float32", KINDS[0])}
    close = broken | {"alike": 45, "weights": "q4_0"}
    assert not short("llama_cpp", {"rows": [close]})
    assert short("llama_cpp", {"rows": [close | {"weights": "float16"}, close | {"alike": 39}]})
    assert f"| vLLM | a | float32 | error |{' - |' * (len(KINDS) - 1)}" in table({"vllm": _result([broken])})


def test_errors_are_shortened_to_what_they_say() -> None:
    log = '2026 | starts\nTraceback (most recent call last):\n  File "/home/me/x.py", line 3\n    y[0]\n'
    assert last_error(f"{log}IndexError: out of range\n\nasked: 0%|   | 0/1\n") == "IndexError: out of range"
    assert last_error(f"{log}pkg.OddError: a\n  more\nKeyError: {'b' * 400}") == f"KeyError: {'b' * 290}"
    assert last_error("one\n\ntwo\n   three") == "two"
    assert last_error(" \n") == "it said nothing"


def _result(rows: list[dict]) -> dict:
    return {"rows": rows, "versions": {}, "date": "today", "commit": "here", "command": "none"}


def test_a_tool_that_cannot_be_installed_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAVA_KD_LLAMA_CPP", raising=False)
    monkeypatch.setenv("LLAVA_KD_TOOLS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(NotRunError, match=r"llama_cpp.txt cannot be installed: .*xllamacpp"):
        python_of("llama_cpp")
    assert not list(tmp_path.glob("*/installed"))
    told = table({"llama_cpp": {"not_run": "no\nwheel", "rows": [], "date": "today"}})
    assert f"| llama.cpp |  |  |{' not run |' * len(KINDS)}" in told
    assert "- llama.cpp: not run, today: no wheel" in told
    assert f"| vLLM |  |  |{' not run |' * len(KINDS)}" in told


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_fewer_bits_lose_what_the_table_says(tmp_path: Path) -> None:
    """Of a quarter of its questions, so within 5 %."""
    told = json.loads(quantised.RESULT.read_text())["rows"]
    data = make_data(FOLDER)
    records = quantised.test_set(data)[::4]
    found = quantised.measured(Reference(quantised.STUDENT, data, tmp_path), records)["rows"]
    if missing := [row["not_run"] for row in found if "not_run" in row]:
        pytest.skip(f"not run: {missing}")
    for there, here in zip(told, found, strict=True):
        assert there["bits"] == here["bits"]
        assert abs(there["right"] / there["questions"] - here["right"] / here["questions"]) < 0.05, here


def test_the_table_of_bits_is_that_of_its_file() -> None:
    page, result = quantised.PAGE.read_text(), json.loads(quantised.RESULT.read_text())
    assert page.partition(quantised.BEGIN)[2].partition(quantised.END)[0].strip() == quantised.table(result)
    there = {"answers": ["Red.", "two", "no", "left"]}
    records = [{"conversations": [{}, {"value": value}]} for value in ("red", "one", "no", "left")]
    before = [True, True, False, False]
    assert quantised.compared(there, records, before) == {"right": 3, "lost": 1, "won": 2}
    assert quantised.compared({"error": "gone"}, records, before) == {"error": "gone"}


@pytest.mark.parametrize("tool", sorted(TOOLS.keys() - {"transformers"}))
def test_every_package_of_a_tool_is_pinned(tool: str) -> None:
    lines = (PINS / f"{tool}.txt").read_text().splitlines()
    assert lines
    assert all(line.count("==") == 1 and line.partition("==")[2] for line in lines), lines


def shown(language: str) -> list[str]:
    """Blocks of the serving page."""
    parts = (ROOT / "docs" / "serving.md").read_text().split(f"```{language}\n")[1:]
    return [part.partition("```")[0] for part in parts]


def test_the_servers_of_the_serving_page_are_started_as_the_suite_starts_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commands = [shlex.split(block) for block in shown("bash")]
    assert ["python", *with_vllm.SERVED] in commands
    assert ["transformers", *with_transformers_serve.SERVED] in commands

    class Settings(SimpleNamespace):
        def __init__(self) -> None:
            super().__init__(model=SimpleNamespace(), mmproj=SimpleNamespace(), cpuparams=SimpleNamespace())

    started: list[Settings] = []
    server = SimpleNamespace(listening_address="http://here")
    stub = SimpleNamespace(CommonParams=Settings, Server=lambda settings: started.append(settings) or server)
    monkeypatch.setitem(sys.modules, "xllamacpp", stub)
    monkeypatch.delitem(sys.modules, "llama_cpp_requests", raising=False)
    (code,) = [block for block in shown("python") if "xllamacpp" in block]
    exec(code, {})
    importlib.import_module("llama_cpp_requests").server_of("OUT")
    monkeypatch.delitem(sys.modules, "llama_cpp_requests")
    there, here = (vars(settings) for settings in started)
    assert (there["model"], there["mmproj"]) == (here["model"], here["mmproj"])
    assert there["model"].path == "OUT/model.gguf"
    assert there.keys() <= here.keys()


def test_the_request_of_the_serving_page_is_that_of_the_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []

    def answered(request: urllib.request.Request, timeout: float = 0) -> io.BytesIO:
        assert isinstance(request.data, bytes)
        sent.append((request.full_url, request.headers, json.loads(request.data)))
        return io.BytesIO(b'{"choices": [{"message": {"content": " Red "}}]}')

    monkeypatch.setattr(urllib.request, "urlopen", answered)
    (code,) = [block for block in shown("python") if "def ask" in block]
    there: dict = {}
    exec(code, there)
    path = tmp_path / "it.png"
    Image.new("RGB", (3, 5), (200, 0, 0)).save(path)
    assert there["ask"]("http://here", "student", str(path), "What colour?") == "Red"
    content = [{"type": "image", "path": str(path)}, {"type": "text", "text": "What colour?"}]
    assert of_server("http://here", "student")([[{"role": "user", "content": content}]], 1) == [" Red "]
    assert sent[0] == sent[1]


def test_a_word_is_joined_from_what_earlier_words_leave_of_it() -> None:
    words = {bytes([k]): k for k in range(256)} | {
        b"in": 256,
        b" t": 257,
        b"ing": 258,
        b" thing": 300,
        b"h": 104,
    }
    words[b" th"] = 259
    assert merges(words) == [(b"i", b"n"), (b" ", b"t"), (b"in", b"g"), (b" th", b"ing"), (b" t", b"h")]
    with pytest.raises(ValueError, match="is not joined from two"):
        merges({bytes([k]): k for k in range(256)} | {b"abc": 256})


def test_the_results_say_what_they_are_of() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("tools_*.json"):
        result = json.loads(path.read_text())
        assert path.stem == f"tools_{result['tool']}"
        assert "not_run" in result or result["versions"]
