"""The loader, and how each model reads records."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import LlavaConfig, LlavaImageProcessor, LlavaImageProcessorPil, LlavaProcessor
from transformers.utils.import_utils import is_torchvision_available

from llava_kd.assembly.parts.cross.tokenizers import are_other, spellers_of
from llava_kd.assembly.parts.foreign.teachers import foreign_side
from llava_kd.assembly.parts.objective import terms_of
from llava_kd.assembly.parts.stored_teacher import open_cache
from llava_kd.assembly.settings import tables_of
from llava_kd.config import DataConfig, PackingConfig, StudentConfig, TeacherConfig, TrainConfig
from llava_kd.data.batches.bad_records import BadRecord, refuse_faults
from llava_kd.data.batches.loader import Loader, Side
from llava_kd.data.batches.model_side import AnySide
from llava_kd.data.batches.order import Order, Reading
from llava_kd.data.batches.packing import Packing
from llava_kd.data.pixels.images import ImageTransform
from llava_kd.data.record_lists import chosen
from llava_kd.data.sources.conversation import Source
from llava_kd.data.sources.kinds import SOURCES, FileSource, Place, SourceKind, open_source
from llava_kd.data.sources.mixture import Mixture
from llava_kd.data.teacher_store.store import TeacherCache
from llava_kd.data.text.private import PATTERNS, Tagger
from llava_kd.data.text.template import Template
from llava_kd.data.text.template_choice import choose
from llava_kd.data.text.template_table import TEMPLATES
from llava_kd.models.attention.row_limits import check_rows
from llava_kd.models.files.checkpoint import Parts
from llava_kd.models.files.upright import reads_upright, remember
from llava_kd.models.foreign.loading import AnyParts, ForeignParts, as_llava
from llava_kd.models.towers.vision_tower import input_size, text_config, tokens_per_image, tower_fingerprint
from llava_kd.parallel.world import World

BAD_RECORDS = "bad_records.jsonl"


def side(
    parts: Parts,
    config: DataConfig,
    template: str | None = None,
    *,
    templates: Mapping[str, Template] = TEMPLATES,
) -> Side:
    """How one model reads records; `template` is its own where it has one."""
    return side_of(parts.processor, parts.stock.config, config, template, templates=templates)


def side_in(config: TrainConfig, parts: Parts, its: StudentConfig | TeacherConfig) -> Side:
    """The same for a stage, whose templates and `its` own are asked."""
    return side(parts, config.data, its.template, templates=tables_of(config).templates)


def side_of(
    processor: LlavaProcessor,
    model: LlavaConfig,
    config: DataConfig,
    template: str | None = None,
    *,
    templates: Mapping[str, Template] = TEMPLATES,
) -> Side:
    """The same from what needs no weights.

    ValueError for longer rows than the language model can read, and for a model that was trained on photos
    turned upright where `config` leaves them as they are stored.
    """
    if config.exif == "ignore" and reads_upright(processor):
        raise ValueError(
            "`data.exif` is ignore, but an image processor has do_exif_transpose, so its model was "
            "trained on photos turned upright; set data.exif to apply (pictures without the tag stay "
            "unchanged)"
        )
    max_tokens = None if config.packing is None else config.packing.max_tokens
    own = sorted({part.template for part in config.sources if part.template is not None})
    if unknown := [name for name in own if name not in templates]:
        raise ValueError(
            f"`data.sources[].template` must be one of {', '.join(templates)}, or null for data.template; "
            f"got {unknown[0]!r}"
        )
    check_rows(text_config(model), max_length=config.max_length, max_tokens=max_tokens)
    return Side(
        tokenizer=processor.tokenizer,
        template=choose(
            template or config.template,
            tokenizer=processor.tokenizer,
            model_type=text_config(model).model_type,
            chat_template=processor.chat_template,
            templates=templates,
        ).template,
        image_token_id=model.image_token_id,
        tokens_per_image=tokens_per_image(model, input_size(processor.image_processor)),
        transform=ImageTransform.from_processor(
            processor.image_processor, config.image_aspect, exact=config.resize == "exact"
        ),
        max_length=config.max_length,
        upright=config.exif == "apply",
        source_templates={name: templates[name] for name in own},
    )


def served(parts: Parts, config: DataConfig) -> Parts:
    """The model with a processor of its own that makes the pixels of `config`, for whoever loads it later.

    Stock LLaVA's image processor is the one that pads to a square, as `image_aspect: pad` does. None turns
    photos upright: `data.exif` is remembered for our own commands, and the model card says it to others.
    """
    processor = copy.copy(parts.processor)
    if config.image_aspect == "pad":
        transform = ImageTransform.from_processor(processor.image_processor, config.image_aspect)
        size = {"height": transform.size[0], "width": transform.size[1]}
        kind = LlavaImageProcessor if is_torchvision_available() else LlavaImageProcessorPil
        processor.image_processor = kind(
            do_pad=True,
            size=size,
            do_center_crop=False,
            crop_size=size,
            resample=transform.resample,
            rescale_factor=transform.rescale,
            image_mean=list(transform.mean),
            image_std=list(transform.std),
        )
    remember(processor, upright=config.exif == "apply")
    return Parts(stock=parts.stock, processor=processor)


def bad_records(output: Path) -> int:
    """How many records a run found bad, each counted once."""
    path = output / BAD_RECORDS
    if not path.is_file():
        return 0
    return len(set(path.read_text(encoding="utf-8").splitlines()))


def make_source(config: DataConfig, *, seed: int = 0, kinds: Mapping[str, SourceKind] = SOURCES) -> Source:
    """The records of files of these `kinds`, read and checked, or those of them that `data.records` names.

    `seed` draws what a mixture reads of a source that it reads in part.

    Raises ValueError for a pattern that matches nothing, for more unusable records than a run allows, and for
    a list of other records.
    """
    sources = open_sources(config, kinds)
    if config.records is not None:
        sources = chosen(sources, config.records)
    faults = [
        BadRecord(id=source.record(i).id, source=source.name_of(i), reason=source.record(i).fault)
        for source in sources.values()
        for i in source.faults
    ]
    refuse_faults(faults, num_records=sum(map(len, sources.values())), max_rate=config.max_bad_rate)
    if not config.sources:
        return next(iter(sources.values()))
    return Mixture(
        list(sources.values()),
        [part.weight for part in config.sources],
        names=list(sources),
        templates=[part.template for part in config.sources],
        seed=seed,
    )


def open_sources(config: DataConfig, kinds: Mapping[str, SourceKind] = SOURCES) -> dict[str, FileSource]:
    """Every source whole, by the name that it is reported by: its file's, or its path where two are alike."""
    files = [Path(part.path).name for part in config.parts]
    return {
        file if files.count(file) == 1 else part.path: open_source(
            Place(path=part.path, images=part.images, follow_symlinks=config.follow_symlinks), kinds
        )
        for file, part in zip(files, config.parts, strict=True)
    }


