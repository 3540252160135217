"""A teacher on a server: the same cache as from its weights, and no word of one that answers otherwise."""

from __future__ import annotations

import base64
import io
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from served_teacher import Handler, Served, running
from tiny_llava import make_tiny_llava
from tiny_runs import write_stage

from llava_kd.assembly.asking import answers, client, questions
from llava_kd.cli import main
from llava_kd.data.teacher_store.store import MANIFEST, SHARDS
from llava_kd.data.text.template_table import TEMPLATES
from llava_kd.losses.reference_top_k import TopK
from llava_kd.losses.top_k import top_k_head_loss

K = 8
KL = {"cross_entropy": {"weight": 1.0}, "response_kl": {"weight": 1.0}, "visual_kl": {"weight": 0.5}}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose head has no padding rows: over those a server's sum of probabilities goes, too."""
    return make_tiny_llava(tmp_path_factory.mktemp("served") / "teacher", hidden=48)


@pytest.fixture(scope="module")
def model(weights: Path) -> Served:
    served = Served(weights, "")
    served.chat_template = TEMPLATES["vicuna"].chat_template_for(served.processor.tokenizer)
    return served


@dataclass
class Stage:
    """A stage of a few records, and a directory for its caches."""

    config: Path
    served: Served
    directory: Path
    capsys: pytest.CaptureFixture[str]

    def cache(self, *words: str, out: str = "served", k: int = K) -> int:
        asked = [f"--out={self.directory / out}", f"--server={self.served.url}", f"--topk={k}"]
        return main(["cache-teacher", str(self.config), *asked, *words])

    def refused(self, *words: str, out: str = "served", k: int = K) -> str:
        """What a command says that ends with 2: one line."""
        self.capsys.readouterr()
        assert self.cache(*words, out=out, k=k) == 2
        said = self.capsys.readouterr().err.strip().splitlines()
        return said[-1]

    @property
    def records(self) -> list[dict]:
        return json.loads((self.directory / "data" / "records.json").read_text())


@pytest.fixture
def stage(
    tmp_path: Path, shapes_dir: Path, student_dir: Path, weights: Path, model: Served, monkeypatch, capsys
) -> Iterator[Stage]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(client, "_LONGEST_WAIT", 0.01)
    data = tmp_path / "data"
    data.mkdir()
    shutil.copytree(shapes_dir / "images", data / "images")
    records = json.loads((shapes_dir / "instructions.json").read_text())[:5]
    (data / "records.json").write_text(json.dumps(records))
    light = _without_weights(weights, tmp_path / "light")
    config = write_stage(
        tmp_path / "run", data=data, student=student_dir, teacher=light,
        max_steps=2, global_batch_size=2, objective=KL,
    )  # fmt: skip
    text = config.read_text().replace("instructions.json", "records.json")
    config.write_text(text)
    model.asked.clear()
    model.keys.clear()
    model.trick, model.names, model.max_logprobs, model.max_model_len = None, ["teacher"], 20, 2048
    with running(model):
        yield Stage(config, model, tmp_path, capsys)


def _without_weights(weights: Path, light: Path) -> Path:
    shutil.copytree(weights, light, ignore=shutil.ignore_patterns("*.safetensors"))
    return light


def stored(directory: Path) -> dict[str, torch.Tensor]:
    [shard] = sorted((directory / SHARDS).iterdir())
    return load_file(shard)


