"""Encoded image bytes to pixels: strict decoding, and the resize and normalisation of a processor's config.

Shape legend: H height, W width, C channels, I images.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers import BaseImageProcessor

from llava_kd.data.pixels import compiled
from llava_kd.data.pixels.kept_pages import KeptPages
from llava_kd.data.pixels.modes import to_rgb
from llava_kd.data.pixels.orientation import AS_STORED, may_be_tagged, tag_of, turned
from llava_kd.data.pixels.png_text import without_text
from llava_kd.data.pixels.resize import Axis, check_filter, resize, resize_fast, resize_part

try:
    import simplejpeg
except ImportError:
    simplejpeg = None
try:
    import cv2  # pyright: ignore[reportMissingImports]
except ImportError:
    cv2 = None

MAX_PIXELS = 89_478_485  # Pillow's own default against decompression bombs
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff"),
    *("ppm", "pgm", "pbm", "pnm"),
)
MAX_SIDE = 1 << 17  # a thinner image costs memory and time that its pixels do not tell
GREY = 128
_MADE = 1 << 24  # pixels that may be made on the way to the resized image, where the image has fewer
_LFS = b"version https://git-lfs"
_JPEG_MAGIC = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"
_PILLOW_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def jpeg_decoder() -> str:
    """Who decodes JPEGs on the CPU, for a reader."""
    return "simplejpeg" if simplejpeg is not None else "OpenCV" if cv2 is not None else "Pillow"


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS, upright: bool = False) -> Tensor:
    """RGB pixels as uint8 [H, W, 3]; ValueError for what is not a whole, readable image of bounded size.

    The orientation tag is ignored and other modes become RGB as Pillow's `convert` does where that is
    faithful, since that is how published checkpoints were trained; of several frames the first is taken.
    With `upright` the picture is turned by it. Which pictures are bad does not depend on that.
    Quick JPEG decoders are used where installed; a JPEG that they cannot settle is Pillow's to judge, so
    every installation gives the same pixels.
    """
    pixels_HWC = _as_stored(data, max_pixels)
    if upright:
        pixels_HWC = turned(pixels_HWC, orientation(data, max_pixels=max_pixels))
    return torch.from_numpy(pixels_HWC)


def orientation(data: bytes, *, max_pixels: int = MAX_PIXELS) -> int:
    """The tag by which an image is to be turned; `AS_STORED` where it has none that can be read."""
    if not may_be_tagged(data):
        return AS_STORED
    try:
        with _open(data, max_pixels) as image:
            return tag_of(image)
    except _PILLOW_ERRORS:
        return AS_STORED


def _as_stored(data: bytes, max_pixels: int) -> np.ndarray:
    if not data:
        raise ValueError("the image file is empty")
    if data.startswith(_JPEG_MAGIC):
        if simplejpeg is not None:
            pixels = _decode_simplejpeg(data, max_pixels)
        elif cv2 is not None:
            pixels = _decode_cv2(data, max_pixels)
        else:
            pixels = None
        if pixels is not None:
            return pixels
    if data.startswith(_LFS):
        raise ValueError("it is a pointer of Git LFS, not an image; run `git lfs pull` in its folder")
    return _decode_pillow(data, max_pixels)


def check_size(width: int, height: int, max_pixels: int) -> None:
    """ValueError for more than `max_pixels` pixels, or a side of more than `MAX_SIDE`."""
    if width * height > max_pixels:
        raise ValueError(_too_large(max_pixels, f"{width} x {height}"))
    if max(width, height) > MAX_SIDE:
        raise ValueError(
            f"a side of an image may have at most {MAX_SIDE} pixels, got {width} x {height}; cut it up"
        )


def _too_large(max_pixels: int, found: str) -> str:
    return f"an image may have at most {max_pixels} pixels, got {found}; make it smaller"


def _decode_simplejpeg(data: bytes, max_pixels: int) -> np.ndarray | None:
    """Pixels, or None where Pillow must judge: four components, or a file that only warns."""
    assert simplejpeg is not None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    check_size(int(width), int(height), max_pixels)
    if colorspace in ("CMYK", "YCCK"):
        return None
    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=False, fastupsample=False)
    except ValueError as error:
        if "extraneous bytes" in str(error):  # the picture itself is whole
            return None
        raise ValueError(f"the JPEG is damaged: {error}") from None


def _decode_cv2(data: bytes, max_pixels: int) -> np.ndarray | None:
    """Pixels, or None where Pillow must judge: OpenCV fills the missing part of a cut file in silence."""
    assert cv2 is not None
    with _open(data, max_pixels) as image:
        if image.mode not in ("RGB", "L") or _JPEG_END not in data[-64:]:
            return None
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    return None if pixels is None else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Image with only its header read."""
    try:
        image = Image.open(io.BytesIO(without_text(data)), formats=FORMATS)
    except Image.DecompressionBombError as error:  # Pillow's own bound comes first, and names no sides
        pixels = re.search(r"\d+", str(error))
        raise ValueError(_too_large(max_pixels, pixels[0] if pixels else "more")) from None
    except _PILLOW_ERRORS as error:
        # Pillow names the stream that it could not identify, not what is wrong with it.
        detail = "" if isinstance(error, UnidentifiedImageError) else f": {error}"
        raise ValueError(f"not a readable image of {', '.join(FORMATS)}{detail}") from None
    check_size(*image.size, max_pixels)
    return image


