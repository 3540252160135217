"""`llava-kd cache-teacher --server`: what a teacher on a server says of the given answers, kept as `topk`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llava_kd.assembly.asking.answers import Wanted, rows
from llava_kd.assembly.asking.client import RefusedError, Server, ServerSettings
from llava_kd.assembly.asking.questions import messages, pictures_of, refuse_control_words
from llava_kd.assembly.cache_teacher import ShardWriter, begin, contents_of, finish, missing, one_teacher
from llava_kd.assembly.parts.data import BAD_RECORDS, side_in, source_in
from llava_kd.assembly.parts.stored_teacher import identity, in_words
from llava_kd.assembly.parts.teacher import teacher_template
from llava_kd.assembly.runs.logs import speaker
from llava_kd.assembly.runs.run_dir import locked
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
                "a server returns log-probabilities at temperature 1, but the KL terms of `objective` "
                f"have {in_words(contents.temperature)}: set it to 1, or cache the teacher without --server"
            )
        source, reader = source_in(config), side_in(config, teacher, one)
        _refuse_unrenderable(reader)
        with world.together():
            name = _model(asked, config.data.max_length)
            say(f"the teacher is {name} on {asked.address}")
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
            refuse_control_words(todo, source, reader, "create the cache without --server")
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


def _model(asked: Server, length: int) -> str:
    return asked.model(
        longest=length + 1, needs=f"data.max_length is {length}, and the server generates one token more"
    )


def _share(todo: Sequence[int], world: World) -> Sequence[int]:
    return todo[world.rank :: world.size]


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
                        self.say(f"{count} of {len(todo)} records are requested")
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
        try:
            tensors = rows(self.server.chat(body, number), wanted)
        except RefusedError as error:
            k = wanted.k
            more = f"start the server with --max-logprobs {k}, or use a smaller --topk"
            applies = "greater than max allowed" in error.said.lower()
            what = f"{self.server.address} {self.server.remedied(error, [(applies, more)])}"
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
            "; start the server with the model of teacher.checkpoint, --chat-template "
            f"{self.directory / CHAT_TEMPLATE} --chat-template-content-format openai"
        )


def _refuse_second_reading(teacher: TeacherConfig) -> None:
    if teacher.visual_dependency is not None:
        raise ValueError(
            "a server predicts only with the picture, but `teacher.visual_dependency` also needs "
            "predictions without it; set it to null, or cache the teacher without --server"
        )


def _refuse_unrenderable(reader: Side) -> None:
    if reader.source_templates:
        raise ValueError(
            "a server formats every record with one chat template, but data.sources[].template names "
            f"{', '.join(sorted(reader.source_templates))}: create the cache without --server"
        )


def _write_template(path: Path, reader: Side) -> None:
    write_text(path, reader.template.chat_template_for(reader.tokenizer))
