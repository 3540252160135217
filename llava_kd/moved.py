"""Old names of modules that have moved, for code outside that imports them; each use warns.

To go with the next minor version. Nothing in the package uses them.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

_BY_ROOM = {
    "data.sources": "conversation entries mixture packed tables tar_shards tar_walk cache",
    "data.pixels": "images png_text resize device_decode",
    "data.text": "template template_choice template_origin template_reading template_table encoder alignment "
    "control_words",
    "data.batches": "plan packing lengths collate loader micro_batches device_stage worker_processes "
    "bad_records",
    "models.attention": "probe row_limits",
    "models.files": "checkpoint export card served",
    "models.projectors": "width_map",
    "models.towers": "plain_vit vision_tower visual_grid",
    "evaluation.generation": "generate prompt chat pictures model_directory questions ranks",
    "evaluation.report": "charts results",
    "losses.kernels": "row_kernel row_torch row_triton rows gemm",
}
_RENAMED = {
    "data.image_paths": "data.sources.pictures.image_paths",
    "data.sources.image_paths": "data.sources.pictures.image_paths",
    "data.records": "data.sources.llava_json",
    "data.teacher_cache": "data.teacher_store.store",
    "data.side": "data.batches.model_side",
    "models.packed_attention": "models.attention.packed",
    "models.visual_attention": "models.attention.visual",
}
MOVED = {
    f"llava_kd.{old}": f"llava_kd.{new}"
    for old, new in {
        **{
            f"{room.split('.')[0]}.{name}": f"{room}.{name}"
            for room, names in _BY_ROOM.items()
            for name in names.split()
        },
        **_RENAMED,
    }.items()
}


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives the module itself under its old name, so that both names hold the same objects."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        del path, target
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        new = MOVED[spec.name]
        warnings.warn(f"{spec.name} is now {new}", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """The import of the new name has run it; what the import system wrote over is put back."""
        if module.__spec__ is not None:
            module.__spec__ = module.__spec__.loader_state


def install() -> None:
    """After the finders that look for files: a module that exists is never taken for a moved one."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.append(Finder())