def _decode_pillow(data: bytes, max_pixels: int) -> np.ndarray:
    with _open(data, max_pixels) as image:
        try:
            image.load()
        except _PILLOW_ERRORS as error:
            raise ValueError(f"the {image.format} file is damaged: {error}") from None
        try:
            return to_rgb(image)
        except _PILLOW_ERRORS as error:
            raise ValueError(f"the {image.format} file cannot be read faithfully: {error}") from None


@dataclass(frozen=True, kw_only=True)
class ImageTransform:
    """Pixels of a fixed size, normalised, as a model's image processor makes them.

    `aspect` "square" stretches to `size`; "pad" first pads to a square with the mean colour; "crop" resizes
    the shorter edge to `shortest_edge` and takes the middle. `resample` is Pillow's number of the filter.
    `exact` resizes as Pillow does, bit for bit; without it a CPU is far quicker and some pixels differ by 1.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: int = 3
    rescale: float = 1 / 255
    aspect: Literal["square", "pad", "crop"] = "square"
    shortest_edge: int | None = None
    exact: bool = True

    def __post_init__(self) -> None:
        check_filter(self.resample)

    @classmethod
    def from_processor(
        cls,
        processor: BaseImageProcessor,
        aspect: Literal["square", "pad"] = "square",
        *,
        exact: bool = True,
    ) -> ImageTransform:
        """What the processor's config says; "square" keeps a centre crop if that is what it does."""
        config = processor.to_dict()
        size = config["size"]
        crop = config.get("crop_size") if config.get("do_center_crop") else None
        shortest_edge = size.get("shortest_edge")
        if "height" in size:
            target = (size["height"], size["width"])
        elif shortest_edge is not None and crop is not None:
            target = (crop["height"], crop["width"])
        else:
            raise ValueError(
                f"the image processor must give a fixed size, got size {dict(size)} and crop {crop}; set "
                "height and width in preprocessor_config.json"
            )
        if shortest_edge is not None and shortest_edge < max(target):
            raise ValueError(f"the crop {target} must not exceed the resized shortest edge {shortest_edge}")
        pads = aspect == "pad" or bool(config.get("do_pad"))
        return cls(
            size=target,
            mean=_three(config["image_mean"]) if config.get("do_normalize", True) else (0.0, 0.0, 0.0),
            std=_three(config["image_std"]) if config.get("do_normalize", True) else (1.0, 1.0, 1.0),
            resample=int(config["resample"]),
            rescale=float(config["rescale_factor"]) if config.get("do_rescale", True) else 1.0,
            aspect="pad" if pads else "crop" if crop is not None and shortest_edge is not None else "square",
            shortest_edge=shortest_edge,
            exact=exact,
        )

    def __call__(self, pixels_HWC: Tensor) -> Tensor:
        """float32 [C, H, W] from uint8 [H, W, C]."""
        return self.normalise(self.resize(pixels_HWC)[None])[0]

    def resize(self, pixels_HWC: Tensor) -> Tensor:
        """uint8 pixels of `size`, padded or cropped as `aspect` says."""
        height, width = pixels_HWC.shape[:2]
        pads = self.aspect == "pad" and height != width
        inner = (max(height, width), max(height, width)) if pads else (height, width)
        whole = self._whole_size(height, width)
        if (height, width) == whole == self.size:
            return pixels_HWC
        if pixels_HWC.device.type != "cpu" or self.is_thin(height, width):
            return self._resize_part(pixels_HWC, inner, whole)
        if pads:
            pixels_HWC = pad_to_square(pixels_HWC, self.mean)
        function = resize if self.exact else resize_fast
        return centre_crop(function(pixels_HWC, whole, self.resample), self.size)

    def is_thin(self, height: int, width: int) -> bool:
        """Whether Pillow would make far more pixels on the way than the image and the result have."""
        padded = max(height, width) if self.aspect == "pad" else 0
        rows, whole = max(height, padded), self._whole_size(height, width)
        # The padded square, a row's new width for every row, the whole.
        return max(padded**2, rows * whole[1], whole[0] * whole[1]) > max(_MADE, 1.5 * height * width)

    def _whole_size(self, height: int, width: int) -> tuple[int, int]:
        """To what the image is resized, before it is cropped."""
        if self.aspect != "crop":
            return self.size
        assert self.shortest_edge is not None
        scaled = int(self.shortest_edge * max(height, width) / min(height, width))
        return (scaled, self.shortest_edge) if height > width else (self.shortest_edge, scaled)

    def _resize_part(self, pixels_HWC: Tensor, inner: tuple[int, int], whole: tuple[int, int]) -> Tensor:
        """The same, bit for bit, without what is padded or cut off: for thin images, and on a GPU."""
        lengths = zip(pixels_HWC.shape[:2], inner, whole, self.size, strict=True)
        rows, columns = (
            Axis(
                length=length,
                out=out,
                wanted=range((out - size) // 2, (out - size) // 2 + size),
                start=(length - own) // 2,
            )
            for own, length, out, size in lengths
        )
        colour_C = None if self.aspect != "pad" else _colour(self.mean)
        return resize_part(pixels_HWC, rows, columns, self.resample, colour_C)

    def normalise(self, pixels_IHWC: Tensor, pages: KeptPages | None = None) -> Tensor:
        """float32 [I, C, H, W] from uint8 [I, H, W, C], equal bit for bit to the stock processor's.

        On the CPU `pages` may lend the memory of the result.
        """
        device = pixels_IHWC.device
        pixels_ICHW = pixels_IHWC.permute(0, 3, 1, 2)
        if pages is None or device.type != "cpu":
            result_ICHW = torch.empty(pixels_ICHW.shape, device=device)
        else:
            result_ICHW = pages.take(pixels_ICHW.shape)
        if compiled.can_look_up(pixels_IHWC):
            compiled.look_up(pixels_IHWC, _normalised_values(self), result_ICHW)
            return result_ICHW
        if _arithmetic_is_exact(self, device):
            return _arithmetic(self, pixels_ICHW, result_ICHW)
        table = _normalised_values(self).flatten().to(device)
        first_C11 = 256 * torch.arange(3, dtype=torch.int32, device=device).view(3, 1, 1)
        return result_ICHW.copy_(table[pixels_ICHW.int() + first_C11])


@lru_cache(maxsize=16)
def _normalised_values(transform: ImageTransform) -> Tensor:
    """What the stock processor makes of each value in each channel: [C, 256]."""
    values = (np.arange(256, dtype=np.float64) * transform.rescale).astype(np.float32)
    mean = np.array(transform.mean, dtype=np.float32)[:, None]
    std = np.array(transform.std, dtype=np.float32)[:, None]
    return torch.from_numpy((values - mean) / std)


def _arithmetic(transform: ImageTransform, pixels_ICHW: Tensor, result_ICHW: Tensor) -> Tensor:
    """The same in float32, division by division: a product with a reciprocal differs in the last bit."""
    divisor_C11, mean_C11, std_C11 = _constants(transform, pixels_ICHW.device)
    return result_ICHW.copy_(pixels_ICHW).div_(divisor_C11).sub_(mean_C11).div_(std_C11)


@lru_cache(maxsize=16)
def _constants(transform: ImageTransform, device: torch.device) -> Tensor:
    """Divisor, mean and standard deviation as tensors of every channel, never as one number."""
    constants = ((1 / transform.rescale,) * 3, transform.mean, transform.std)
    return torch.tensor(constants, dtype=torch.float32, device=device).view(3, 3, 1, 1)


@lru_cache(maxsize=16)
def _arithmetic_is_exact(transform: ImageTransform, device: torch.device) -> bool:
    values_1C1V = torch.arange(256, dtype=torch.uint8, device=device).expand(1, 3, 1, 256)
    result_1C1V = torch.empty(values_1C1V.shape, device=device)
    result_CV = _arithmetic(transform, values_1C1V, result_1C1V)[0, :, 0]
    return torch.equal(result_CV.cpu(), _normalised_values(transform))


def _three(values: float | list[float]) -> tuple[float, float, float]:
    if isinstance(values, (int, float)):
        return (float(values), float(values), float(values))
    first, second, third = values
    return (first, second, third)


def pad_to_square(pixels_HWC: Tensor, mean: tuple[float, float, float]) -> Tensor:
    """The image in the middle of a square of the mean colour."""
    height, width, _ = pixels_HWC.shape
    if height == width:
        return pixels_HWC
    side = max(height, width)
    square_HWC = _colour(mean).expand(side, side, 3).clone()
    top, left = (side - height) // 2, (side - width) // 2
    square_HWC[top : top + height, left : left + width] = pixels_HWC
    return square_HWC


def _colour(mean: tuple[float, float, float]) -> Tensor:
    return torch.tensor([int(x * 255) for x in mean], dtype=torch.uint8)


def centre_crop(pixels_HWC: Tensor, size: tuple[int, int]) -> Tensor:
    top, left = (pixels_HWC.shape[0] - size[0]) // 2, (pixels_HWC.shape[1] - size[1]) // 2
    return pixels_HWC[top : top + size[0], left : left + size[1]]
