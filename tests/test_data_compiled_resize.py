"""The resize in C: every kernel is exact, refuses what it may not touch, lets threads run, is optional."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from compiled_resample import MOST_SUM, SANITISED, build, call, has_compiler, load
from data_samples import pixels
from test_data_resize import by_pillow

from llava_kd.data.pixels import compiled
from llava_kd.data.pixels.images import ImageTransform
from llava_kd.data.pixels.resize import BICUBIC, BILINEAR, resize, resize_by_c, resize_by_pillow, taps

ROOT = Path(__file__).parents[1]
KERNELS = ("avx2", "neon", "plain")
needs_compiler = pytest.mark.skipif(not has_compiler(), reason="there is no C compiler, or no Python.h")
IDENTITY = (np.arange(4, dtype=np.int32), np.tile(np.array([1 << 22, 0, 0, 0], np.int32), (4, 1)))


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Built from the source as it stands, whatever is installed."""
    return load(build(tmp_path_factory.mktemp("resample")))


@pytest.fixture
def built(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(compiled, "_resample", module)
    monkeypatch.setattr(compiled, "KERNELS", tuple(module.kernels()))
    return module


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, built: ModuleType) -> str:
    if request.param not in built.kernels():
        pytest.skip(f"the kernel {request.param} does not run on this CPU")
    return request.param


@needs_compiler
@pytest.mark.parametrize("resample", [BILINEAR, BICUBIC], ids=["bilinear", "bicubic"])
def test_equals_pillow_on_random_sizes(kernel: str, resample: int) -> None:
    rng = np.random.default_rng(resample)
    for number in range(1200):
        height, width, *size = rng.integers(1, 130, 4).tolist()
        if number % 12 == 0:
            height, width = (height, 1) if number % 24 else (1, width)
        values = np.array([0, 255], np.uint8) if number % 2 else np.arange(256, dtype=np.uint8)
        image = rng.choice(values, (height, width, 3))
        made = resize_by_c(torch.from_numpy(image), (size[0], size[1]), resample, kernel).numpy()
        assert np.array_equal(made, by_pillow(image, (size[0], size[1]), resample)), (image.shape, size)


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((480, 640), (384, 384)),
        ((640, 480), (384, 384)),
        ((1, 1), (384, 384)),
        ((1, 20_000), (24, 24)),
        ((20_000, 1), (24, 24)),
        ((3, 20_000), (384, 384)),
        ((20_000, 40), (384, 7)),
        ((1200, 1600), (48, 64)),
        ((17, 31), (1, 1)),
        ((24, 24), (24, 24)),
        ((2, 3), (700, 900)),
    ],
)
def test_equals_pillow_on_chosen_sizes(kernel: str, shape: tuple[int, int], size: tuple[int, int]) -> None:
    image = pixels(*shape)
    made = resize_by_c(torch.from_numpy(image), size, BICUBIC, kernel).numpy()
    assert np.array_equal(made, by_pillow(image, size, BICUBIC))


@needs_compiler
def test_any_weights_within_the_bound_give_the_sums_of_the_definition(tmp_path: Path) -> None:
    done = _run(build(tmp_path))
    assert done.returncode == 0, done.stderr


PLANTED = {
    "a half less": ("(int32_t)(sum + (1u <<", "(int32_t)(sum - 1 + (1u <<"),
    "one pixel to the right": (
        "const uint8_t *pixel = rows + row * stride + CHANNELS * (int64_t)axis->first[x];",
        "const uint8_t *pixel = rows + row * stride + CHANNELS * (int64_t)(axis->first[x] + 1);",
    ),
    "the last tap left out": ("k < axis->taps; k++, pixel", "k < axis->taps - 1; k++, pixel"),
    "a ring that is too small": ("rows->taps + GROUP && ring_rows < rows->length + GROUP", "rows->taps"),
    "a row too few": ("first + k < stop ? first + k", "first + k < stop - 1 ? first + k"),
    "rows not aligned to groups": ("rows->first[0] / GROUP * GROUP", "rows->first[0]"),
    "no clipping": ("value < 0 ? 0 : value > 255 ? 255 : value", "value"),
    "green for blue": ("table[512 + pixels[2]]", "table[512 + pixels[1]]"),
}
PLANTED_AVX2 = {
    "low bits lost": ("pair_avx2(weights[k] & low_mask", "pair_avx2(weights[k] & (low_mask >> 1)"),
    "high part not signed": ("_mm256_srai_epi32(whole, LOW_BITS)", "_mm256_srli_epi32(whole, LOW_BITS + 1)"),
    "a tail too short": ("last, (size_t)(width - x));", "last, (size_t)(width - x) - 1);"),
}


