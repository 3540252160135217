"""The settings of records, and of how they become sequences."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Le
from typing_extensions import Doc

from llava_kd.config.ranges import NotNegativeInt, PositiveFloat, PositiveInt, Share, require

_Images = Annotated[str | None, Doc("Image root; null is the folder of `path`.")]


@dataclass(frozen=True, kw_only=True)
class PackingConfig:
    """Rows hold several records, up to both budgets; `micro_batch_size` then counts rows."""

    max_tokens: Annotated[PositiveInt, Doc("Most tokens of a row.")]
    max_images: Annotated[PositiveInt, Doc("Most images of a row.")] = 64
    packs_per_step: Annotated[
        PositiveInt | None,
        Doc("Rows of an optimiser step; null: those of about `global_batch_size` records."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A part of a mixture."""

    path: Annotated[str, Doc("As `data.path`.")]
    images: _Images = None
    weight: Annotated[PositiveFloat, Doc("How many times an epoch reads its records.")] = 1.0
    template: Annotated[str | None, Doc("Of this source's prompts, by name; null is `data.template`.")] = None


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Either `path`, or `sources`."""

    path: Annotated[
        str | None, Doc("LLaVA JSON or JSON Lines file, or a pattern of `.tar`, `.parquet`, `.arrow` files.")
    ] = None
    images: _Images = None
    sources: Annotated[list[SourceConfig], Doc("Mixture of several sources, in place of `path`.")] = field(
        default_factory=list
    )
    records: Annotated[
        str | None, Doc("List of `llava-kd data select`: which records are read; null is all of them.")
    ] = None
    follow_symlinks: Annotated[bool, Doc("Let links lead out of an image root.")] = False
    template: Annotated[
        str, Doc("Of prompts; `auto`: the model directory's own, else its language model family's.")
    ] = "auto"
    max_length: Annotated[PositiveInt, Doc("Most tokens of a sequence; the rest is cut off.")] = 2048
    image_aspect: Annotated[
        Literal["square", "pad"],
        Doc("`square` as the image processor does; `pad` with the mean colour first, as the saved one does."),
    ] = "square"
    exif: Annotated[
        Literal["ignore", "apply"],
        Doc("Orientation tag of photos; `apply` turns them upright first, in eval and chat too."),
    ] = "ignore"
    decode: Annotated[
        Literal["cpu", "nvjpeg"],
        Doc("`nvjpeg`: baseline JPEGs on the GPU, other pixels; a damaged one then stops the run."),
    ] = "cpu"
    resize: Annotated[
        Literal["exact", "quick"],
        Doc("`exact` as Pillow does, or the CPU's `quick` kernel, which differs by 1 in some pixels."),
    ] = "exact"
    visual_alignment: Annotated[
        Literal["refuse", "resample"],
        Doc("Where visual tokens differ; `resample`: the teacher's final states to the student's grid."),
    ] = "refuse"
    num_workers: Annotated[int, Ge(0), Le(1024), Doc("Worker processes of each rank's loader.")] = 4
    image_cache_mb: Annotated[
        NotNegativeInt, Doc("Memory of each worker for resized images, where data come again.")
    ] = 0
    packing: Annotated[PackingConfig | None, Doc("Several records a row; null is one.")] = None
    max_bad_rate: Annotated[Share, Doc("A run stops where more than this share of the records is bad.")] = (
        0.001
    )

    def __post_init__(self) -> None:
        require(
            (self.path is None) == bool(self.sources),
            f"`data` needs either `path` or `sources`, a list; got path={self.path} and "
            f"{len(self.sources)} sources",
        )
        require(
            self.images is None or self.path is not None,
            f"`data.images` ({self.images}) belongs to `data.path`; each of `data.sources` has its own",
        )
        paths = [source.path for source in self.sources]
        doubled = sorted({path for path in paths if paths.count(path) > 1})
        require(
            not doubled, f"`data.sources` names {doubled} twice; give it once, with the sum of the weights"
        )

    @property
    def parts(self) -> list[SourceConfig]:
        """The sources, or `path` as the only one."""
        return self.sources or [SourceConfig(path=self.path or "", images=self.images)]