def losses(config: Path, cache: Path, *words: str) -> list[dict]:
    output = config.parent / f"run-{cache.name}"
    assert main(["train", str(config), f"--output_dir={output}", f"--teacher.cache={cache}", *words]) == 0
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_the_cache_from_a_server_is_the_one_from_the_weights(stage: Stage, weights: Path) -> None:
    live = stage.directory / "live"
    word = f"--teacher.checkpoint={weights}"
    assert (
        main(["cache-teacher", str(stage.config), f"--out={live}", "--mode=topk", f"--topk={K}", word]) == 0
    )
    assert stage.cache() == 0
    here, there = stored(live), stored(stage.directory / "served")
    for name in ("number_R", "rows_R", "text_crc_R", "positions_M", "top_columns_MK"):
        assert torch.equal(here[name], there[name]), name
    # Up to one number a row, which no softmax sees.
    shift_M = here["top_logits_MK"][:, 0] - there["top_logits_MK"][:, 0]
    moved_MK = there["top_logits_MK"] + shift_M.unsqueeze(1)
    torch.testing.assert_close(moved_MK, here["top_logits_MK"], rtol=0, atol=1e-5)
    torch.testing.assert_close(there["rest_M"] + shift_M, here["rest_M"], rtol=0, atol=1e-5)
    whole_MK = torch.cat([there["top_logits_MK"], there["rest_M"].unsqueeze(1)], 1)
    torch.testing.assert_close(whole_MK.logsumexp(1), torch.zeros(len(whole_MK)), rtol=0, atol=1e-5)
    a = losses(stage.config, live, word)
    b = losses(stage.config, stage.directory / "served")  # without weights, here too
    assert len(a) == len(b) == 2
    for one, other in zip(a, b, strict=True):
        for term in ("loss", "cross_entropy", "response_kl", "visual_kl", "grad_norm"):
            assert other[term] == pytest.approx(one[term], rel=1e-5), term
            assert one[term] > 0


def test_no_loss_of_the_largest_logits_sees_what_is_added_to_a_row() -> None:
    torch.manual_seed(0)
    student_ND, head_VD, targets_N = torch.randn(5, 6), torch.randn(20, 6), torch.randint(20, (5,))
    logits_NV = 3 * torch.randn(5, 20)
    top_NK, columns_NK = logits_NV.topk(4)
    rest_N = logits_NV.scatter(1, columns_NK, -torch.inf).logsumexp(1)
    sum_N = logits_NV.logsumexp(1)
    found = []
    for less_N in (torch.zeros(5), sum_N):
        states_ND = student_ND.clone().requires_grad_()
        top = TopK(
            logits_NK=top_NK - less_N.unsqueeze(1), columns_NK=columns_NK, rest_N=rest_N - less_N
        )  # as logits, and as log-probabilities
        loss = top_k_head_loss(
            states_ND, head_VD, targets_N, ce_weight_N=torch.zeros(5), top=top, kl_weight_N=torch.ones(5),
            num_common=20,
        ).loss  # fmt: skip
        loss.backward()
        found.append((loss.detach(), states_ND.grad))
    torch.testing.assert_close(found[0], found[1])
    said_MK = (top_NK - sum_N.unsqueeze(1)).double()
    torch.testing.assert_close(answers.rest(said_MK, 20).float(), rest_N - sum_N)


def test_the_rest_is_bounded_where_rounding_hides_it() -> None:
    top_MK = torch.tensor([[0.0, -30.0], [-1e-12, -9999.0]], dtype=torch.float64)
    rest_M = answers.rest(top_MK, 100)
    assert rest_M.isfinite().all()
    assert rest_M[0] == pytest.approx(-30 + torch.tensor(98.0).log().item())
    assert rest_M[1] < -9000


def busy(handler: Handler) -> None:
    handler.reply(503, {"error": {"message": "overloaded"}}, Retry_After="1")


def limited(handler: Handler) -> None:
    handler.reply(429, {"error": {"message": "too many requests"}})


def hangs_up(handler: Handler) -> None:
    handler.close_connection = True
    handler.connection.shutdown(2)


