"""The loader, and how each model reads records."""

from __future__ import annotations

import glob
from pathlib import Path

import torch

from llava_kd.config import DataConfig, PackingConfig, TrainConfig
from llava_kd.data.conversation import Source
from llava_kd.data.images import ImageTransform
from llava_kd.data.loader import Loader, Side
from llava_kd.data.packing import Packing
from llava_kd.data.records import LlavaJson
from llava_kd.data.tar_shards import TarShards
from llava_kd.data.template import TEMPLATES
from llava_kd.models.checkpoint import Parts
from llava_kd.models.vision_tower import tower_fingerprint
from llava_kd.parallel.world import World


def side(parts: Parts, config: DataConfig) -> Side:
    """How one model reads records."""
    return Side(
        tokenizer=parts.processor.tokenizer,
        template=TEMPLATES[config.template],
        image_token_id=parts.stock.config.image_token_id,
        tokens_per_image=parts.tokens_per_image,
        transform=ImageTransform.from_processor(parts.processor.image_processor, config.image_aspect),
        max_length=config.max_length,
    )


def make_source(config: DataConfig) -> Source:
    """The records, read and checked. Raises ValueError for a pattern that matches nothing."""
    suffix = Path(config.path).suffix
    if suffix not in (".tar", ".parquet", ".arrow"):
        return LlavaJson(config.path, config.images or Path(config.path).parent)
    paths = sorted(glob.glob(config.path))
    if not paths:
        raise ValueError(f"`data.path` {config.path} matches no file")
    if suffix == ".tar":
        return TarShards(paths)
    from llava_kd.data.tables import Tables  # needs the optional package pyarrow

    return Tables(paths)


def make_packing(config: PackingConfig | None) -> Packing | None:
    if config is None:
        return None
    return Packing(
        max_tokens=config.max_tokens, max_images=config.max_images, packs_per_step=config.packs_per_step
    )


def make_loader(
    config: TrainConfig, world: World, student: Parts, teacher: Parts | None
) -> tuple[Loader, bool]:
    """The loader, and whether both models have the same tower, so that it runs once."""
    data = config.data
    teacher_side, shares_tower = None, False
    if teacher is not None:
        shares_tower = same_tower(config, student, teacher)
        if not shares_tower:
            teacher_side = side(teacher, data)
    loader = Loader(
        source=make_source(data),
        student=side(student, data),
        teacher=teacher_side,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.micro_batch_size,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
        num_workers=data.num_workers,
        packing=make_packing(data.packing),
        image_cache_bytes=data.image_cache_mb * 2**20,
        max_bad_rate=data.max_bad_rate,
        bad_records_path=Path(config.output_dir) / "bad_records.jsonl",
    )
    return loader, shares_tower


def same_tower(config: TrainConfig, student: Parts, teacher: Parts) -> bool:
    """By hash, never by name: weights in the computing type, preprocessing, layer and strategy."""
    if "vision_tower" in config.trainable:
        return False
    dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    prints = [
        tower_fingerprint(
            parts.stock.model.vision_tower,
            parts.stock.config,
            parts.processor.image_processor.to_dict(),
            dtype=dtype,
        )
        for parts in (student, teacher)
    ]
    return prints[0] == prints[1]
