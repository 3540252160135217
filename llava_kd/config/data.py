"""The settings of records, and of how they become sequences."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Le
from typing_extensions import Doc

from llava_kd.config.ranges import NotNegativeInt, PositiveFloat, PositiveInt, Share, require

_Images = Annotated[str | None, Doc("Root folder of the images; null: the folder of `path`.")]


@dataclass(frozen=True, kw_only=True)
class PackingConfig:
    """Rows hold several records, up to both budgets; `micro_batch_size` then counts rows."""

    max_tokens: Annotated[PositiveInt, Doc("Largest number of tokens in a row.")]
    max_images: Annotated[PositiveInt, Doc("Largest number of images in a row.")] = 64
    packs_per_step: Annotated[
        PositiveInt | None,
        Doc("Rows per optimiser step; null: as many as hold about `global_batch_size` records."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A part of a mixture."""

    path: Annotated[str, Doc("As `data.path`.")]
    images: _Images = None
    weight: Annotated[PositiveFloat, Doc("How many times each epoch reads the records of this source.")] = 1.0
    template: Annotated[
        str | None, Doc("Prompt template of this source, by name; null: `data.template`.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Either `path`, or `sources`."""

    path: Annotated[
        str | None, Doc("LLaVA JSON or JSON Lines file, or a pattern of `.tar`, `.parquet`, `.arrow` files.")
    ] = None
    images: _Images = None
    sources: Annotated[list[SourceConfig], Doc("Mixture of several sources, instead of `path`.")] = field(
        default_factory=list
    )
    records: Annotated[
        str | None, Doc("File of `llava-kd data select` that lists the records to read; null: all records.")
    ] = None
    follow_symlinks: Annotated[bool, Doc("Allow links that lead out of an image root.")] = False
    template: Annotated[
        str,
        Doc("Prompt template; `auto`: that of the model directory, else that of the language model family."),
    ] = "auto"
    max_length: Annotated[
        PositiveInt, Doc("Largest number of tokens in a sequence; the rest is cut off.")
    ] = 2048
    image_aspect: Annotated[
        Literal["square", "pad"],
        Doc("`square`: as the image processor does; `pad`: first pad to a square with the mean colour."),
    ] = "square"
    exif: Annotated[
        Literal["ignore", "apply"],
        Doc("EXIF orientation of photos; `apply` turns them upright first, also in eval and chat."),
    ] = "ignore"
    decode: Annotated[
        Literal["cpu", "nvjpeg"],
        Doc(
            "`nvjpeg`: baseline JPEGs on the GPU; pixels differ from the CPU's, a damaged file stops the run."
        ),
    ] = "cpu"
    resize: Annotated[
        Literal["exact", "quick"],
        Doc("`exact`: as Pillow does; `quick`: a faster CPU kernel, which differs by 1 in some pixels."),
    ] = "exact"
    visual_alignment: Annotated[
        Literal["refuse", "resample"],
        Doc("If visual grids differ: `resample` maps the teacher's final states to the student's grid."),
    ] = "refuse"
    num_workers: Annotated[int, Ge(0), Le(1024), Doc("Data loader worker processes per rank.")] = 4
    image_cache_mb: Annotated[
        NotNegativeInt,
        Doc("Cache of resized images per worker, in MB, for data that is read more than once."),
    ] = 0
    packing: Annotated[
        PackingConfig | None, Doc("Pack several records into a row; null: one record per row.")
    ] = None
    max_bad_rate: Annotated[Share, Doc("The run stops if more than this share of the records is bad.")] = (
        0.001
    )

    def __post_init__(self) -> None:
        require(
            (self.path is None) == bool(self.sources),
            f"`data` needs either `path`, or `sources` (a list); got path={self.path} and "
            f"{len(self.sources)} sources",
        )
        require(
            self.images is None or self.path is not None,
            f"`data.images` ({self.images}) is only for `data.path`; set `images` in each of "
            "`data.sources` instead",
        )
        paths = [source.path for source in self.sources]
        doubled = sorted({path for path in paths if paths.count(path) > 1})
        require(
            not doubled,
            f"`data.sources` must name each source once; {doubled} is there twice: name it once, with "
            "the sum of the weights",
        )

    @property
    def parts(self) -> list[SourceConfig]:
        """The sources, or `path` as the only one."""
        return self.sources or [SourceConfig(path=self.path or "", images=self.images)]