def breaks_off(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"id": "chat')
    handler.close_connection = True


def says_half(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "12")
    handler.end_headers()
    handler.wfile.write(b'{"id": "chat')


def sleeps(handler: Handler) -> None:
    time.sleep(9)
    handler.close_connection = True


@pytest.mark.parametrize("trouble", [busy, limited, hangs_up, breaks_off, says_half])
def test_a_server_in_trouble_is_asked_again(stage: Stage, trouble) -> None:
    def trick(handler: Handler, body: dict, number: int) -> dict | None:
        return trouble(handler) if number % 2 else stage.served.answer(body)

    stage.served.trick = trick
    assert stage.cache("--server_jobs=1") == 0
    ids = [body["request_id"] for body in stage.served.asked]
    assert len(ids) == len(set(ids)) == 10  # five records, each twice, each time by an id of its own


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        (busy, "after 1 attempt: it answered 503 (overloaded)"),
        (limited, "after 1 attempt: it answered 429 (too many requests)"),
        (hangs_up, "after 1 attempt: the connection failed ("),
        (says_half, "after 1 attempt: the response is not complete JSON"),
        (sleeps, "after 1 attempt: no response within 6 s"),
    ],
)
def test_a_server_that_stays_in_trouble_is_named_and_the_cache_goes_on(
    stage: Stage, trouble, said: str
) -> None:
    names = [record["id"] for record in stage.records]

    def trick(handler: Handler, body: dict, number: int) -> dict | None:
        return stage.served.answer(body) if number <= 2 else trouble(handler)

    stage.served.trick = trick
    line = stage.refused(
        "--server_jobs=1", "--server_retries=0", f"--server_timeout={6 if trouble is sleeps else 60}"
    )
    assert f"record {names[2]!r}: {stage.served.url} gave no answer {said}" in line
    assert "continue from what is stored" in line
    stage.served.trick = None
    stage.served.asked.clear()
    assert stage.cache() == 0
    assert "2 of 5 records are stored" in stage.capsys.readouterr().err
    assert len(stage.served.asked) == 3
    assert json.loads((stage.directory / "served" / MANIFEST).read_text())["is_complete"]
    assert len(losses(stage.config, stage.directory / "served")) == 2


def test_what_was_answered_beside_an_error_is_kept(stage: Stage) -> None:
    first = json.dumps(stage.records[0]["conversations"][-1]["value"])

    def trick(handler: Handler, body: dict, number: int) -> dict | None:
        if body["request_id"].rsplit("-", 2)[1] != "0":
            return stage.served.answer(body)
        time.sleep(1)
        return handler.reply(400, {"error": {"message": first}})

    stage.served.trick = trick
    assert "answered 400" in stage.refused("--server_jobs=4")
    stage.served.trick = None
    assert stage.cache() == 0
    said = stage.capsys.readouterr().err
    assert "0 of 5 records" not in said
    assert " of 5 records are stored" in said


def changed(**fields: object):
    """An answer whose fields are others; a callable makes one of what was there."""

    def trick(served: Served, body: dict) -> dict:
        answer = served.answer(body)
        for name, value in fields.items():
            answer[name] = value(answer[name]) if callable(value) else value
        return answer

    return trick


def each(change):
    """Of every place that has log-probabilities."""
    return lambda said: [None if entry is None else change(entry) for entry in said]


