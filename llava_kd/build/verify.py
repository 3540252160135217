"""The check of a dataset before a run, as a model would read it."""

from __future__ import annotations

from pathlib import Path

from llava_kd.build.data import TABLES_AND_SHARDS, open_source, side_of
from llava_kd.config import DataConfig
from llava_kd.data.verify import Report, verify, verify_file, write_sound
from llava_kd.models.checkpoint import load_config, load_processor


def verify_data(
    config: DataConfig, *, model: str | None = None, sound: str | None = None, num_threads: int = 1
) -> Report:
    """Check the records of `data.path`; with a `model` directory their lengths too, read by its template.

    `sound` is a new LLaVA file for the records without a fault. Raises ValueError for what cannot be read.
    """
    assert config.path is not None
    side = None if model is None else side_of(load_processor(model), load_config(model), config)
    if Path(config.path).suffix in TABLES_AND_SHARDS:
        if sound is not None:
            raise ValueError(
                f"only records of a LLaVA JSON file can be written out, not those of {config.path}"
            )
        source = open_source(config.path, config.images)
        return verify(source, side=side, num_threads=num_threads, progress=True)
    if sound is not None and Path(sound).exists():
        raise ValueError(f"{sound} exists; give a new file for the sound records")
    report = verify_file(
        config.path,
        config.images or Path(config.path).parent,
        side=side,
        follow_symlinks=config.follow_symlinks,
        num_threads=num_threads,
        progress=True,
    )
    if sound is not None:
        write_sound(config.path, sound, report)
    return report
