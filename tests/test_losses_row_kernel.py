"""The Triton row kernels: right in the interpreter, compiled for sm_90 without spills. No GPU needed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, CompilationError, CompiledKernel  # noqa: E402

from llava_kd.losses.kernels import row_kernel, row_std, row_tail, row_triton  # noqa: E402

HERE = Path(__file__).parent
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
MODULES = {"tail": row_tail, "spread": row_std, "along": row_std}
SM_90 = GPUTarget("cuda", 90, 32)


@pytest.fixture(scope="module")
def interpreted() -> dict:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}:{HERE.parent}"}
    done = subprocess.run(
        [sys.executable, str(HERE / "kernel_in_interpreter.py")],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_kernels_equal_the_reference(interpreted: dict):
    for case, errors in interpreted["errors"].items():
        assert errors["ce"] <= 1e-5, case
        assert errors["kl"] <= 1e-5, case
        # The interpreter cuts bf16 off instead of rounding it: up to one part in 128.
        assert errors["gradient"] <= (6e-3 if "bf16" in case else 3e-6), case


def test_head_loss_with_the_kernels_equals_the_reference(interpreted: dict):
    for case, error in (interpreted["whole_head_loss"] | interpreted["whole_top_k"]).items():
        assert error <= 5e-6, case


def test_bad_logit_makes_its_row_nan_and_no_other(interpreted: dict):
    alone = [False, True, False, False]
    for case, (ce, kl, gradient) in interpreted["bad_rows"].items():
        assert ce == (alone if case.startswith("student") else [False] * 4), case
        assert kl == alone, case
        assert gradient == alone, case


def test_target_outside_the_vocabulary_makes_its_row_nan(interpreted: dict):
    assert interpreted["bad_target"] == [False, True, True]


def test_divergence_and_gradient_of_equal_models_are_zero(interpreted: dict):
    for kind, (divergence, gradient) in interpreted["equal_models"].items():
        assert divergence == 0, kind
        # The gradient of the skewed forms subtracts a mean from what it is the mean of.
        assert gradient <= (4e-7 if kind.startswith("skewed") else 0), kind


def test_small_divergences_of_mixtures_have_no_bias(interpreted: dict):
    for kind, (error, exact) in interpreted["biases"].items():
        # A skewed form still holds the error of the two log-softmaxes.
        assert abs(error) <= (1e-8 if kind == "jsd" else 4e-7) + 1e-5 * exact, kind


def compiled(name: str, *, kind: str, logits: str, gradient: str, is_std: bool = False) -> CompiledKernel:
    """A kernel as it is launched for heads whose rows are a multiple of 16, as of every real vocabulary."""
    kernel = getattr(MODULES.get(name, row_kernel), name)
    constants = {
        "KIND": kind,
        "HAS_TEACHER": True,
        "HAS_STUDENT_BIAS": False,
        "HAS_TEACHER_BIAS": False,
        "IS_UNIT_TEMPERATURE": not is_std,
        "IS_STD": is_std,
        "IS_TEACHER_STANDARD": False,
        "NUM_STATISTICS": row_triton.NUM_STATISTICS,
        "BLOCK": row_triton.BLOCK // (row_triton.TAIL_PART if name == "tail" else 1),
    }
    pointers = {"student_ptr": logits, "teacher_ptr": logits, "gradient_ptr": gradient, "target_ptr": "*i64"}
    integers = ("num_classes", "teacher_classes", "num_common", "student_stride", "teacher_stride")
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            signature[argument] = pointers.get(argument, "*fp32")
        else:
            signature[argument] = "i32" if argument in integers else "fp32"
    divisible = {
        (position,): [["tt.divisibility", 16]]
        for position, argument in enumerate(kernel.arg_names)
        if argument.endswith(("_ptr", "_classes", "_stride"))
    }
    values = {(kernel.arg_names.index(k),): v for k, v in constants.items() if k in kernel.arg_names}
    source = ASTSource(kernel, signature=signature, constexprs=values, attrs=divisible)
    return triton.compile(source, target=SM_90, options={"num_warps": row_triton.NUM_WARPS})


@pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this Triton brings no cuobjdump")
@pytest.mark.parametrize("logits", ["*fp32", pytest.param("*fp16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("statistics", "forward"),
        ("mixture", "jsd"),
        ("gradient", "forward"),
        ("gradient", "jsd"),
        pytest.param("statistics", "reverse", marks=pytest.mark.slow),
        pytest.param("mixture", "skewed_reverse", marks=pytest.mark.slow),
        pytest.param("gradient", "reverse", marks=pytest.mark.slow),
        pytest.param("gradient", "skewed_reverse", marks=pytest.mark.slow),
        ("tail", "adaptive"),
        ("spread", "forward std"),
        ("along", "forward std"),
        pytest.param("statistics", "adaptive", marks=pytest.mark.slow),
        pytest.param("statistics", "symmetric std", marks=pytest.mark.slow),
        pytest.param("mixture", "total_variation", marks=pytest.mark.slow),
        pytest.param("gradient", "total_variation", marks=pytest.mark.slow),
        pytest.param("gradient", "adaptive", marks=pytest.mark.slow),
        pytest.param("gradient", "jsd std", marks=pytest.mark.slow),
    ],
)
def test_kernel_for_sm_90_spills_nothing_and_loads_16_bytes(
    name: str, kind: str, logits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    kind, _, temperature = kind.partition(" ")
    kernel = compiled(name, kind=kind, logits=logits, gradient="*bf16", is_std=temperature == "std")
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])

    def dump(what: str) -> str:
        return subprocess.run(
            [CUOBJDUMP, what, binary], capture_output=True, text=True, check=True
        ).stdout  # fmt: skip

    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", dump("-res-usage")))
    assembly = dump("-sass")
    assert (usage["STACK"], usage["LOCAL"]) == ("0", "0"), usage
    assert not re.search(r"\b(STL|LDL)\b", assembly), "registers are spilled"
    # Two programs on a multiprocessor at the least, or memory latency is not hidden.
    assert int(usage["REG"]) * 32 * row_triton.NUM_WARPS * 2 <= 65536, usage
    assert "LDG.E.128" in assembly
    if name == "gradient":
        assert "cvt.rn.bf16" in kernel.asm["ptx"], "dz must be rounded to nearest"


@pytest.mark.parametrize("name", ["mixture", "gradient", "along"])
def test_a_divergence_that_a_kernel_lacks_does_not_compile(name: str) -> None:
    with pytest.raises(CompilationError) as caught:
        compiled(name, kind="another", logits="*fp32", gradient="*bf16")
    inner = caught.value.__cause__ or caught.value  # of the function that the kernel calls
    assert "lacks this kind of divergence" in str(inner)