def source_in(config: TrainConfig) -> Source:
    """The records of a stage, of its plug-ins' kinds too."""
    return make_source(config.data, seed=config.seed, kinds=tables_of(config).sources)


def make_packing(config: PackingConfig | None) -> Packing | None:
    if config is None:
        return None
    return Packing(
        max_tokens=config.max_tokens, max_images=config.max_images, packs_per_step=config.packs_per_step
    )


def tagger_in(config: TrainConfig) -> Tagger | None:
    """What finds private tokens; None where nobody asks. ValueError for a pattern that there is not."""
    settings = config.token_policy
    if settings is None:
        return None
    if unknown := [s.pattern for s in settings.spans if s.pattern is not None and s.pattern not in PATTERNS]:
        raise ValueError(
            f"`token_policy.spans[].pattern` must be one of {', '.join(PATTERNS)}; got {unknown[0]!r}; or "
            "give your own expression as `regex`"
        )
    return Tagger(
        patterns=tuple((s.regex or PATTERNS[s.pattern or ""], s.score) for s in settings.spans),
        reads_spans=settings.record_spans,
        ocr_score=settings.ocr_score,
    )


def make_loader(
    config: TrainConfig, world: World, student: Parts, teacher: AnyParts | None, source: Source | None = None
) -> tuple[Loader, bool]:
    """The loader, and whether both models have the same tower, so that it runs once.

    `source` is the records, where they are read already.
    """
    data = config.data
    if data.resize == "quick" and world.device.type != "cpu":
        raise ValueError(
            f"`data.resize` quick runs only on the CPU, but this run resizes on {world.device.type}; set "
            "it to exact, which costs no CPU time there"
        )
    if source is None:
        source = source_in(config)
    student_side = side_in(config, student, config.student)
    teacher_side, shares_tower, cache, spellers = None, False, None, None
    if teacher is not None:
        if are_other(terms_of(config.objective), student, teacher):
            assert config.teacher is not None
            other = as_llava(teacher, "`objective` over two tokenizers")
            spellers = spellers_of(config, (student_side, side_in(config, other, config.teacher)))
        teacher_side, shares_tower, cache = _teacher_side(config, student, teacher, student_side, source)
    loader = Loader(
        source=source,
        student=student_side,
        teacher=teacher_side,
        order=Order(
            seed=config.seed,
            global_batch_size=config.global_batch_size,
            micro_batch_size=config.micro_batch_size,
            rank=world.rank,
            world_size=world.size,
            packing=make_packing(data.packing),
        ),
        reading=Reading(
            num_workers=data.num_workers,
            decoder=data.decode,
            image_cache_bytes=data.image_cache_mb * 2**20,
            progress=config.log.progress and world.is_main,
            max_bad_rate=data.max_bad_rate,
            bad_records_path=Path(config.output_dir) / BAD_RECORDS,
            spellers=spellers,
        ),
        device=world.device,
        teacher_cache=cache,
        tagger=tagger_in(config),
    )
    return loader, shares_tower