@pytest.mark.parametrize(
    ("trick", "said"),
    [
        (changed(prompt_logprobs=None), "gave no prompt_logprobs"),
        (changed(prompt_token_ids=None), "gave no prompt_token_ids, which are needed to check the tokens"),
        (changed(prompt_logprobs=lambda said: said[1:]), "they cannot be aligned"),
        (changed(prompt_token_ids=lambda ids: [*ids[:3], 7, *ids[4:]]), "read other tokens: token 3 is '("),
        (changed(prompt_token_ids=lambda ids: ids[:9]), "token 9 is nothing on the server"),
        (changed(model="student"), "answered with the model 'student' instead of 'teacher'"),
        (
            changed(prompt_logprobs=each(lambda entry: dict(list(entry.items())[:5]))),
            "instead of 8: start the server with --max-logprobs 8",
        ),
        (
            changed(
                prompt_logprobs=each(
                    lambda entry: {t: {**of, "logprob": of["logprob"] + 9} for t, of in entry.items()}
                )
            ),
            "start the server with --logprobs-mode raw_logprobs",
        ),
        (
            changed(prompt_logprobs=each(lambda entry: {t: {"logprob": "NaN"} for t, of in entry.items()})),
            "that is not a finite number",
        ),
        (changed(prompt_logprobs=each(lambda entry: dict.fromkeys(entry, -1.0))), "not in vLLM's format"),
        (
            changed(prompt_logprobs=each(lambda entry: {**entry, "999": {"logprob": 0.0 - 1e-9}})),
            "gave token 999 among the 8 most likely",
        ),
        (changed(prompt_logprobs=lambda said: [None] * len(said)), "gave no log-probabilities at token"),
        (changed(prompt_logprobs=lambda said: [None, *said[2:], said[1]]), "without the prompt's own token"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused_with_its_record(stage: Stage, trick, said: str) -> None:
    stage.served.trick = lambda handler, body, number: trick(stage.served, body)
    line = stage.refused("--server_jobs=1")
    assert said in line
    assert f"record {stage.records[0]['id']!r}: {stage.served.url} " in line


def test_a_server_with_another_template_is_refused_and_told_which(stage: Stage) -> None:
    kept = stage.served.chat_template
    stage.served.chat_template = stage.served.processor.chat_template
    try:
        line = stage.refused()
    finally:
        stage.served.chat_template = kept
    assert "read other tokens: token 0 is '<|im_start|>' (id 257) on the server and 'U' (id " in line
    path = stage.directory / "served" / "chat_template.jinja"
    assert f"--chat-template {path}" in line
    assert path.read_text() == kept


def test_image_tokens_that_are_counted_otherwise_are_told(stage: Stage) -> None:
    def fewer(ids: list[int]) -> list[int]:
        image = stage.served.processor.image_token_id
        ids.remove(image)
        return ids

    trick = changed(prompt_token_ids=fewer)
    stage.served.trick = lambda handler, body, number: trick(stage.served, body)
    assert "(up to there the server has 15 image tokens; 16 are expected)" in stage.refused()


def test_answers_that_change_places_are_refused(stage: Stage) -> None:
    """Two records whose texts are the same could not be told apart by their tokens."""
    before: list[dict] = []

    def trick(handler: Handler, body: dict, number: int) -> dict:
        before.append(stage.served.answer(body))
        return before[max(0, number - 2)]

    stage.served.trick = trick
    line = stage.refused("--server_jobs=1")
    assert f"record {stage.records[1]['id']!r}" in line
    assert "returned the answer to another request" in line


def test_a_limit_of_the_server_names_its_flag(stage: Stage) -> None:
    line = stage.refused(k=30)
    assert "Requested prompt logprobs of 30" in line
    assert "start the server with --max-logprobs 30, or use a smaller --topk" in line
    stage.served.max_model_len = 512
    assert "start the server with --max-model-len 513 or more" in stage.refused(out="other")


def test_a_key_is_sent_and_written_nowhere(stage: Stage, monkeypatch) -> None:
    key = "sk-very-secret-73"

    def trick(handler: Handler, body: dict, number: int) -> dict | None:
        if handler.headers.get("Authorization") == f"Bearer {key}":
            return stage.served.answer(body)
        return handler.reply(401, {"error": "Unauthorized"})

    stage.served.trick = trick
    assert "answered 401: " in (line := stage.refused())
    assert "the server needs an API key: name its environment variable with --server_key_env" in line
    assert "names the environment variable NOT_SET_HERE" in stage.refused("--server_key_env=NOT_SET_HERE")
    monkeypatch.setenv("TEACHER_KEY", f"{key}\nx: y")
    assert key not in (line := stage.refused("--server_key_env=TEACHER_KEY"))
    assert "TEACHER_KEY must hold a key" in line
    monkeypatch.setenv("TEACHER_KEY", key)
    assert stage.cache("--server_key_env=TEACHER_KEY") == 0
    said = stage.capsys.readouterr()
    assert key not in said.err + said.out
    for path in (stage.directory / "served").rglob("*"):
        assert path.is_dir() or key.encode() not in path.read_bytes(), path


def test_the_model_is_named_where_there_are_several(stage: Stage) -> None:
    stage.served.names = ["base", "tuned"]
    assert "(base, tuned); got None" in stage.refused()
    assert "(base, tuned); got teacher" in stage.refused("--model=teacher")
    assert stage.cache("--model=tuned") == 0
    assert {body["model"] for body in stage.served.asked} == {"tuned"}
    line = stage.refused("--model=base")
    assert "weights of the teacher: served as tuned there, served as base here" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mode=hidden"], "--server needs --mode topk"),
        (
            ["--objective.response_kl.temperature=2", "--objective.visual_kl.temperature=2"],
            "log-probabilities at temperature 1, but the KL terms of `objective` have 2",
        ),
        (["--objective.relation={weight: 1}"], "relation needs more than"),
        (["--server=ftp://here"], "--server must be an address such as http://localhost:8000"),
        (["--server=http://me:word@localhost:1"], "must not contain a user name or password"),
        (["--server=http://127.0.0.1:9", "--server_retries=0"], "gave no answer after 1 attempt: "),
        (["--topk=260"], "--topk must be from 1 to 259"),
    ],
)
def test_what_no_server_serves_is_refused(stage: Stage, words: list[str], said: str) -> None:
    line = stage.refused(*words)
    assert said in line
    assert "word" not in line.replace("password", "")
    assert not stage.served.asked


def test_flags_of_a_server_without_one_are_refused(stage: Stage) -> None:
    words = ["cache-teacher", str(stage.config), f"--out={stage.directory / 'x'}", "--server_jobs=2"]
    assert main(words) == 2
    assert "--server_jobs needs --server URL" in stage.capsys.readouterr().err


def test_words_that_a_server_would_read_as_control_tokens_are_refused_first(stage: Stage) -> None:
    records = stage.records
    records[3]["conversations"][0]["value"] += " What does <|im_end|> mean?"
    (stage.directory / "data" / "records.json").write_text(json.dumps(records))
    line = stage.refused()
    assert f"record {records[3]['id']!r} ('<|im_end|>')" in line
    assert not stage.served.asked


def test_a_bad_record_is_counted_and_not_asked_for(stage: Stage) -> None:
    records = stage.records
    records[1]["image"] = "images/none.png"
    (stage.directory / "data" / "records.json").write_text(json.dumps(records))
    assert stage.cache() == 0
    assert len(stage.served.asked) == 4
    tree = json.loads((stage.directory / "served" / MANIFEST).read_text())
    assert tree["num_bad"] == 1
    assert records[1]["id"] in (stage.directory / "served" / "bad_records.jsonl").read_text()


def test_long_and_plain_records_are_aligned_too(stage: Stage) -> None:
    """Cut at max_length, without a picture, and with a system turn and two rounds."""
    records = stage.records
    records[0]["conversations"][-1]["value"] += " and so on" * 40
    records[1] = {"id": "text", "conversations": records[1]["conversations"]}
    for turn in records[1]["conversations"]:
        turn["value"] = turn["value"].replace("<image>", "").strip()
    records[2]["conversations"] = [
        {"from": "system", "value": "Be brief."},
        *records[2]["conversations"][:2],
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ]
    (stage.directory / "data" / "records.json").write_text(json.dumps(records))
    assert stage.cache("--data.max_length=256") == 0
    assert len(stage.served.asked) == 5
    assert len(losses(stage.config, stage.directory / "served", "--data.max_length=256")) == 2


def photo(orientation: int | None, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    image = Image.effect_noise((8, 6), 50).convert(mode)
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, kind, exif=exif)
    return buffer.getvalue()


@dataclass
class Reader:
    upright: bool
    transform: object


@pytest.mark.parametrize("upright", [True, False])
@pytest.mark.parametrize("aspect", ["square", "pad"])
def test_a_picture_arrives_as_it_is_read_here(upright: bool, aspect: str) -> None:
    transform = type("T", (), {"aspect": aspect, "mean": (0.5, 0.5, 0.5)})()
    reader = Reader(upright, transform)
    for data in (photo(None), photo(6), photo(1), photo(None, "PNG", "RGBA")):
        url = questions._picture(data, reader)  # pyright: ignore[reportArgumentType]
        kind, _, sent = url.partition(";base64,")
        is_plain = data.startswith(b"\xff\xd8") and data != photo(6) and aspect == "square"
        with Image.open(io.BytesIO(base64.b64decode(sent))) as image:
            assert image.getexif().get(0x0112, 1) == 1
            turned = upright and Image.open(io.BytesIO(data)).getexif().get(0x0112) == 6
            size = (6, 8) if turned else (8, 6)
            assert image.size == ((8, 8) if aspect == "pad" else size)
        if is_plain and Image.open(io.BytesIO(data)).getexif().get(0x0112, 1) == 1:
            assert base64.b64decode(sent) == data
        else:
            assert kind == "data:image/png"
