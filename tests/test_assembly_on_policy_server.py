"""A student whose answers a server writes: what the student itself would have written, and nothing else."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from served_student import ServedStudent, WritingHandler
from served_teacher import running
from test_assembly_on_policy import own_stage

from llava_kd.assembly.asking import client
from llava_kd.assembly.settings import load
from llava_kd.cli import main
from llava_kd.models.files.checkpoint import Parts, load_stock, save_stock

KL = {"response_kl": {"weight": 1.0, "divergence": "reverse"}}
GREEDY = {"share": 1.0, "temperature": 0.0, "max_new_tokens": 5}
FIGURES = ("loss", "grad_norm", "response_kl", "own_answer_tokens", "own_answers_cut", "own_answers_written")


@pytest.fixture(scope="module")
def started_with(student_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of the student with weights that are none of its own, and the template of the stage."""
    parts = load_stock(str(student_dir))
    for parameter in parts.stock.model.language_model.parameters():
        parameter.data.zero_()
    out = tmp_path_factory.mktemp("started") / "model"
    save_stock(Parts(stock=parts.stock, processor=parts.processor), out)
    return out


@dataclass
class Case:
    served: ServedStudent
    stage: object
    capsys: pytest.CaptureFixture[str]

    def path(self, name: str, *, steps: int = 2, on_policy: dict | None = None, **server: object) -> Path:
        asked = {**GREEDY, **(on_policy or {}), "server": {"url": self.served.url, **server}}
        return self.stage(name, max_steps=steps, objective=KL, on_policy=asked)  # type: ignore[operator]

    def refused(self, **server: object) -> str:
        self.capsys.readouterr()
        path = self.path("run", **{"retries": 0, "jobs": 1, **server})
        assert main(["train", str(path)]) == 2
        return self.capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture
def case(stage, started_with: Path, monkeypatch, capsys) -> Iterator[Case]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(client, "_LONGEST_WAIT", 0.01)
    with running(ServedStudent(started_with), WritingHandler) as served:
        yield Case(served, stage, capsys)