def _teacher_side(
    config: TrainConfig, student: Parts, teacher: AnyParts, student_side: Side, source: Source
) -> tuple[AnySide | None, bool, TeacherCache | None]:
    """How the teacher reads, None where as the student does; whether they share a tower; what is stored."""
    its = config.teacher or config.peer
    assert its is not None
    if isinstance(teacher, ForeignParts):
        assert config.teacher is not None
        is_stored = config.teacher.cache is not None
        foreign = foreign_side(teacher, config.data, keeps_pictures=not is_stored)
        if not is_stored:
            return foreign, False, None
        cache = open_cache(config, foreign, source)
        contents = cache.manifest.contents
        if contents.mode == "topk" and "visual" in contents.places:
            _refuse_other_grid(cache, student, teacher)
        return foreign, False, cache
    own = side_in(config, teacher, its)
    reads_alike = own.reads_as(student_side)
    if config.teacher is None or config.teacher.cache is None:
        shares_tower = same_tower(config, student, teacher)
        return (None if reads_alike and shares_tower else own), shares_tower, None
    if own.template != student_side.template:
        raise ValueError(
            "with `teacher.cache`, student and teacher must have the same template; the student's is "
            f"{student_side.template.name}, the teacher's {own.template.name}; set data.template, or "
            "teacher.cache to null"
        )
    cache = open_cache(config, own, source)
    if cache.manifest.contents.mode == "topk":
        _refuse_other_grid(cache, student, teacher)
    # The cache checks the tokens.
    return (None if teacher.tokens_per_image == student.tokens_per_image else own), False, cache


def _refuse_other_grid(cache: TeacherCache, student: Parts, teacher: AnyParts) -> None:
    if teacher.visual_grid != student.visual_grid:
        raise ValueError(
            f"{cache.directory} stores logits, which cannot be resampled to the student's grid; write a "
            "cache with --mode hidden, or use the teacher's tower"
        )


def same_tower(config: TrainConfig, student: Parts, teacher: Parts) -> bool:
    """By hash, never by name: weights in the computing type, preprocessing, layer and strategy."""
    if "vision_tower" in config.trainable:
        return False
    dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    aspect = config.data.image_aspect
    prints = [
        tower_fingerprint(
            parts.stock.model.vision_tower,
            parts.stock.config,
            {"pixels": repr(ImageTransform.from_processor(parts.processor.image_processor, aspect))},
            dtype=dtype,
        )
        for parts in (student, teacher)
    ]
    return prints[0] == prints[1]
