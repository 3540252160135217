"""Peak memory of a distillation step against what `llava-kd check` estimates (assembly/planning/estimate.py).

Random weights; every row is full, two micro-batches make a step, and the peak is that of the second step,
where moments exist. On a GPU it is what its allocator held in tensors; on a CPU what PyTorch's allocator did,
from the profiler, so that memory outside tensors does not count. Several ranks: `torchrun --nproc-per-node=2
benchmarks/memory.py`; the row is that of rank 0.
"""

from __future__ import annotations

import argparse
import gc
import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from _common import Row, meta, parser, print_table, write_json
from step import CASES, Case, random_batch, random_model
from torch.profiler import ProfilerActivity, profile, record_function

from llava_kd.assembly.parts.engine import make_engine
from llava_kd.assembly.parts.models import DTYPES, place, student_dtypes
from llava_kd.assembly.parts.objective import terms_of
from llava_kd.assembly.planning.estimate import ModelSizes, memory
from llava_kd.config import (
    DataConfig,
    EngineConfig,
    OptimConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
    objective_type,
)
from llava_kd.distill.formulas import FAST, Common
from llava_kd.distill.objective import Objective
from llava_kd.distill.student import Student
from llava_kd.distill.taught import Taught
from llava_kd.distill.teaching.live import Teacher
from llava_kd.distill.terms import TERMS
from llava_kd.models.mllm import MLLM, PARTS
from llava_kd.models.towers.vision_tower import tokens_per_image
from llava_kd.parallel.world import World, join, leave

ENGINES = {
    "single": EngineConfig(kind="single"),
    "ddp": EngineConfig(kind="ddp"),
    "fsdp2": EngineConfig(kind="fsdp2"),
    "zero1": EngineConfig(kind="deepspeed", zero_stage=1),
    "zero2": EngineConfig(kind="deepspeed", zero_stage=2),
    "zero3": EngineConfig(kind="deepspeed", zero_stage=3),
}
MICRO_BATCHES = 2
MARK = "the step that is measured"
SMALL = Case(
    teacher={**CASES["tiny"].teacher, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6},
    student={**CASES["tiny"].student, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6},
    tower={**CASES["tiny"].tower, "image_size": 196},
    batch=4,
    text=140,
    response=100,
)
COLUMNS = (
    "case",
    "trained",
    "engine",
    "ranks",
    "precision",
    "checkpointing",
    "measured",
    "estimated",
    "ratio",
    "parts",
)


def settings(
    case: Case, length: int, engine: EngineConfig, ranks: int, trainable: Sequence[str]
) -> TrainConfig:
    """The stage that is measured, as the estimate reads it."""
    names = ("cross_entropy", "response_kl", "visual_kl", "relation")
    objective = objective_type(TERMS)(**{n: TERMS[n]() for n in names})  # pyright: ignore[reportArgumentType]
    return TrainConfig(
        output_dir="unused",
        student=StudentConfig(checkpoint="unused"),
        teacher=TeacherConfig(
            checkpoint="unused", dtype="bfloat16" if engine.precision == "bf16" else "float32"
        ),
        data=DataConfig(path="unused", max_length=length),
        objective=objective,
        optim=OptimConfig(lr=1e-5),
        trainable=list(trainable),
        global_batch_size=MICRO_BATCHES * case.batch * ranks,
        micro_batch_size=case.batch,
        engine=engine,
    )


