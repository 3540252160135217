"""One whole distillation step: tower once, teacher forward, student forward and backward, optimiser.

Random weights at the paper's sizes (`--case tiny` for a CPU). Every switch of ours is turned off in turn, and
the plain two-model loop that users write today stands beside: logits materialised, one sample at a time.
`mfu` counts each product once (no recomputation) against `--peak_tflops`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from _common import Row, meta, parser, peak_extra_bytes, print_table, seconds_of, write_json
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, SiglipVisionConfig

from llava_kd.batch import IGNORE_INDEX, Batch, Inputs
from llava_kd.distill.formulas import FAST, Common
from llava_kd.distill.objective import Objective
from llava_kd.distill.student import Student
from llava_kd.distill.taught import Taught
from llava_kd.distill.teaching.live import Teacher
from llava_kd.distill.terms import TERMS
from llava_kd.losses import reference
from llava_kd.models.mllm import MLLM
from llava_kd.models.towers.vision_tower import text_config, tokens_per_image, vision_config
from llava_kd.parallel.engine import AdamWSettings, ParameterGroup
from llava_kd.parallel.torch_engine import TorchEngine
from llava_kd.parallel.world import World


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of both models and of a sample: `text` tokens beside the image, `response` of them targets."""

    teacher: dict[str, int | bool]
    student: dict[str, int | bool]
    tower: dict[str, int]
    batch: int
    text: int
    response: int


COLUMNS = (
    "case",
    "impl",
    "seconds",
    "samples_per_s",
    "ratio_to_ours",
    "mfu",
    "peak_gb",
    "peak_extra_bytes",
    "note",
)
_SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}


def _qwen(hidden: int, layers: int, heads: int, kv: int, inter: int, tied: bool, vocab: int = 151936) -> dict:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": inter,
        "tie_word_embeddings": tied,
        "vocab_size": vocab,
    }


CASES = {
    "qwen2.5-3b-0.5b": Case(
        teacher=_qwen(2048, 36, 16, 2, 11008, True),
        student=_qwen(896, 24, 14, 2, 4864, True),
        tower=_SO400M,
        batch=8,
        text=300,
        response=200,
    ),
    "qwen1.5-4b-0.5b": Case(
        teacher=_qwen(2560, 40, 20, 20, 6912, False),
        student=_qwen(1024, 24, 16, 16, 2816, True),
        tower=_SO400M,
        batch=8,
        text=300,
        response=200,
    ),
    "tiny": Case(
        teacher=_qwen(128, 4, 4, 2, 256, True, 8192),
        student=_qwen(64, 2, 4, 2, 128, True, 8192),
        tower={**_SO400M, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
        | {"num_attention_heads": 4, "image_size": 56},
        batch=4,
        text=48,
        response=32,
    ),
}


def random_model(llm: dict, tower: dict, *, device: str, dtype: torch.dtype, seed: int):
    """A stock LLaVA with random weights, made on the device."""
    text = Qwen2Config(**llm, max_position_embeddings=4096)
    vision = SiglipVisionConfig(**tower, vision_use_head=False)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=llm["vocab_size"] - 1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=llm["tie_word_embeddings"],
    )
    torch.manual_seed(seed)
    with torch.device(device):
        return LlavaForConditionalGeneration(config).to(dtype)


def random_batch(case: Case, config: LlavaConfig, *, device: str, size: int) -> Batch:
    visual = tokens_per_image(config)
    length = visual + case.text
    ids_BT = torch.randint(0, case.student["vocab_size"] - 1, (size, length), device=device)
    visual_BT = torch.zeros(size, length, dtype=torch.bool, device=device)
    visual_BT[:, 8 : 8 + visual] = True
    ids_BT[visual_BT] = config.image_token_id
    labels_BT = ids_BT.clone()
    labels_BT[:, : -case.response] = IGNORE_INDEX
    side = vision_config(config).image_size
    inputs = Inputs(
        input_ids_BT=ids_BT,
        labels_BT=labels_BT,
        position_ids_BT=torch.arange(length, device=device).expand(size, -1),
        segment_ids_BT=torch.ones_like(ids_BT),
        visual_BT=visual_BT,
        pixels_ICHW=torch.randn(size, 3, side, side, device=device),
        image_is_valid_I=torch.ones(size, dtype=torch.bool, device=device),
    )
    inputs = replace(inputs, known_places=inputs.places)  # as the loader hands it over
    return Batch(student=inputs, record_ids=tuple(f"record {i}" for i in range(size)))


