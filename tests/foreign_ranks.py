"""Teachers of other families whose layers lie spread over the ranks: what test_foreign.py starts.

Each rank says how far their states are from those of the same teacher whole.
"""

from __future__ import annotations

import json
from pathlib import Path

from test_models_any_teacher import TALKS, inputs_of

from llava_kd.assembly.parts.foreign.teachers import foreign_side, placed_foreign
from llava_kd.batch import Batch
from llava_kd.config import DataConfig, TeacherConfig
from llava_kd.models.foreign.loading import load_foreign
from llava_kd.parallel.world import join


def main(root: str, out: str) -> None:
    world = join("cpu", timeout_minutes=5)
    found = {}
    for folder in sorted(Path(root).iterdir()):
        states = []
        for placement in ("replicated", "fsdp"):
            parts = load_foreign(str(folder))
            settings = TeacherConfig(checkpoint=str(folder), dtype="float32", placement=placement)
            predict = placed_foreign(settings, world, parts, foreign_side(parts, DataConfig(path="x")))
            states.append(predict(Batch(student=inputs_of(parts, list(TALKS)))).hidden_BTD)
        layer = next(iter(predict.model.layers[0].parameters()))
        found[folder.name] = [float((states[0] - states[1]).abs().max()), type(layer).__name__]
    Path(f"{out}.{world.rank}").write_text(json.dumps(found))
