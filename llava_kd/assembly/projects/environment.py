"""`llava-kd env`: what a bug report needs to say of the machine, and nothing that it should not.

No variable of the environment, no host name, no path: of the repository its commit, of packages versions.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path

from llava_kd import __version__
from llava_kd.assembly.planning.machine import GB, Machine

REQUIRED = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pillow", "draccus", "triton")
OPTIONAL = (
    *("deepspeed", "flash-attn", "timm", "open_clip_torch", "torchvision", "peft", "bitsandbytes"),
    *("wandb", "tensorboard", "simplejpeg", "pyarrow", "openpyxl", "lmms-eval"),
)


def describe() -> str:
    """Lines of `name: value`."""
    import torch  # late: it takes seconds
    import torch.cuda.nccl

    machine = Machine.here()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "none"
    libc = " ".join(platform.libc_ver()) or "libc unknown"
    missing = [name for name in OPTIONAL if _version(name) is None]
    lines = {
        "llava_kd": f"{__version__}, commit {commit()}",
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}, {libc}",
        **{name: _version(name) or "not installed" for name in REQUIRED},
        "torch": torch.__version__,  # with the CUDA that it was built for
        "optional": ", ".join(f"{name} {_version(name)}" for name in OPTIONAL if name not in missing)
        or "none",
        "not installed": ", ".join(missing) or "none",
        "cuda": f"{torch.version.cuda or 'none'} of torch, driver {driver()}, nccl {nccl}",
        "gpus": ", ".join(f"{gpu.name} ({gpu.memory / GB:.0f} GB)" for gpu in machine.gpus) or "none",
        "cpu": f"{processor()}, {machine.cores} cores for this process",
        "memory": f"{machine.memory / GB:.0f} GB free",
    }
    return "\n".join(f"{name:<14} {value}" for name, value in lines.items())


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """Of the checkout that the package lies in; `unknown` for an installed one."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return "unknown"
    return _output("git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*") or "unknown"


def driver() -> str:
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    return found or "none"


def processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or "unknown"
    found = re.search(r"^model name\s*: (.*)$", text, re.M)
    return found[1] if found else platform.processor() or "unknown"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
