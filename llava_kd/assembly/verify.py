"""The check of a dataset before a run, as a model would read it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llava_kd.assembly.parts.data import side_of
from llava_kd.assembly.plugins import OURS, Tables
from llava_kd.config import DataConfig
from llava_kd.data.sound import write_sound_entries, write_sound_records
from llava_kd.data.sources.kinds import Place, kind_of, open_source
from llava_kd.data.verify import Report, verify, verify_file
from llava_kd.models.files.checkpoint import load_config, load_processor
from llava_kd.models.files.upright import reads_upright


def verify_data(
    config: DataConfig,
    *,
    model: str | None = None,
    sound: str | None = None,
    num_threads: int = 1,
    tables: Tables = OURS,
) -> Report:
    """Check the records of `data.path`; with a `model` directory their lengths too, read by its template.

    `sound` is a new file for the records without a fault: a LLaVA file where they are of one, and a .tar or
    .parquet file, with the images, where they are of tables or shards. Raises ValueError for what cannot be
    read.
    """
    assert config.path is not None
    place = Place(path=config.path, images=config.images, follow_symlinks=config.follow_symlinks)
    kind = kind_of(place.path, tables.sources)
    if sound is not None:
        _check_new(Path(sound), (".json", ".jsonl") if kind.is_llava else (".tar", ".parquet"))
    side = None
    if model is not None:
        processor = load_processor(model)
        reading = replace(config, exif="apply" if reads_upright(processor) else "ignore")
        side = side_of(processor, load_config(model), reading, templates=tables.templates)
    if not kind.is_llava:
        source = open_source(place, tables.sources)
        report = verify(source, side=side, num_threads=num_threads, progress=True)
        if sound is not None:
            write_sound_records(source, Path(sound), report.unsound)
        return report
    report = verify_file(
        place.path,
        place.image_root,
        side=side,
        follow_symlinks=place.follow_symlinks,
        num_threads=num_threads,
        progress=True,
    )
    if sound is not None:
        write_sound_entries(Path(place.path), Path(sound), report.unsound)
    return report


def _check_new(sound: Path, suffixes: tuple[str, ...]) -> None:
    """Before the long look, not after it."""
    if sound.exists():
        raise ValueError(f"the file for the valid records must be new; {sound} exists: name another")
    if not sound.parent.is_dir():
        raise ValueError(
            f"the folder of the file for the valid records must exist; there is no {sound.parent}: create it"
        )
    if sound.suffix not in suffixes:
        raise ValueError(f"the file for the valid records must end in {' or '.join(suffixes)}; got {sound}")
