"""`llava-kd cache-teacher --server`: what a teacher on a server says of the given answers, kept as `topk`."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llava_kd.assembly.cache_teacher import ShardWriter, begin, contents_of, finish, missing, one_teacher
from llava_kd.assembly.parts.data import BAD_RECORDS, side_in, source_in
from llava_kd.assembly.parts.stored_teacher import identity, in_words
from llava_kd.assembly.parts.teacher import teacher_template
from llava_kd.assembly.runs.logs import speaker
from llava_kd.assembly.runs.run_dir import locked
from llava_kd.assembly.served.answers import Wanted, rows
from llava_kd.assembly.served.client import RefusedError, Server, ServerSettings
from llava_kd.assembly.served.questions import messages, pictures_of
from llava_kd.config import TeacherConfig, TrainConfig
from llava_kd.data.batches.bad_records import BadRecord, BadRecords
from llava_kd.data.batches.model_side import Side
from llava_kd.data.sources.conversation import Source
from llava_kd.data.teacher_store.shards import StoredRecord, places_to_store, text_crc
from llava_kd.data.teacher_store.store import Contents, Manifest
from llava_kd.data.text.source_encoders import SourceEncoders
from llava_kd.durable import write_text
from llava_kd.models.files.teacher_head import load_shapes
from llava_kd.parallel.world import World, join, peers

CHAT_TEMPLATE = "chat_template.jinja"
_TOLD_EVERY = 1000
_SHOWN = 3


def cache_from_server(
    config: TrainConfig,
    out: str | Path,
    server: ServerSettings,
    *,
    top_k: int | None,
    shard_mb: int = 512,
) -> None:
    """Write the cache `out` for this stage from a server, or go on with it; ranks of a launch share the work.

    Raises ValueError for settings that no server serves, and for whatever it answers that does not fit.
    """
    one = one_teacher(config)
    _refuse_second_reading(one)
    with peers(), ExitStack() as held:
        world = join(config.engine.device, timeout_minutes=config.engine.timeout_minutes)
        say = speaker(world)
        directory = Path(out)
        asked = Server(server)
        with world.together():
            if world.is_main:
                held.enter_context(locked(directory, "--out"))
        teacher = load_shapes(one.checkpoint)
        say(f"template of the teacher: {teacher_template(config, teacher)}")
        contents = contents_of(config, "topk", top_k, teacher)
        if contents.temperature != 1:
            raise ValueError(
                "a server tells log-probabilities at temperature 1, the KL terms of `objective` are at "
                f"{in_words(contents.temperature)}: set it to 1, or cache the teacher without --server"
            )
        source, reader = source_in(config), side_in(config, teacher, one)
        _refuse_unrenderable(reader)
        with world.together():
            name = _model(asked, server.model, config.data.max_length, say if world.is_main else _silent)
        manifest = Manifest(
            identity=identity(one, reader, source, served=name),
            contents=contents,
            num_records=len(source),
        )
        with world.together():
            if world.is_main:
                begin(directory, manifest, None, say)
                _write_template(directory / CHAT_TEMPLATE, reader)
        todo = missing(directory, manifest, say)
        with world.together():
            _refuse_control_words(todo, source, reader)
            bad = BadRecords(
                max_rate=config.data.max_bad_rate,
                records_per_epoch=len(todo) / world.size,
                path=directory / BAD_RECORDS,
            )
            shards = ShardWriter(directory, shard_mb * 2**20)
            _Run(asked, server.jobs, name, contents, directory, say).write(
                _share(todo, world), source, reader, (shards, bad)
            )
        with world.together():
            if world.is_main:
                finish(directory, manifest, say)


def _share(todo: Sequence[int], world: World) -> Sequence[int]:
    return todo[world.rank :: world.size]


def _silent(_: str) -> None:
    return None


@dataclass(frozen=True)
class _Run:
    """One rank's share of the work."""

    server: Server
    jobs: int
    name: str
    contents: Contents
    directory: Path
    say: Callable[[str], None]

    def write(
        self,
        todo: Sequence[int],
        source: Source,
        reader: Side,
        into: tuple[ShardWriter, BadRecords],
    ) -> None:
        """Ask for the records in their order, `jobs` at once, and store them in it.

        Records and pictures are read here, one after the other: sources are not made for several threads.
        What came before an error is stored.
        """
        shards, bad = into
        encode = reader.encoder()
        waiting: deque[Future[StoredRecord]] = deque()
        try:
            with self._pool() as pool:
                for count, number in enumerate(todo, start=1):
                    asked = self._asked(number, source, reader, encode)
                    found = ()
                    if isinstance(asked, str):
                        name = source.name_of(number)
                        found = (BadRecord(id=source.record(number).id, source=name, reason=asked),)
                    else:
                        waiting.append(pool.submit(asked))
                    bad.add(found, num_read=1)
                    while len(waiting) >= 2 * self.jobs:
                        shards.add(waiting.popleft().result())
                    if count % _TOLD_EVERY == 0:
                        self.say(f"{count} of {len(todo)} records are asked for")
                while waiting:
                    shards.add(waiting.popleft().result())
        finally:
            for answered in waiting:  # after an error: what had been answered all the same
                if not answered.cancelled() and answered.exception() is None:
                    shards.add(answered.result())
            shards.flush()

    @contextmanager
    def _pool(self) -> Iterator[ThreadPoolExecutor]:
        """Threads that ask; after an error they begin nothing, and wait for answers on their way alone."""
        pool = ThreadPoolExecutor(self.jobs)
        try:
            yield pool
        finally:
            self.server.stop()
            pool.shutdown(cancel_futures=True)

    def _asked(
        self, number: int, source: Source, reader: Side, encode: SourceEncoders
    ) -> Callable[[], StoredRecord] | str:
        """What asks for one record, or why it is bad."""
        record = source.record(number)
        if record.fault:
            return record.fault
        try:
            encoded = encode(record)
            pictures = pictures_of(source, number, record, reader)
        except (ValueError, OSError) as error:
            return str(error)
        assert self.contents.k is not None
        assert self.contents.columns is not None
        wanted = Wanted(
            encoded=encoded,
            positions_M=places_to_store(encoded, self.contents.places),
            k=self.contents.k,
            columns=self.contents.columns,
            tokenizer=reader.tokenizer,
            image_token_id=reader.image_token_id,
        )
        body = {
            "model": self.name,
            "messages": messages(record, pictures),
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": wanted.k,
            "return_token_ids": True,
            "add_generation_prompt": False,
        }
        return partial(self._ask, number, record.id, body, wanted)

    def _ask(self, number: int, record_id: str, body: dict, wanted: Wanted) -> StoredRecord:
        name = f"{_NAME}-{number}"
        try:
            answer = self.server.call("/v1/chat/completions", body, name)
            _refuse_another(answer, name, self.name)
            tensors = rows(answer, wanted)
        except RefusedError as error:
            what = f"{self.server.address} {_remedied(error, wanted.k)}"
        except ValueError as error:
            what = str(error)
            if not what.startswith(self.server.address):
                what = f"{self.server.address} {what}{self._hint(what)}"
        else:
            crc = text_crc(record_id, wanted.encoded)
            return StoredRecord(number=number, text_crc=crc, positions_M=wanted.positions_M, tensors=tensors)
        raise ValueError(f"record {record_id!r}: {what}")

    def _hint(self, what: str) -> str:
        if not what.startswith("read other tokens"):
            return ""
        return (
            f"; serve the model of teacher.checkpoint, with --chat-template {self.directory / CHAT_TEMPLATE} "
            "--chat-template-content-format openai"
        )