def lines(path: Path) -> list[dict[str, float]]:
    text = (path.with_suffix("") / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_a_server_with_the_students_weights_teaches_what_the_student_itself_does(
    case: Case, stage, shapes_dir: Path, speaker: Path
) -> None:
    """With a student whose answers end, so that several questions of a talk are answered."""
    more = {"max_steps": 3, "objective": KL, "global_batch_size": 4, "lr": 1e-2}  # other answers at each
    asked = {**GREEDY, "max_new_tokens": 12, "share": 1.0}
    data = shapes_dir / "instructions.json"
    server = {"url": case.served.url, "jobs": 3}
    path, own = (
        own_stage(stage, speaker, data, name=name, **more, on_policy={**asked, **which})
        for name, which in (("served", {"server": server}), ("own", {}))
    )
    for one in (path, own):
        assert main(["train", str(one)]) == 0
    assert max(len(body["messages"]) for body in case.served.asked) > 2
    for a, b in zip(lines(path), lines(own), strict=True):
        assert {name: a[name] for name in FIGURES} == pytest.approx(
            {name: b[name] for name in FIGURES}, rel=1e-5
        )
        assert a["own_answers_staleness"] == 0
    output = path.with_suffix("")
    assert [Path(read).name for read in case.served.read] == [f"step-{step:08d}" for step in range(3)]
    assert case.served.forgot == ["/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"] * 3
    assert [folder.name for folder in (output / "on_policy_weights").iterdir()] == ["step-00000002"]
    assert "a server generated answers" in json.loads((output / "run.json").read_text())["not_repeatable"]
    assert "not_repeatable" not in json.loads((own.with_suffix("") / "run.json").read_text())


def test_weights_are_given_every_few_steps_and_their_age_is_logged(case: Case) -> None:
    path = case.path("run", steps=5, reload_every=3, jobs=3, on_policy={"temperature": 1.0})
    assert main(["train", str(path)]) == 0
    assert [line["own_answers_staleness"] for line in lines(path)] == [0, 1, 2, 0, 1]
    assert len(case.served.read) == 2
    seeds = [body["seed"] for body in case.served.asked]
    assert len(set(seeds)) == len(seeds)
    assert {body["temperature"] for body in case.served.asked} == {1.0}


def changed(**fields: object):
    """An answer with other fields; a callable makes one of what was there."""

    def trick(handler: WritingHandler, body: dict, answer: dict) -> dict:
        for name, value in fields.items():
            where = answer if name in answer else answer["choices"][0]
            where[name] = value(where[name]) if callable(value) else value
        return answer

    return trick


def breaks_off(handler: WritingHandler, body: dict, answer: dict) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"id": "chat')
    handler.close_connection = True


def sleeps(handler: WritingHandler, body: dict, answer: dict) -> None:
    time.sleep(1.5)
    handler.close_connection = True


def swapped():
    before: list[dict] = []

    def trick(handler: WritingHandler, body: dict, answer: dict) -> dict:
        before.append(answer)
        return before[max(0, len(before) - 2)]

    return trick


@pytest.mark.parametrize(
    ("trick", "said"),
    [
        (breaks_off, "gave no answer after 1 attempt: the connection failed"),
        (
            sleeps,
            "gave no answer after 1 attempt: no response within 1 s; run the same command again",
        ),
        (swapped(), "returned the answer to another request"),
        (changed(model="teacher"), "answered with the model 'teacher' instead of 'student'"),
        (changed(prompt_token_ids=None), "gave no prompt_token_ids"),
        (changed(prompt_token_ids=lambda ids: [*ids[:3], 7, *ids[4:]]), "read other tokens: token 3 is '"),
        (changed(prompt_token_ids=lambda ids: ids[:-1]), "is nothing on the server and"),
        (changed(token_ids=None), "gave no token_ids of an answer"),
        (changed(token_ids=lambda ids: [99999, *ids[1:]]), "wrote token 99999, but the tokenizers"),
        (
            changed(token_ids=lambda ids: ids[:2], finish_reason="length"),
            "cut an answer after 2 tokens (length) instead of 5",
        ),
        (changed(finish_reason="abort"), "cut an answer after 5 tokens (abort) instead of 5"),
        (changed(finish_reason="stop"), "returned an answer without its end token"),
    ],
)
def test_an_answer_that_does_not_come_or_fit_is_refused_with_its_record(case: Case, trick, said: str) -> None:
    case.served.trick = trick
    line = case.refused(timeout=1 if trick is sleeps else 60)
    assert said in line
    assert "record '" in line
    assert f"{case.served.url} " in line


def test_an_answer_that_never_ends_is_cut_and_counted(case: Case) -> None:
    path = case.path("run", steps=1)
    assert main(["train", str(path)]) == 0
    (line,) = lines(path)
    assert line["own_answers_cut_share"] == 1  # random weights end none within five tokens
    assert line["own_answer_tokens"] == 5 * line["own_answers_written"]


def test_no_server_a_missing_key_and_one_without_its_development_mode_are_named(
    case: Case, monkeypatch
) -> None:
    url = case.served.url
    case.served.rpc = lambda handler, body: handler.reply(404, {"detail": "Not Found"}) or True
    assert "did not load the new weights from " in (line := case.refused())
    assert (
        "answered 404: Not Found; start the server in its development mode, with VLLM_SERVER_DEV_MODE=1"
        in line
    )

    def wants_key(handler: WritingHandler, body: dict) -> bool:
        if handler.headers.get("Authorization") == "Bearer sk-1":
            return False
        handler.reply(401, {"error": {"message": "Unauthorized"}})
        return True

    case.served.rpc = wants_key
    assert (
        "the server needs an API key: name its environment variable with on_policy.server.key_env"
        in case.refused()
    )
    assert "on_policy.server.key_env names the environment variable NOT_SET" in case.refused(
        key_env="NOT_SET"
    )
    monkeypatch.setenv("STUDENT_KEY", "sk-1")
    assert main(["train", str(path := case.path("keyed", steps=1, key_env="STUDENT_KEY"))]) == 0
    assert all("sk-1" not in file.read_text() for file in path.with_suffix("").glob("*.*"))
    case.served.max_model_len = 500
    assert (
        "reads at most 500 tokens with student, but data.max_length is 512: start the server with"
        in case.refused()
    )
    case.served.url = "http://127.0.0.1:9"
    assert "http://127.0.0.1:9 gave no answer after 1 attempt: the connection failed" in case.refused()
    case.served.url = url.replace("http", "ftp")
    assert "on_policy.server.url must be an address" in case.refused()


def test_what_no_server_writes_is_refused_by_name(case: Case) -> None:
    path = case.path("run")
    with pytest.raises(ValueError, match=r"`on_policy\.server` needs whole weights"):
        load(path, ["--student.lora={rank: 2}"])
    with pytest.raises(ValueError, match=r"`on_policy\.server\.reload_every` must be more than 0"):
        load(path, ["--on_policy.server.reload_every=0"])


def test_a_plan_names_the_server(case: Case) -> None:
    assert main(["train", str(case.path("run", reload_every=4)), "--dry_run"]) == 0
    said = case.capsys.readouterr().out
    assert f"generated by     {case.served.url}, with new weights every 4 steps; not repeatable" in said
