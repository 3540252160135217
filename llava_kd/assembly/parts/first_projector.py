"""The projector of a new student before its first step, fitted to pictures and words of the stage's data.

Shape legend: N pictures, E width of the tower's features, D width of the language model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from llava_kd.assembly.parts.data import side_in
from llava_kd.batch import IGNORE_INDEX, Inputs
from llava_kd.config import TrainConfig
from llava_kd.data.batches.loader import Loader
from llava_kd.data.batches.order import Order, Reading
from llava_kd.data.sources.conversation import Source
from llava_kd.models.files.checkpoint import Parts
from llava_kd.models.mllm import MLLM
from llava_kd.models.projectors.closed_form import begin_as, ridge, sized
from llava_kd.parallel.world import World

SAMPLE = 1024  # records whose pictures and words the map is fitted to
TOKENS_OF_A_PICTURE = 4  # whose features say how far tokens of one picture are apart
ROWS = 16


def begin_projector(
    config: TrainConfig, student: Parts, source: Source, world: World, say: Callable[[str], None]
) -> None:
    """Fit the projector of a new student where `student.projector_start` asks for it.

    The tower is moved to the run's device. Raises ValueError for a sample of too few pictures with words.
    """
    if config.student.projector_start == "random" or config.student.checkpoint is not None:
        return
    features_NE, tokens_NE, words_ND = _sample(config, student, source, world)
    if len(features_NE) < 2:
        raise ValueError(
            "student.projector_start closed_form needs at least 2 records with a picture and an answer, "
            f"but {len(features_NE)} of {min(SAMPLE, len(source))} sampled records have both: set it to "
            "random, or start with a caption stage"
        )
    found, explained = ridge(features_NE, words_ND)
    found = sized(found, tokens_NE, _size(student))
    projector = student.stock.model.multi_modal_projector
    carried = begin_as(projector, found, tokens_NE)
    _as_on_the_first_rank(projector, world)
    say(
        f"projector: begins as a linear map fitted to {len(features_NE)} records, which explains "
        f"{explained:.0%} of how the words of pictures left out differ; its layers carry {carried:.0%} of it"
    )
    if explained <= 0:
        say(
            "projector: the tower's features say nothing of the words of this stage's answers; is it the "
            "right tower, layer and image processor? projector_start: random leaves the projector as drawn"
        )


@torch.no_grad()
def _size(student: Parts) -> float:
    """Root mean square of a coordinate of the embeddings, as the decoder reads them."""
    table = student.stock.get_input_embeddings()
    tokens = torch.arange(len(student.processor.tokenizer))
    return float(table(tokens).float().square().mean().sqrt())


@torch.no_grad()
def _sample(
    config: TrainConfig, student: Parts, source: Source, world: World
) -> tuple[Tensor, Tensor, Tensor]:
    """In fp32 on the CPU: mean feature of each picture, features of some of its tokens, its mean word."""
    stock = student.stock
    table = stock.get_input_embeddings()
    stock.model.vision_tower.to(world.device)
    features, tokens, words = [], [], []
    mllm = MLLM(stock)
    chooser = torch.Generator().manual_seed(config.seed)
    for inputs in _batches(config, student, source, world):
        valid_N = inputs.places.valid_images_N.cpu()
        if not len(valid_N):
            continue
        features_INE = mllm.image_features(inputs).float().cpu()[valid_N]
        rows_N = _rows_of_images(inputs)[valid_N]
        mean_BD, has_words_B = _mean_words(table, inputs)
        picked = torch.randint(features_INE.shape[1], (TOKENS_OF_A_PICTURE,), generator=chooser)
        kept_N = has_words_B[rows_N]
        features.append(features_INE.mean(1)[kept_N])
        tokens.append(features_INE[kept_N][:, picked].flatten(0, 1))
        words.append(mean_BD[rows_N][kept_N])
    if not features:
        return torch.zeros(0, 1), torch.zeros(0, 1), torch.zeros(0, 1)
    return torch.cat(features), torch.cat(tokens), torch.cat(words)


def _batches(config: TrainConfig, student: Parts, source: Source, world: World) -> Iterator[Inputs]:
    own = Parts(stock=student.stock, processor=copy.deepcopy(student.processor))
    chosen = np.random.default_rng(config.seed).permutation(len(source))[:SAMPLE]
    size = min(ROWS, len(chosen))
    loader = Loader(
        source=source,
        student=side_in(config, own, config.student),
        teacher=None,
        order=Order(
            seed=config.seed,
            global_batch_size=size,
            micro_batch_size=size,
            records=np.sort(chosen).tolist(),
        ),
        reading=Reading(max_bad_rate=1.0),
        device=world.device,
    )
    for batches in loader.batches(0, loader.steps_per_epoch):
        yield from (batch.student for batch in batches)


def _rows_of_images(inputs: Inputs) -> Tensor:
    """The row that each image stands in."""
    per_image = int(inputs.visual_BT.sum()) // max(inputs.num_images, 1)
    images_B = inputs.visual_BT.sum(1).cpu() // max(per_image, 1)
    return torch.arange(len(images_B)).repeat_interleave(images_B)


def _mean_words(table: torch.nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """[B, D] mean embedding of the answer tokens of each row, and whether it has any."""
    is_answer_BT = (inputs.labels_BT != IGNORE_INDEX).cpu()
    embedded_BTD = table(inputs.input_ids_BT.cpu()).float() * is_answer_BT.unsqueeze(2)
    count_B = is_answer_BT.sum(1)
    return embedded_BTD.sum(1) / count_B.clamp_min(1).unsqueeze(1), count_B > 0


def _as_on_the_first_rank(projector: torch.nn.Module, world: World) -> None:
    """Two devices may round the sample's features in two ways; the ranks' projectors must not differ."""
    for parameter in projector.parameters():
        shared = parameter.detach().to(world.device, torch.float64)
        parameter.data.copy_(world.sum(shared if world.is_main else torch.zeros_like(shared)))