_NAME = f"llava-kd-{secrets.token_hex(8)}"  # of this process's requests, so that a mixed-up answer is known


def _refuse_another(answer: dict, name: str, model: str) -> None:
    """ValueError for the answer to another request of ours, or of another model."""
    told = str(answer.get("id", ""))
    if _NAME in told and f"{name}-" not in told:
        raise ValueError(f"gave the answer to another request ({told})")
    if (other := answer.get("model", model)) != model:
        raise ValueError(f"answered with the model {str(other)[:80]!r}, asked was {model!r}")


def _remedied(error: RefusedError, k: int) -> str:
    said = error.said.lower()
    remedies = (
        (error.status in (401, 403), "it wants a key: name its variable with --server_key_env"),
        ("greater than max allowed" in said, f"start it with --max-logprobs {k}, or ask for fewer by --topk"),
        ("context length" in said or "max_model_len" in said, "start it with a larger --max-model-len"),
        ("at most" in said and "image" in said, "start it with a larger --limit-mm-per-prompt"),
    )
    remedy = next((text for applies, text in remedies if applies), "")
    return f"{error}{'; ' if remedy else ''}{remedy}"


def _model(server: Server, name: str | None, max_length: int, say: Callable[[str], None]) -> str:
    """The model to ask for. ValueError where that is not clear, or where it reads too little."""
    try:
        listed = {str(model["id"]): model for model in server.models()}
    except RefusedError as error:
        raise ValueError(f"{server.address}/v1/models {_remedied(error, 0)}") from None
    if name is None and len(listed) == 1:
        name = next(iter(listed))
    if name not in listed:
        raise ValueError(
            f"--model must be one of those that {server.address} serves ({', '.join(listed)}); got {name}"
        )
    longest = listed[name].get("max_model_len")
    if isinstance(longest, int) and longest <= max_length:
        raise ValueError(
            f"{server.address} reads {longest} tokens of {name}, data.max_length is {max_length} and one "
            f"more is written: start it with --max-model-len {max_length + 1} or more"
        )
    say(f"the teacher is {name} on {server.address}")
    return name


def _refuse_second_reading(teacher: TeacherConfig) -> None:
    if teacher.visual_dependency is not None:
        raise ValueError(
            "a server is asked with the picture alone, but `teacher.visual_dependency` asks without it; set "
            "it to null, or cache the teacher without --server"
        )


def _refuse_unrenderable(reader: Side) -> None:
    if reader.source_templates:
        raise ValueError(
            "a server writes every record by one chat template, but data.sources[].template names "
            f"{', '.join(sorted(reader.source_templates))}: cache these data without --server"
        )


def _refuse_control_words(todo: Sequence[int], source: Source, reader: Side) -> None:
    """ValueError before any request: to a server they are control tokens, here they are text."""
    encoder = reader.encoder()
    found = []
    for number in todo:
        record = source.record(number)
        if not record.fault and (words := encoder.control_words(record)):
            found.append(f"record {record.id!r} ({', '.join(map(repr, words[:_SHOWN]))})")
    if found:
        more = "" if len(found) <= _SHOWN else f" and {len(found) - _SHOWN} more"
        raise ValueError(
            f"words of {', '.join(found[:_SHOWN])}{more} are text here and control tokens to a server: take "
            "them out, or cache these data without --server"
        )


def _write_template(path: Path, reader: Side) -> None:
    write_text(path, reader.template.chat_template_for(reader.tokenizer))
