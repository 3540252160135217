"""`llava-kd cache-teacher`: run a teacher once over the data and keep what the losses read of it.

Shape legend: B rows, T tokens, M places with a stored prediction, E width of the teacher, U rows of its head,
C columns that the top k are taken from, K stored columns, I images, N tokens of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from llava_kd.assembly.parts.data import side_in, source_in
from llava_kd.assembly.parts.foreign.teachers import foreign_side, placed_foreign
from llava_kd.assembly.parts.objective import terms_of
from llava_kd.assembly.parts.stored_teacher import (
    HEAD,
    identity,
    in_words,
    reads_projector,
    refuse_other,
    temperatures,
)
from llava_kd.assembly.parts.teacher import load_teacher, placed_teacher, teacher_template
from llava_kd.assembly.parts.teaching.visual_dependency import stored_form, weighing_of
from llava_kd.assembly.record_pass import RecordPass
from llava_kd.assembly.runs.logs import speaker
from llava_kd.assembly.runs.run_dir import locked
from llava_kd.batch import IGNORE_INDEX, Batch
from llava_kd.checksums import checksum
from llava_kd.config import TeacherConfig, TrainConfig
from llava_kd.data.batches.model_side import AnySide
from llava_kd.data.foreign.side import ForeignSide
from llava_kd.data.sources.conversation import Source
from llava_kd.data.teacher_store.shards import (
    SUFFIX,
    DamagedShardError,
    Shard,
    StoredRecord,
    places_to_store,
    text_crc,
    write_shard,
)
from llava_kd.data.teacher_store.store import INDEX, MANIFEST, SHARDS, Contents, Manifest, Mode, write_index
from llava_kd.data.text.encoder import Encoded
from llava_kd.distill.objective import beyond_top_k, places_read
from llava_kd.distill.rows import response_rows
from llava_kd.distill.teaching.visual_dependency import Weighing
from llava_kd.durable import make_folder, replacing
from llava_kd.losses.divergence import Temperature, deviation
from llava_kd.losses.kernels import gemm
from llava_kd.losses.kernels.capping import cap_
from llava_kd.models.foreign.loading import AnyParts, ForeignParts
from llava_kd.models.mllm import Prediction
from llava_kd.parallel.world import World, join, peers
from llava_kd.tensor_files import write_tensors
from llava_kd.training.checkpoint import sweep

_LOGIT_ROWS = 1024


def cache_teacher(
    config: TrainConfig,
    out: str | Path,
    *,
    mode: Mode = "hidden",
    top_k: int | None = None,
    shard_mb: int = 512,
) -> None:
    """Write the cache `out` for this stage, or go on with it. Every rank of a launch takes its share.

    Raises ValueError for settings without a teacher, and if `out` holds a cache of something else.
    """
    one = one_teacher(config)
    with peers(), ExitStack() as held:
        world = join(config.engine.device, timeout_minutes=config.engine.timeout_minutes)
        say = speaker(world)
        directory = Path(out)
        with world.together():
            if world.is_main:
                held.enter_context(locked(directory, "--out"))
        teacher = load_teacher(config)
        say(f"template of the teacher: {teacher_template(config, teacher)}")
        source = source_in(config)
        if isinstance(teacher, ForeignParts):
            reader = foreign_side(teacher, config.data)
        else:
            reader = side_in(config, teacher, one)
        manifest = Manifest(
            identity=identity(one, reader, source),
            contents=contents_of(config, mode, top_k, teacher),
            num_records=len(source),
        )
        with world.together():
            if world.is_main:
                begin(directory, manifest, teacher.head, say)
        todo = missing(directory, manifest, say)
        if todo:
            run = _Run(config, world, teacher, directory, manifest.contents, shard_mb * 2**20)
            with world.together():
                run.write(todo, source, reader)
        with world.together():
            if world.is_main:
                finish(directory, manifest, say)


def one_teacher(config: TrainConfig) -> TeacherConfig:
    """The settings of the teacher whose words are to be kept. ValueError where there is none, or several."""
    if config.teacher is None:
        raise ValueError(
            "`teacher` must be set, or there is nothing to cache; it is null: set teacher.checkpoint"
        )
    if config.teacher.several is not None:
        raise ValueError(
            "a cache stores the predictions of one teacher, but `teacher.several` is set; set it to null "
            f"to cache only {config.teacher.checkpoint}"
        )
    return config.teacher


def contents_of(config: TrainConfig, mode: Mode, top_k: int | None, teacher: AnyParts) -> Contents:
    """What to keep for the terms of the settings. Raises ValueError where the mode cannot serve them."""
    terms = terms_of(config.objective)
    places = places_read(terms)
    dependency = None if config.teacher is None else stored_form(config.teacher)
    if not config.objective.needs_teacher:
        raise ValueError(
            "no term of `objective` reads the teacher, so there is nothing to cache; add a term such as "
            "response_kl"
        )
    if mode == "hidden":
        if top_k is not None:
            raise ValueError("--topk needs --mode topk; leave --topk out, or change --mode")
        projected = bool(reads_projector(terms))
        return Contents(mode=mode, places=places, projected=projected, dependency=dependency)
    if names := beyond_top_k(terms):
        raise ValueError(
            f"{' and '.join(names)} needs more than the largest k logits; use --mode hidden, set the term "
            "to null, or choose a divergence other than `adaptive`"
        )
    if len(found := temperatures(terms)) != 1:
        raise ValueError(
            "--mode topk needs the same temperature in all KL terms; got "
            f"{', '.join(map(in_words, found))}: set them alike"
        )
    columns = max(teacher.tokenizer.get_vocab().values()) + 1
    if top_k is None or not 1 <= top_k < columns:
        raise ValueError(
            f"--topk must be from 1 to {columns - 1}, less than the vocabulary size; got {top_k}"
        )
    return Contents(
        mode=mode, places=places, k=top_k, columns=columns, temperature=found[0], dependency=dependency
    )


def begin(directory: Path, manifest: Manifest, head: nn.Linear | None, say: Callable[[str], None]) -> None:
    """Make the folder ready to go on: nothing of another cache, no damaged shard, no finished manifest.

    `head`: the teacher's, None where only its server has it.
    """
    if (directory / MANIFEST).is_file():
        before = Manifest.read(directory)
        refuse_other(before.identity, manifest.identity, f"the teacher cache {directory}")
        if before.contents != manifest.contents:
            raise ValueError(
                f"{directory} holds a different cache: {before.contents} there, {manifest.contents} here; "
                "choose a new directory"
            )
    elif any(not path.name.startswith(".") for path in directory.iterdir()):
        raise ValueError(f"{directory} is not empty and holds no teacher cache; choose a new directory")
    sweep(directory)
    manifest.write(directory)  # first: a folder with shards and no manifest is taken for something else
    shards = directory / SHARDS
    make_folder(shards)
    sweep(shards)
    for path in sorted(shards.glob(f"*{SUFFIX}")):
        try:
            Shard(path).check()
        except DamagedShardError as error:
            say(f"{error}: rewriting it")
            path.unlink()
    if head is None:
        return
    tensors = {"weight": head.weight} if head.bias is None else {"weight": head.weight, "bias": head.bias}
    with replacing(directory / HEAD) as scratch:
        write_tensors(tensors, scratch)


def missing(directory: Path, manifest: Manifest, say: Callable[[str], None]) -> list[int]:
    """Numbers of the records that no shard holds; says how many one does."""
    is_there = torch.zeros(manifest.num_records, dtype=torch.bool)
    for path in (directory / SHARDS).glob(f"*{SUFFIX}"):
        is_there[Shard(path).table["number_R"]] = True
    say(f"{directory}: {int(is_there.sum())} of {manifest.num_records} records are stored")
    return (~is_there).nonzero().squeeze(1).tolist()


def finish(directory: Path, manifest: Manifest, say: Callable[[str], None]) -> None:
    """Write the index, then the manifest that makes the cache complete."""
    paths = sorted((directory / SHARDS).glob(f"*{SUFFIX}"))
    if not paths:
        raise ValueError(
            f"every record is bad, so nothing was cached; fix the problems in {directory}/bad_records.jsonl"
        )
    num_bad = write_index(directory, map(Shard, paths), manifest.num_records)
    sizes = {path.name: path.stat().st_size for path in paths}
    checksums = {name: checksum(directory / name) for name in (HEAD, INDEX) if (directory / name).exists()}
    done = replace(manifest, is_complete=True, num_bad=num_bad, shards=sizes, checksums=checksums)
    done.write(directory)
    good = manifest.num_records - num_bad
    total = sum(sizes.values()) + (directory / INDEX).stat().st_size
    bad = f", {num_bad} bad" if num_bad else ""
    say(
        f"done: {good} records{bad}, {total / 1e6:.1f} MB, {total / good:.0f} bytes per record; train with "
        f"--teacher.cache={directory}"
    )


@dataclass
class ShardWriter:
    """Records in the order of their numbers, gathered into shards of `shard_bytes`."""

    directory: Path
    shard_bytes: int
    _pending: list[StoredRecord] = field(default_factory=list)
    _pending_bytes: int = 0

    def add(self, record: StoredRecord) -> None:
        self._pending.append(record)
        self._pending_bytes += record.num_bytes
        if self._pending_bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        if self._pending:
            pending, self._pending, self._pending_bytes = self._pending, [], 0
            write_shard(self.directory / SHARDS, pending)


@dataclass
class _Run:
    """One rank's share of the work."""

    config: TrainConfig
    world: World
    teacher: AnyParts
    directory: Path
    contents: Contents
    shard_bytes: int

    def write(self, todo: Sequence[int], source: Source, reader: AnySide) -> None:
        """Predict and store this rank's share of the records of `todo`."""
        assert self.config.teacher is not None
        predict = self._predictor(reader)
        records = RecordPass(
            world=self.world,
            rows=self.config.micro_batch_size,
            settings=self.config.data,
            bad_records=self.directory / "bad_records.jsonl",
        )
        shards = ShardWriter(self.directory, self.shard_bytes)
        weighing = weighing_of(self.config.teacher)
        for batch, numbers, own in records.batches(todo, source, reader):
            for record in self._stored(batch, *asked(batch, predict, weighing), numbers):
                if record.number in own:
                    shards.add(record)
        shards.flush()

    def _predictor(self, reader: AnySide) -> Callable[[Batch], Prediction]:
        settings = self.config.teacher
        assert settings is not None
        if isinstance(self.teacher, ForeignParts):
            assert isinstance(reader, ForeignSide)
            return placed_foreign(settings, self.world, self.teacher, reader)
        return placed_teacher(settings, self.world, self.teacher, shares_tower=False)

    def _stored(
        self, batch: Batch, prediction: Prediction, dependency_P: Tensor | None, numbers: Sequence[int]
    ) -> Iterator[StoredRecord]:
        """What to keep of each record that is not bad; `dependency_P` is of the flat places of the batch."""
        inputs = batch.student.to("cpu")
        length = inputs.input_ids_BT.shape[1]
        per_image = _tokens_per_image(self.teacher)
        encoded, positions, images = [], [], []
        for b in range(len(numbers)):
            tokens = slice(0, int((inputs.segment_ids_BT[b] == 1).sum()))
            tensors = (inputs.input_ids_BT, inputs.labels_BT, inputs.visual_BT)
            ids, labels, visual = (tensor_BT[b, tokens] for tensor_BT in tensors)
            encoded.append(Encoded(ids=ids, labels=labels, visual=visual))
            positions.append(self._places(encoded[-1]))
            first = images[-1].stop if images else 0
            images.append(slice(first, first + (int(visual.sum()) // per_image if per_image else 0)))
        places_M = torch.cat([b * length + of_row.long() for b, of_row in enumerate(positions)])
        hidden_ME = prediction.hidden_BTD.flatten(0, 1)[places_M.to(prediction.hidden_BTD.device)]
        kept = {name: tensor.cpu() for name, tensor in self._kept(hidden_ME, prediction).items()}
        if dependency_P is not None:
            kept["dependency_M"] = dependency_P.cpu()[places_M]
        counts = [len(of_row) for of_row in positions]
        parts = {name: tensor.split(counts) for name, tensor in kept.items()}
        for b, number in enumerate(numbers):
            is_valid = bool(inputs.image_is_valid_I[images[b]].all())
            if len(encoded[b].ids) == 1 or not is_valid or len(positions[b]) == 0:
                continue  # a stand-in, or an image that could not be read: named in bad_records.jsonl
            tensors = {name: of_rows[b] for name, of_rows in parts.items()}
            if self.contents.projected:
                of_record = prediction.projected_IND[images[b]]
                tensors["projected_INE"] = of_record.reshape(-1, per_image, of_record.shape[2]).cpu()
            crc = text_crc(batch.record_ids[b], encoded[b])
            yield StoredRecord(number=number, text_crc=crc, positions_M=positions[b], tensors=tensors)

    def _places(self, encoded: Encoded) -> Tensor:
        """Where the record is stored; of a talk in another template than the student's also one row before
        each answer, which stands beside a token that only the student's answer may begin with.
        """
        places_M = places_to_store(encoded, self.contents.places)
        if not isinstance(self.teacher, ForeignParts):
            return places_M
        is_target = encoded.labels != IGNORE_INDEX
        begins = (is_target[2:] & ~is_target[1:-1]).nonzero().squeeze(1)
        return torch.cat([places_M, begins.to(places_M.dtype)]).unique()

    def _kept(self, hidden_ME: Tensor, prediction: Prediction) -> dict[str, Tensor]:
        contents = self.contents
        if contents.mode == "hidden":
            return {"hidden_ME": hidden_ME}
        assert contents.k is not None
        assert contents.columns is not None
        assert contents.temperature is not None
        bias_U = prediction.bias_V
        chunks = [
            largest(
                hidden_CE,
                prediction.head_VD[: contents.columns],
                None if bias_U is None else bias_U[: contents.columns],
                k=contents.k,
                temperature=contents.temperature,
                cap=prediction.cap,
            )
            for hidden_CE in hidden_ME.split(_LOGIT_ROWS)
        ]
        return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


def asked(
    batch: Batch, predict: Callable[[Batch], Prediction], weighing: Weighing | None
) -> tuple[Prediction, Tensor | None]:
    """What a teacher says of a batch, and, [P] of its flat places, how much it needs the picture there.

    None without a weighing; else it is asked without the picture too, and its places between answers are 0.
    """
    if weighing is None:
        return predict(batch), None
    inputs = batch.student
    unseen = predict(replace(batch, student=weighing.without_pictures(inputs)))
    seen = predict(batch)
    score_N = weighing.score(inputs, seen, unseen)
    flat_P = score_N.new_zeros(inputs.input_ids_BT.numel())
    return seen, flat_P.index_copy(0, response_rows(inputs), score_N)


def _tokens_per_image(teacher: AnyParts) -> int:
    """0 where pictures have other numbers of them."""
    if isinstance(teacher, ForeignParts):
        return 0 if teacher.grid is None else teacher.grid.num_tokens
    return teacher.tokens_per_image


def largest(
    hidden_ME: Tensor,
    head_CE: Tensor,
    bias_C: Tensor | None,
    *,
    k: int,
    temperature: Temperature,
    cap: float | None = None,
) -> dict[str, Tensor]:
    """The k largest fp32 logits of each row, their columns, and log of sum(exp(z / T)) over the others.

    At the temperature `std` T is each row's own deviation, and is given too. Names as in `TeacherRows`.
    """
    logits_MC = hidden_ME.new_empty((len(hidden_ME), len(head_CE)), dtype=torch.float32)
    gemm.write_logits(hidden_ME, head_CE, logits_MC)
    if bias_C is not None:
        logits_MC = logits_MC + bias_C.float()
    cap_(logits_MC, cap)
    top_MK, columns_MK = logits_MC.topk(k, dim=1)
    others_MC = logits_MC.scatter(1, columns_MK, -torch.inf)
    kept = {"top_logits_MK": top_MK, "top_columns_MK": columns_MK.to(torch.int32)}
    if not isinstance(temperature, str):
        return kept | {"rest_M": (others_MC / temperature).logsumexp(1)}
    std_M = deviation(logits_MC - logits_MC.mean(1, keepdim=True))
    return kept | {"rest_M": (others_MC / std_M.unsqueeze(1)).logsumexp(1), "std_M": std_M}