class Ours:
    """The step as the trainer runs it, with one setting changed at a time."""

    def __init__(self, case: Case, *, device: str) -> None:
        bf16 = device == "cuda"
        frozen = torch.bfloat16 if bf16 else torch.float32
        teacher = random_model(case.teacher, case.tower, device=device, dtype=frozen, seed=0)
        student = random_model(case.student, case.tower, device=device, dtype=torch.float32, seed=1)
        student.model.vision_tower = teacher.model.vision_tower
        self.config = student.config
        self.batch = random_batch(case, student.config, device=device, size=case.batch)
        mllm = MLLM(student, trainable=("multi_modal_projector", "language_model"))
        names = ("cross_entropy", "response_kl", "visual_kl", "relation")
        terms = {name: TERMS[name]() for name in names}
        self.objective = Objective(
            terms=terms,
            common=Common(num_common=int(case.student["vocab_size"]), formulas=FAST),
        )
        self.student = Student(mllm, self.objective).train()
        self.teacher = Teacher(MLLM(teacher), shares_tower=True, keeps_head_gram=True)
        names = tuple(n for n, p in self.student.named_parameters() if p.requires_grad)
        self.engine = TorchEngine(
            self.student,
            [ParameterGroup(names=names, lr=1e-5)],
            world=World(rank=0, size=1, device=torch.device(device)),
            kind="single",
            adamw=AdamWSettings(),
            bf16=bf16,
        )

    def step(self) -> Tensor:
        counts = self.batch.counts()
        features = self.student.mllm.image_features(self.batch.student)
        taught = Taught(prediction=self.teacher(self.batch, features))
        loss, _ = self.engine.forward(self.batch, counts, features, taught, is_last=True)
        self.engine.backward(loss, is_last=True)
        self.engine.step(lr_multiplier=1.0, max_grad_norm=1.0)
        return loss.detach()

    def with_objective(self, **changes: object) -> Callable[[], Tensor]:
        changed = replace(self.objective, **changes)

        def step() -> Tensor:
            self.student.objective = changed
            return self.step()

        return step

    def with_own_towers(self) -> Tensor:
        self.student.objective = self.objective
        self.teacher.shares_tower = False
        loss = self.step()
        self.teacher.shares_tower = True
        return loss

    def with_checkpointing(self) -> Tensor:
        self.student.objective = self.objective
        stock = self.student.mllm.stock
        stock.gradient_checkpointing_enable({"use_reentrant": False})
        loss = self.step()
        stock.gradient_checkpointing_disable()
        return loss

    def plain_loop(self) -> Tensor:
        """What users have: both stock models with full logits, one sample at a time, accumulated."""
        student, teacher = self.student.mllm.stock, self.teacher.mllm.stock
        total = torch.zeros((), device=self.batch.student.input_ids_BT.device)
        rows = self.batch.student
        size = rows.input_ids_BT.shape[0]
        for i in range(size):
            reads = {"input_ids": rows.input_ids_BT[i : i + 1], "use_cache": False}
            pixels = rows.pixels_ICHW[i : i + 1]
            kind = rows.pixels_ICHW.device.type
            with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
                with torch.no_grad():
                    teacher_TV = teacher(**reads, pixel_values=pixels.to(teacher.dtype)).logits[0]
                student_TV = student(**reads, pixel_values=pixels.to(teacher.dtype)).logits[0]
            loss = _plain_loss(student_TV, teacher_TV, rows, i) / size
            loss.backward()
            total += loss.detach()
        self.engine.step(lr_multiplier=1.0, max_grad_norm=1.0)
        return total


def _plain_loss(student_TV: Tensor, teacher_TV: Tensor, rows: Inputs, i: int) -> Tensor:
    """CE, both KLs and the relation on materialised logits."""
    targets_T = rows.targets_BT[i]
    answered_T, visual_T = targets_T != IGNORE_INDEX, rows.visual_BT[i]
    ce = torch.nn.functional.cross_entropy(student_TV[answered_T].float(), targets_T[answered_T])
    kl = student_TV.new_zeros((), dtype=torch.float32)
    for mask_T in (answered_T, visual_T):
        logp_NV = student_TV[mask_T].float().log_softmax(-1)
        target_NV = teacher_TV[mask_T].float().log_softmax(-1)
        kl = kl + torch.nn.functional.kl_div(logp_NV, target_NV, log_target=True, reduction="batchmean")
    grams = [x[visual_T].float() @ x[visual_T].float().T for x in (student_TV, teacher_TV)]
    cosine = torch.nn.functional.cosine_similarity(grams[0].flatten(), grams[1].flatten(), dim=0)
    return ce + kl + 0.5 * (1 - cosine)