class Run:
    """Models, engine and batches of one rank."""

    def __init__(self, case: Case, config: TrainConfig, world: World) -> None:
        assert config.teacher is not None
        device = str(world.device)
        teacher_dtype = DTYPES[config.teacher.dtype]
        teacher = random_model(case.teacher, case.tower, device=device, dtype=teacher_dtype, seed=0)
        student = random_model(case.student, case.tower, device=device, dtype=torch.float32, seed=1)
        self.sizes = ModelSizes.of(student, config), ModelSizes.of(teacher)
        self.mllm = MLLM(student, trainable=config.trainable)
        place(self.mllm, world.device, student_dtypes(config))
        if config.engine.activation_checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        terms = terms_of(config.objective)
        objective = Objective(
            terms=terms,
            common=Common(num_common=int(case.student["vocab_size"]), formulas=FAST),
        )
        self.module = Student(self.mllm, objective).train()
        self.engine = make_engine(config, world, self.module)
        teacher_mllm = MLLM(teacher)
        place(teacher_mllm, world.device, dict.fromkeys(PARTS, teacher_dtype))
        self.teacher = Teacher(teacher_mllm, shares_tower=True, keeps_head_gram=True)
        self.batches = [
            random_batch(case, student.config, device=device, size=case.batch) for _ in range(MICRO_BATCHES)
        ]

    def step(self) -> None:
        counts = self.batches[0].counts()
        for batch in self.batches:
            is_last = batch is self.batches[-1]
            features_INE = self.mllm.image_features(batch.student)
            taught = Taught(prediction=self.teacher(batch, features_INE))
            loss, _ = self.engine.forward(batch, counts, features_INE, taught, is_last=is_last)
            self.engine.backward(loss, is_last=is_last)
        self.engine.step(lr_multiplier=1.0, max_grad_norm=1.0)


def peak_on_cpu(events: list) -> int:
    """Most bytes held at once since the mark; the profiler saw every allocation from the first."""
    begins = next(event.start_ns() for event in events if event.name() == MARK)
    held = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        if event.start_ns() >= begins:
            most = max(most, held)
    return most


def measure(name: str, case: Case, world: World, engine: EngineConfig, trainable: Sequence[str]) -> Row:
    gc.collect()
    torch.manual_seed(0)
    length = case.text + tokens_per_image(
        random_model(case.student, case.tower, device="meta", dtype=torch.float32, seed=0).config
    )
    config = settings(case, length, engine, world.size, trainable)
    if world.device.type == "cuda":
        run = Run(case, config, world)
        run.step()
        torch.cuda.reset_peak_memory_stats()
        run.step()
        measured = torch.cuda.max_memory_allocated()
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run = Run(case, config, world)
            run.step()
            with record_function(MARK):
                run.step()
        assert profiler.profiler is not None
        assert profiler.profiler.kineto_results is not None
        measured = peak_on_cpu(list(profiler.profiler.kineto_results.events()))
    found = memory(config, world.size, *run.sizes)
    parts = ", ".join(f"{what} {size / 1e6:.0f}" for what, size in found.items() if size)
    return {
        "case": name,
        "trained": "projector" if len(trainable) == 1 else "projector, language model",
        "engine": f"zero{engine.zero_stage}" if engine.kind == "deepspeed" else engine.kind,
        "ranks": world.size,
        "precision": engine.precision,
        "checkpointing": engine.activation_checkpointing,
        "measured": measured,
        "estimated": round(sum(found.values())),
        "ratio": sum(found.values()) / measured,
        "parts": parts,
    }


def engines(arguments: argparse.Namespace, ranks: int) -> list[EngineConfig]:
    kinds = arguments.engines or (["single"] if ranks == 1 else ["ddp", "fsdp2"])
    precisions = ["bf16"] if arguments.device == "cuda" else ["fp32", "bf16"]
    switches = itertools.product(kinds, precisions, (False, True))
    return [
        replace(
            ENGINES[kind],
            precision=precision,
            activation_checkpointing=checkpointing,
            device=arguments.device,
        )
        for kind, precision, checkpointing in switches
    ]


def main() -> None:
    flags = parser(__doc__ or "")
    flags.add_argument(
        "--case", choices=("small", *CASES), help="default: small on a CPU, the paper's on a GPU"
    )
    flags.add_argument("--engines", nargs="*", choices=list(ENGINES), help="default: single; ddp and fsdp2")
    arguments = flags.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    world = join(arguments.device)
    name = arguments.case or ("small" if arguments.device == "cpu" else "qwen2.5-3b-0.5b")
    case = SMALL if name == "small" else CASES[name]
    rows = []
    trained = (("multi_modal_projector", "language_model"), ("multi_modal_projector",))
    for engine, trainable in itertools.product(engines(arguments, world.size), trained):
        rows.append(measure(name, case, world, engine, trainable))
        if world.is_main:
            print(rows[-1], flush=True)
    if world.is_main:
        print_table(rows, COLUMNS)
        if arguments.json:
            write_json(arguments.json, meta=meta(device=arguments.device, ranks=world.size), rows=rows)
    leave()


if __name__ == "__main__":
    main()