@needs_compiler
@pytest.mark.parametrize("name", [*PLANTED, *PLANTED_AVX2])
def test_a_planted_slip_is_found(tmp_path: Path, module: ModuleType, name: str) -> None:
    if name in PLANTED_AVX2 and "avx2" not in module.kernels():
        pytest.skip("this CPU has no AVX2")
    assert _run(build(tmp_path, "-O1", planted={**PLANTED, **PLANTED_AVX2}[name])).returncode != 0


def _run(library: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Whether a library is right, asked in a process of its own, which a wrong one may end."""
    return subprocess.run(
        [sys.executable, str(ROOT / "tests" / "compiled_resample.py"), str(library), "400"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def _with(axis: tuple[np.ndarray, np.ndarray], first: object = None, weights: object = None) -> tuple:
    return (axis[0] if first is None else first, axis[1] if weights is None else weights)


def _ints(*values: object) -> np.ndarray:
    return np.array(values, np.int32)


BAD_AXES = {
    "no output": _with(IDENTITY, _ints(), _ints()),
    "half an output": _with(IDENTITY, np.zeros(6, np.uint8)),
    "taps that do not divide": _with(IDENTITY, weights=np.zeros((4, 6), np.int32)),
    "no taps": _with(IDENTITY, weights=_ints()),
    "a first input before the first": _with(IDENTITY, _ints(-1, 0, 1, 2)),
    "a first input behind the last": _with(IDENTITY, _ints(0, 1, 2, 4)),
    "falling first inputs": _with(IDENTITY, _ints(0, 2, 1, 3)),
    "a weight behind the last input": _with(IDENTITY, weights=np.full((4, 4), 1, np.int32)),
    "weights that overflow": _with(IDENTITY, weights=IDENTITY[1] * 0 + _ints(MOST_SUM + 1, 0, 0, 0)),
    "the most negative weight": _with(IDENTITY, weights=IDENTITY[1] * 0 + _ints(-(1 << 31), 0, 0, 0)),
    "a table that is not aligned": _with(IDENTITY, np.zeros(17, np.uint8)[1:]),
}


@needs_compiler
@pytest.mark.parametrize("name", BAD_AXES)
@pytest.mark.parametrize("is_across", [False, True], ids=["down", "across"])
def test_an_axis_out_of_bounds_is_refused(module: ModuleType, name: str, is_across: bool) -> None:
    axes = (IDENTITY, BAD_AXES[name]) if is_across else (BAD_AXES[name], IDENTITY)
    with pytest.raises(ValueError, match=r"^(an axis|the weights of an axis|the first inputs and .*) must"):
        call(module, "plain", pixels(4, 4), *axes)


@needs_compiler
def test_other_sizes_that_do_not_fit_are_refused(module: ModuleType) -> None:
    image, out = pixels(4, 4), np.zeros((4, 4, 3), np.uint8)
    assert np.array_equal(call(module, "plain", image, IDENTITY, IDENTITY), image)
    tables = (*IDENTITY, *IDENTITY)
    for height, width in ((4, 5), (3, 4), (0, 4), (4, -4), ((1 << 24) + 1, 4), ((1 << 63) - 1, 4)):
        with pytest.raises(ValueError, match="must"):
            module.resize("plain", image, height, width, *tables, out)
    for short in (image[:, :3].copy(), image[:0], np.zeros(47, np.uint8)):
        with pytest.raises(ValueError, match="pixels must be uint8"):
            module.resize("plain", short, 4, 4, *tables, out)
        with pytest.raises(ValueError, match="pixels must be uint8"):
            module.resize("plain", image, 4, 4, *tables, short.copy())
    with pytest.raises(ValueError, match=r"no such kernel runs here; kernels\(\) names"):
        module.resize("sse9", image, 4, 4, *tables, out)
    with pytest.raises(TypeError):
        module.resize("plain", image, 4, 4, *tables, bytes(48))
    with pytest.raises((ValueError, BufferError, TypeError)):
        module.resize("plain", image[:, ::-1], 4, 4, *tables, out)
    table, values = np.zeros((3, 256), np.float32), np.zeros((1, 3, 4, 4), np.float32)
    planes = [(plane, table, values) for plane in (0, 15, -16, 1 << 62)]
    for plane, one, other in (*planes, (16, table[:2], values), (16, table, values[0, :2])):
        with pytest.raises(ValueError, match="pixels must be uint8"):
            module.look_up(image, plane, one, other)


def table_of(length: int, out: int) -> tuple[np.ndarray, np.ndarray]:
    table = compiled.Table.of(*taps(length, out, BICUBIC))
    return table.first_T, table.weight_TK


@needs_compiler
def test_other_threads_run_meanwhile_and_do_not_disturb(built: ModuleType) -> None:
    """With a switch interval without end, a thread gets the interpreter only where it is given up."""
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1500, 1500, 3)).astype(np.uint8))
    expected = resize_by_pillow(image, (1400, 1400), BICUBIC)
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(lambda _: resize(image, (1400, 1400), BICUBIC), range(8)))
    assert all(torch.equal(one, expected) for one in made)
    before, ran = sys.getswitchinterval(), False
    rows = columns = table_of(1500, 1400)
    pixels_HWC, out_HWC = image.numpy(), np.empty((1400, 1400, 3), np.uint8)
    arguments = (pixels_HWC, 1500, 1500, *rows, *columns, out_HWC)
    try:
        for _ in range(100):  # the other thread must also be given a core in that time
            gate, done = threading.Lock(), threading.Event()
            gate.acquire()
            thread = threading.Thread(target=lambda gate=gate, done=done: (gate.acquire(), done.set()))
            thread.start()
            sys.setswitchinterval(1e6)
            gate.release()
            built.resize("plain", *arguments)
            ran = done.is_set()
            sys.setswitchinterval(before)
            thread.join()
            if ran:
                break
    finally:
        sys.setswitchinterval(before)
    assert ran


@needs_compiler
@pytest.mark.parametrize("aspect", ["square", "pad", "crop"])
def test_pixels_do_not_depend_on_the_compiler(
    built: ModuleType, aspect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    transform = ImageTransform(
        size=(48, 48),
        mean=(0.48, 0.45, 0.4),
        std=(0.26, 0.27, 0.28),
        aspect=aspect,  # pyright: ignore[reportArgumentType]
        shortest_edge=50,
    )
    images = [torch.from_numpy(pixels(height, 70)) for height in (33, 70, 150)]
    images += [image.transpose(0, 1) for image in images]  # as a picture that is turned upright
    in_c = [transform(image) for image in images]
    assert compiled.resizer() == f"the part in C ({built.kernels()[0]})"
    monkeypatch.setattr(compiled, "KERNELS", ())
    assert compiled.resizer() == "Pillow"
    assert all(torch.equal(transform(image), one) for image, one in zip(images, in_c, strict=True))


def _wheel(folder: Path, compiler: str) -> list[str]:
    """Names of the files in a wheel of the package."""
    import zipfile

    names = ["pyproject.toml", "setup.py", "README.md", "LICENSE"]
    for name in names:
        shutil.copy(ROOT / name, folder / name)
    ignored = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    shutil.copytree(ROOT / "llava_kd", folder / "llava_kd", ignore=ignored)
    code = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "CC": compiler},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with zipfile.ZipFile(folder / done.stdout.splitlines()[-1]) as wheel:
        return wheel.namelist()


def test_a_wheel_is_built_without_a_compiler(tmp_path: Path) -> None:
    names = _wheel(tmp_path, "false")
    assert "llava_kd/data/pixels/compiled.py" in names
    assert not [name for name in names if name.endswith((".so", ".pyd"))]


@needs_compiler
def test_a_wheel_has_the_part_in_c_for_every_later_python(tmp_path: Path) -> None:
    (library,) = [name for name in _wheel(tmp_path, "cc") if name.endswith((".so", ".pyd"))]
    suffix = ".so" if sysconfig.get_config_var("Py_GIL_DISABLED") else ".abi3.so"
    assert library.startswith("llava_kd/data/pixels/_resample.")
    assert library.endswith(suffix)


def _sanitised(folder: Path, planted: tuple[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    library = build(folder, *SANITISED, planted=planted)
    runtime = subprocess.run(
        ["cc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("the compiler has no AddressSanitizer")
    return _run(library, LD_PRELOAD=runtime, ASAN_OPTIONS="detect_leaks=0")


@needs_compiler
@pytest.mark.slow
def test_sanitisers_find_nothing(tmp_path: Path) -> None:
    done = _sanitised(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    "planted",
    [
        ("+ reach > rows->length * stride", "+ stride > rows->length * stride"),
        ("row < done + GROUP && row < rows->length", "row < done + GROUP"),
        ("(width + 1 + BLOCK - 1) / BLOCK * BLOCK", "width"),
    ],
    ids=["reads behind the image", "copies behind the image", "writes behind the ring"],
)
def test_sanitisers_find_a_planted_overrun(tmp_path: Path, planted: tuple[str, str]) -> None:
    assert "ERROR: AddressSanitizer" in _sanitised(tmp_path, planted).stderr