def _materialised(*features: Tensor, teacher_gram_EE: Tensor | None = None, **settings: object) -> Tensor:
    """The plain relation, which has no use for the Gram that the teacher keeps."""
    return reference.relation_rows(*features, **settings)


def tflop_of_step(case: Case, config: LlavaConfig) -> float:
    """Products of one step, each once: 2 x weights x tokens forward, 6 x with both gradients."""
    visual = tokens_per_image(config)
    tokens = case.batch * (visual + case.text)

    def body(llm: dict) -> float:
        head = llm["hidden_size"] // llm["num_attention_heads"]
        attention = llm["hidden_size"] ** 2 * 2 + 2 * llm["hidden_size"] * head * llm["num_key_value_heads"]
        weights = llm["num_hidden_layers"] * (attention + 3 * llm["hidden_size"] * llm["intermediate_size"])
        scores = (
            llm["num_hidden_layers"] * llm["hidden_size"] * (visual + case.text)
        )  # causal half of 4 L d T
        return 2 * weights + 2 * scores

    rows = case.batch * (visual + case.response)
    vocabulary = text_config(config).vocab_size
    head = 2 * vocabulary * (case.teacher["hidden_size"] + 3 * case.student["hidden_size"]) * rows
    width, inter = case.tower["hidden_size"], case.tower["intermediate_size"]
    tower = 2 * case.tower["num_hidden_layers"] * (4 * width**2 + 2 * width * inter) * case.batch * visual
    return (tower + (body(case.teacher) + 3 * body(case.student)) * tokens + head) / 1e12


def measure(name: str, case: Case, arguments: argparse.Namespace) -> list[Row]:
    ours = Ours(case, device=arguments.device)
    calls = {
        "ours": ours.with_objective(),
        "reference losses": ours.with_objective(head_loss=reference.head_loss, relation_rows=_materialised),
        "relation materialised": ours.with_objective(relation_rows=_materialised),
        "a tower each": ours.with_own_towers,
        "activation checkpointing": ours.with_checkpointing,
        "plain loop, batch 1": ours.plain_loop,
    }
    seconds: dict[str, list[float]] = {impl: [] for impl in calls}
    failed: dict[str, str] = {}
    for impl, call in calls.items():
        try:
            call()
        except torch.cuda.OutOfMemoryError:
            failed[impl] = "out of memory"
    for _ in range(arguments.repeats):
        for impl, call in calls.items():
            if impl not in failed:
                seconds[impl].append(seconds_of(call, device=arguments.device))
    work = tflop_of_step(case, ours.config)
    rows: list[Row] = []
    for impl, call in calls.items():
        row: Row = {"case": name, "impl": impl, "note": failed.get(impl, "")}
        if impl not in failed:
            median = statistics.median(seconds[impl])
            peak = peak_extra_bytes(call, device=arguments.device)
            row |= {"seconds": median, "samples_per_s": case.batch / median, "peak_extra_bytes": peak}
            row["ratio_to_ours"] = median / statistics.median(seconds["ours"])
            if arguments.device == "cuda":
                row["mfu"] = work / median / arguments.peak_tflops
                row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        rows.append(row)
    return rows


def main() -> None:
    flags = parser(__doc__ or "")
    flags.add_argument("--case", choices=(*CASES, "all"), help="default: tiny on a CPU, the paper's on a GPU")
    flags.add_argument("--repeats", type=int, default=10)
    flags.add_argument("--peak_tflops", type=float, default=989.0, help="dense bf16 peak of the GPU")
    arguments = flags.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    case = arguments.case or ("tiny" if arguments.device == "cpu" else "all")
    names = [name for name in CASES if name != "tiny"] if case == "all" else [case]
    rows = [row for name in names for row in measure(name, CASES[name], arguments)]
    print_table(rows, COLUMNS)
    if arguments.json:
        write_json(arguments.json, meta=meta(device=arguments.device), rows=rows)


if __name__ == "__main__":
    main()
