"""What `check` adds for terms that keep more than rows of the head, against what autograd does keep.

Shape legend: B rows, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tiny_objectives import objective_of
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, SiglipVisionConfig

from llava_kd.assembly.parts.models import choose_attention
from llava_kd.assembly.planning.estimate import ModelSizes, memory_of_terms
from llava_kd.batch import IGNORE_INDEX, Batch, Inputs
from llava_kd.distill.student import Student
from llava_kd.distill.taught import Taught
from llava_kd.distill.teaching.from_teacher import FromTeacher
from llava_kd.distill.teaching.live import Teacher
from llava_kd.distill.teaching.switch import Switch
from llava_kd.distill.terms.attention import Attention
from llava_kd.distill.terms.cross_entropy import CrossEntropy
from llava_kd.distill.terms.term import Term
from llava_kd.distill.terms.visual_switch import VisualSwitch
from llava_kd.models.attention.visual import middle_layers
from llava_kd.models.mllm import MLLM

ROWS, TOKENS, IMAGE_TOKENS, VOCABULARY = 2, 256, 144, 300


def stock(width: int, layers: int) -> LlavaForConditionalGeneration:
    text = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=144,
        patch_size=12,
    )  # fmt: skip
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=VOCABULARY - 1,
        vision_feature_layer=-2, vision_feature_select_strategy="full",
    )  # fmt: skip
    return LlavaForConditionalGeneration(config).eval()


def batch() -> Batch:
    visual_BT = torch.zeros(ROWS, TOKENS, dtype=torch.bool)
    visual_BT[:, 5 : 5 + IMAGE_TOKENS] = True
    ids_BT = torch.randint(0, VOCABULARY - 10, (ROWS, TOKENS))
    places_BT = torch.arange(TOKENS).expand(ROWS, TOKENS).contiguous()
    side = Inputs(
        input_ids_BT=ids_BT,
        labels_BT=torch.where(places_BT > 200, ids_BT, IGNORE_INDEX),
        position_ids_BT=places_BT,
        segment_ids_BT=torch.ones_like(ids_BT),
        visual_BT=visual_BT,
        pixels_ICHW=torch.rand(ROWS, 3, 144, 144),
        image_is_valid_I=torch.ones(ROWS, dtype=torch.bool),
    )
    return Batch(student=side, record_ids=("a", "b"))


@dataclass
class Sides:
    student: LlavaForConditionalGeneration
    teacher: LlavaForConditionalGeneration

    def kept(self, **terms: Term) -> int:
        """Bytes that the student's forward saves for its backward, without parameters."""
        student = MLLM(self.student, trainable=("multi_modal_projector", "language_model"))
        teacher = MLLM(self.teacher)
        for model in (student, teacher):
            choose_attention(model.language_model, torch.device("cpu"), torch.float32, whose="model")
            if "attention" in terms:
                model.watch_attention(middle_layers(len(model.language_model.layers), 0.3, 0.7))
        switch = None
        if "visual_switch" in terms:
            switch = Switch(teacher=teacher, source="projector", width_map_DE=torch.randn(128, 256))
        frozen = Teacher(teacher, shares_tower=False)
        objective = objective_of(num_common=VOCABULARY - 10, losses="fast", **terms)
        module = Student(student, objective, FromTeacher(frozen, switch)).train()
        one, sizes = batch(), {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        features, taught = student.image_features(one.student), Taught(prediction=frozen(one))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(one, objective.counts(one), features, taught)
        both = (self.student, self.teacher)
        parameters = {p.untyped_storage().data_ptr() for stock in both for p in stock.parameters()}
        return sum(size for place, size in sizes.items() if place not in parameters)


@pytest.fixture
def sides() -> Sides:
    torch.manual_seed(0)
    return Sides(stock(128, 4), stock(256, 6))


def test_a_term_that_reads_the_head_alone_adds_nothing(sides: Sides) -> None:
    sizes = ModelSizes.of(sides.student), ModelSizes.of(sides.teacher)
    assert memory_of_terms({"cross_entropy": CrossEntropy()}, *sizes, rows=ROWS, tokens=ROWS * TOKENS) == 0


def test_the_switch_is_the_teachers_graph(sides: Sides) -> None:
    term = VisualSwitch(source="projector")
    found = sides.kept(cross_entropy=CrossEntropy(), visual_switch=term) - sides.kept(
        cross_entropy=CrossEntropy()
    )
    sizes = ModelSizes.of(sides.student), ModelSizes.of(sides.teacher)
    told = memory_of_terms({"visual_switch": term}, *sizes, rows=ROWS, tokens=ROWS * TOKENS)
    assert told == pytest.approx(found, rel=0.15)


def test_attention_is_the_maps_of_both_sides(sides: Sides) -> None:
    term = Attention()
    found = sides.kept(cross_entropy=CrossEntropy(), attention=term) - sides.kept(
        cross_entropy=CrossEntropy()
    )
    of_teacher = 3 * 4 * ROWS * IMAGE_TOKENS**2  # its prediction is there, and saved by no one
    sizes = ModelSizes.of(sides.student), ModelSizes.of(sides.teacher)
    told = memory_of_terms({"attention": term}, *sizes, rows=ROWS, tokens=ROWS * TOKENS)
    assert found <= told - of_teacher <= 1.5 * found
