"""A student that answers for itself, as the settings ask for it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from llava_kd.assembly.asking.client import Server, ServerSettings, Wording
from llava_kd.assembly.asking.questions import refuse_control_words
from llava_kd.assembly.parts.adapters import write_student
from llava_kd.assembly.parts.data import served, side_in
from llava_kd.assembly.parts.on_policy.abroad import Abroad, Place
from llava_kd.assembly.parts.on_policy.at_home import AtHome
from llava_kd.assembly.parts.on_policy.publishing import Publisher
from llava_kd.assembly.parts.on_policy.stand_in import StandIn
from llava_kd.assembly.parts.on_policy.writer import Hand, OwnAnswersLoader, Writer
from llava_kd.config import OnPolicyConfig, TrainConfig, WriterServerConfig
from llava_kd.data.batches.loader import Loader
from llava_kd.data.batches.model_side import Side
from llava_kd.evaluation.generation.generate import Generator
from llava_kd.evaluation.generation.writing import Writing
from llava_kd.models.files.checkpoint import Parts
from llava_kd.models.files.export import check_stock
from llava_kd.models.files.older_tools import make_portable
from llava_kd.models.foreign.loading import AnyParts, as_llava
from llava_kd.models.mllm import MLLM
from llava_kd.models.projectors.reused import ReusedProjectorLlava
from llava_kd.models.vocabulary import num_common_columns
from llava_kd.parallel.engine import Engine
from llava_kd.training.trainer import Loader as AnyLoader

WEIGHTS = "on_policy_weights"  # of the run: what a server was given last
WORDING = Wording(
    url="on_policy.server.url",
    model="on_policy.server.model",
    key="on_policy.server.key_env",
    goes_on="run the same command again to continue from the last checkpoint",
)


def stand_in_for(config: TrainConfig, student: Parts) -> StandIn | None:
    """Who writes where an engine shards the student. To be called before it does."""
    if config.on_policy is None or config.on_policy.server is not None or not config.engine.shards:
        return None
    return StandIn(student.stock)


def with_own_answers(
    config: TrainConfig,
    loader: Loader,
    student: tuple[Parts, MLLM, StandIn | None],
    teacher: AnyParts | None,
    engine: Engine,
    say: Callable[[str], None],
) -> AnyLoader:
    """The loader, behind a student that answers where the settings ask for one.

    ValueError for a teacher that does not read the student's tokens as its own.
    """
    asked, packing = config.on_policy, config.data.packing
    if asked is None:
        return loader
    assert teacher is not None
    assert config.teacher is not None
    own, its = student[0], as_llava(teacher, "`on_policy`")
    sides = side_in(config, own, config.student), side_in(config, its, config.teacher)
    _check_alike(*sides)
    generator = _generator(config, asked, student, its, sides[0])
    if asked.server is None:
        hand: Hand = _at_home(asked, generator, student, engine)
    else:
        hand = _abroad(config, asked.server, generator, (own, loader, sides[0]), engine, say)
    row_tokens = None if packing is None else packing.max_tokens
    writer = Writer(hand, max_length=config.data.max_length, row_tokens=row_tokens)
    return OwnAnswersLoader(loader, writer, share=asked.share, seed=config.seed)


def _generator(
    config: TrainConfig,
    asked: OnPolicyConfig,
    student: tuple[Parts, MLLM, StandIn | None],
    teacher: Parts,
    side: Side,
) -> Generator:
    own, _, stand_in = student
    ends = {template.end_token_id(side.tokenizer) for template in side.source_templates.values()}
    return Generator(
        own.stock if stand_in is None else stand_in.model,
        # Its own: the loader's thread reads ahead with the student's tokenizer.
        copy.deepcopy(served(own, config.data).processor),
        max_new_tokens=asked.max_new_tokens,
        writing=Writing(temperature=asked.temperature, top_p=asked.top_p, seed=config.seed),
        num_tokens=num_common_columns(
            own.processor.tokenizer,
            teacher.processor.tokenizer,
            student_rows=own.stock.lm_head.out_features,
            teacher_rows=teacher.stock.lm_head.out_features,
        ),
        more_ends=tuple(ends),
    )


def _at_home(
    asked: OnPolicyConfig, generator: Generator, student: tuple[Parts, MLLM, StandIn | None], engine: Engine
) -> AtHome:
    _, mllm, stand_in = student

    @contextmanager
    def lent(stand_in: StandIn) -> Iterator[None]:
        with engine.whole(mllm) as weights, stand_in.lent(weights), torch.no_grad():
            yield

    inference = engine.inference if stand_in is None else partial(lent, stand_in)
    return AtHome(generator, inference, batch_size=asked.batch_size)


def _abroad(
    config: TrainConfig,
    asked: WriterServerConfig,
    generator: Generator,
    reads: tuple[Parts, Loader, Side],
    engine: Engine,
    say: Callable[[str], None],
) -> Abroad:
    """ValueError for a server that is not there, reads too little, or would read a record otherwise."""
    student, loader, side = reads
    length, world = config.data.max_length, engine.world
    settings = ServerSettings(
        url=asked.url, key_env=asked.key_env, model=asked.model, jobs=asked.jobs, timeout=asked.timeout,
        retries=asked.retries, wording=WORDING,
    )  # fmt: skip
    with world.together():
        _refuse_unreadable(student)
        server, records = Server(settings), loader.records()
        name = server.model(longest=length, needs=f"data.max_length is {length}")
        if world.is_main:
            numbers = range(len(records.source))
            refuse_control_words(numbers, records.source, side, "set on_policy.server to null")
    say(
        f"{name} on {server.address} generates the student's answers, with new weights every "
        f"{asked.reload_every} steps: a run that is interrupted does not resume exactly as it would have "
        "continued"
    )
    publisher = Publisher(
        server=server,
        directory=Path(asked.weights or Path(config.output_dir) / WEIGHTS),
        write=lambda weights, out: write_student(
            config,
            student,
            weights,
            "mllm.",
            out,
            complete=lambda scratch: make_portable(scratch, student.stock.config),
        ),
        engine=engine,
    )
    return Abroad(
        place=Place(server=server, model=name, jobs=asked.jobs),
        generator=generator,
        reader=side,
        records=records,
        publish=publisher,
        reload_every=asked.reload_every,
        world=world,
    )


def _refuse_unreadable(student: Parts) -> None:
    """ValueError for a student that a server has no class for."""
    check_stock(student, "the student of `on_policy.server`")
    if isinstance(student.stock, ReusedProjectorLlava):
        raise ValueError(
            "`on_policy.server` needs a student with a stock LLaVA projector, but this student uses its "
            "teacher's projector, which is merged only at export; set on_policy.server to null"
        )


def _check_alike(student: Side, teacher: Side) -> None:
    """Tokens that the student writes are laid behind the teacher's own prompt as they are."""
    templates = [(side.template, side.source_templates) for side in (student, teacher)]
    if templates[0] != templates[1]:
        raise ValueError(
            "with `on_policy`, student and teacher must have the same template; the student's is "
            f"{student.template.name}, the teacher's {teacher.template.name}; set data.template, or "
            "on_policy to null"
        )
    sides = (student, teacher)
    ends = [side.template.end_token_id(side.tokenizer) for side in sides]
    if ends[0] != ends[1]:
        words = [s.tokenizer.convert_ids_to_tokens(end) for s, end in zip(sides, ends, strict=True)]
        raise ValueError(
            "with `on_policy`, student and teacher must end answers with the same token; the student uses "
            f"{words[0]!r}, the teacher {words[1]!r}: choose a data.template with its own end token, or "
            "set on_policy to null"
        )


def on_policy_lines(config: TrainConfig) -> list[str]:
    """What a dry run says of it: nothing without."""
    asked = config.on_policy
    if asked is None:
        return []
    how = "greedily"
    if asked.temperature > 0:
        how = f"at temperature {asked.temperature:g}, top_p {asked.top_p:g}"
    return [
        f"own answers      at {asked.share:.0%} of the steps, {how}, up to {asked.max_new_tokens} tokens; "
        "their labels are not used"
    ] + ([] if asked.server is None else [_server_line(asked.server)])


def _server_line(asked: WriterServerConfig) -> str:
    return f"generated by     {asked.url}, with new weights every {asked.reload_every} steps; not repeatable"
