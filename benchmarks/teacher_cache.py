"""A training step from a cache of the teacher's predictions, beside the step that runs the teacher.

Stage 3 of the quickstart on its own models, and beside a teacher large enough to dominate the step. Both read
their records through the loader, in turn; the floor is the cached step on a batch that is already there:
student, losses and optimiser alone. Seconds are those of the process on one thread, so that other work on the
machine does not count. `loss_difference` is the largest of the steps, relative; the k largest logits give a
lower bound of the divergence, not the same loss.

python benchmarks/teacher_cache.py --json benchmarks/results/teacher_cache_cpu.json
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from _common import Row, meta, parser, print_table, write_json
from transformers import LlavaForConditionalGeneration

from llava_kd.assembly.cache_teacher import cache_teacher
from llava_kd.assembly.parts.data import make_loader
from llava_kd.assembly.parts.models import student_parts
from llava_kd.assembly.parts.teacher import teacher_parts
from llava_kd.assembly.settings import load
from llava_kd.assembly.stage import assemble
from llava_kd.batch import Batch
from llava_kd.config import TrainConfig
from llava_kd.data.shapes.writing import write_shapes
from llava_kd.data.teacher_store.store import MANIFEST
from llava_kd.models.files.checkpoint import Parts, load_stock, save_stock
from llava_kd.parallel.world import World
from llava_kd.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
BACKBONES = ROOT / "scripts" / "quickstart" / "backbones"
ALONE = World(rank=0, size=1, device=torch.device("cpu"))
KL_ALONE = "--objective.relation=null"
COLUMNS = ("case", "impl", "step_cpu_s", "speedup", "loss_difference", "record_bytes", "write_cpu_s")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A trainer, and the batches of its steps."""

    trainer: Trainer
    batches: Callable[[int], Sequence[Batch]]

    def step(self, number: int) -> tuple[float, float]:
        """CPU seconds of reading and updating, and the loss."""
        start = time.process_time()
        result = self.trainer.step(self.batches(number), number)
        loss = float(result.means["loss"])
        return time.process_time() - start, loss


def settings(directory: Path, *words: str) -> TrainConfig:
    """Stage 3 of the quickstart, its student still to be trained."""
    tower, language_model = BACKBONES / "vision_tower", BACKBONES / "student_llm"
    return load(
        ROOT / "scripts" / "quickstart" / "stage3_dft.yaml",
        [
            f"--student={{vision_tower: {tower}, language_model: {language_model}}}",
            f"--teacher.checkpoint={BACKBONES / 'teacher'}",
            f"--data.path={directory / 'data' / 'instructions.json'}",
            f"--data.images={directory / 'data'}",
            f"--output_dir={directory / 'run'}",
            "--log.progress=false",
            *words,
        ],
    )


def wide_teacher(directory: Path, *, hidden: int, layers: int) -> Path:
    """The quickstart's teacher with a larger decoder of random weights, and its own tower."""
    small = load_stock(str(BACKBONES / "teacher"))
    config = type(small.stock.config)(**small.stock.config.to_dict())
    sizes: dict[str, object] = {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
    }
    sizes |= {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "head_dim": 64}
    sizes["layer_types"] = ["full_attention"] * layers
    for name, value in sizes.items():
        setattr(config.text_config, name, value)
    torch.manual_seed(0)
    stock = LlavaForConditionalGeneration(config)
    stock.model.vision_tower.load_state_dict(small.stock.model.vision_tower.state_dict())
    save_stock(Parts(stock=stock, processor=small.processor), directory)
    return directory


def arm(config: TrainConfig, *, fixed: bool = False) -> Arm:
    """The real trainer of a stage; `fixed` gives it its first batch again and again."""
    student = student_parts(config.student, template=config.data.template, seed=config.seed)
    teacher = teacher_parts(config)
    loader, _ = make_loader(config, ALONE, student, teacher)
    trainer, _ = assemble(config, ALONE, student, teacher, say=lambda _: None)
    if fixed:
        first = next(loader.batches(0, 1))
        return Arm(trainer=trainer, batches=lambda _: first)
    return Arm(trainer=trainer, batches=lambda number: next(loader.batches(number, number + 1)))


def measure(case: str, directory: Path, words: Sequence[str], steps: int) -> list[Row]:
    """Live, cached and floor, in turn, from the same start."""
    out = directory / f"cache {case}"
    start = time.process_time()
    mode = "topk" if "topk" in case else "hidden"
    cache_teacher(settings(directory, *words), out, mode=mode, top_k=32 if mode == "topk" else None)
    written = time.process_time() - start
    manifest = json.loads((out / MANIFEST).read_text())
    cached = settings(directory, *words, f"--teacher.cache={out}")
    arms = {
        "teacher live": arm(settings(directory, *words)),
        "from the cache": arm(cached),
        "floor: student alone, batch at hand": arm(cached, fixed=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    errors = []
    for number in range(steps):
        lost = {}
        for name, one in arms.items():
            taken, lost[name] = one.step(number)
            if number > 0:  # the first is a warm-up
                seconds[name].append(taken)
        live = lost["teacher live"]
        errors.append(abs(lost["from the cache"] - live) / abs(live))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows: list[Row] = [
        {"case": case, "impl": name, "step_cpu_s": value, "speedup": medians["teacher live"] / value}
        for name, value in medians.items()
    ]
    rows[1]["loss_difference"] = max(errors)
    rows[1]["record_bytes"] = round(sum(manifest["shards"].values()) / manifest["num_records"])
    rows[1]["write_cpu_s"] = written
    return rows


def main() -> None:
    flags = parser(__doc__ or "")
    flags.add_argument("--steps", type=int, default=12)
    flags.add_argument("--scenes", type=int, default=64)
    arguments = flags.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_shapes(
            directory / "data",
            num_train=arguments.scenes,
            num_validation=2,
            num_test=2,
            seed=0,
            progress=False,
        )
        wide = wide_teacher(directory / "wide", hidden=512, layers=8)
        cases = {
            "quickstart": [],
            "quickstart, topk 32": [KL_ALONE],
            "teacher 512 wide, 8 layers": [f"--teacher.checkpoint={wide}"],
        }
        for case, words in cases.items():
            rows += measure(case, directory, words, arguments.steps)
            print(case, file=sys.stderr)
    print_table(rows, list(COLUMNS))
    if arguments.json:
        write_json(arguments.json, meta=meta(device="cpu", steps=arguments.steps), rows=rows)


if __name__ == "__main__":
    main()
