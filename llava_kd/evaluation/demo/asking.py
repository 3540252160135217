"""One question about one picture, asked of several models: answers, how sure they were, where they looked.

Shape legend: B rows (one), T tokens, I images (one), C channels, H height, W width, N new tokens,
V vocabulary rows, P visual tokens of the picture, R and K rows and columns of its grid.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llava_kd.batch import IGNORE_INDEX, Inputs
from llava_kd.data.sources.conversation import IMAGE_PLACEHOLDER
from llava_kd.evaluation.generation.generate import Generator
from llava_kd.evaluation.generation.pictures import open_picture
from llava_kd.evaluation.generation.prompt import model_inputs, render_talk
from llava_kd.models.files.upright import reads_upright
from llava_kd.models.mllm import MLLM, Prediction
from llava_kd.models.towers.vision_tower import input_size
from llava_kd.models.towers.visual_grid import visual_grid

MAX_QUESTION = 4_000  # characters: what a person types, and not a book that was pasted by mistake
_SPACE_MARKS = ("\u0120", "\u2581")  # how the two kinds of tokenizers write a space inside a token


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token of an answer, with its probability, and the most probable other one at its place."""

    text: str
    probability: float
    other: str
    other_probability: float


@dataclass(frozen=True, kw_only=True)
class Look:
    """The share of an answer's attention on each patch: a mean over heads, layers and tokens."""

    patches_RK: Tensor
    on_picture: float


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model said; or, in `fault`, why it could not be asked.

    The last of `tokens` is the one that ended the answer, unless it `is_cut`. `seen` is the picture as the
    model read it. Without a `look`, `blind` says why there is none.
    """

    name: str
    text: str = ""
    tokens: tuple[Token, ...] = ()
    is_cut: bool = False
    seen: Image.Image | None = None
    look: Look | None = None
    blind: str = ""
    fault: str = ""


class Respondent:
    """A model that is asked. Its tokenizer has a state, so that it answers one at a time, whoever asks."""

    def __init__(self, name: str, generator: Generator) -> None:
        self.name = name
        self.generator = generator
        self._lock = threading.Lock()
        self._mllm = MLLM(generator.model)
        self._blind = _watched(self._mllm, generator.model.dtype)

    def ask(self, picture: bytes, question: str) -> Answer:
        """ValueError for a picture that cannot be read, or a question that the model cannot be asked."""
        with self._lock:
            return self._ask(picture, question)

    @torch.no_grad()
    def _ask(self, picture: bytes, question: str) -> Answer:
        generator = self.generator
        processor, model = generator.processor, generator.model
        image = opened(picture, upright=reads_upright(processor))
        content = question if IMAGE_PLACEHOLDER in question else f"{IMAGE_PLACEHOLDER}\n{question}"
        if content.count(IMAGE_PLACEHOLDER) > 1:
            raise ValueError(
                f"the question has several placeholders {IMAGE_PLACEHOLDER}, but there is one picture"
            )
        text = render_talk(processor, [{"role": "user", "content": content}])
        given = model_inputs(processor, [text], [image])
        prompt_BT, pixels_ICHW = given["input_ids"], given["pixel_values"]
        self._check_length(prompt_BT.shape[1])
        new_BN = generator.greedy(given)
        ends = torch.isin(new_BN[0], torch.tensor(generator.end_ids, device=new_BN.device)).nonzero()
        if len(ends):
            new_BN = new_BN[:, : int(ends[0]) + 1]
        inputs = _inputs(prompt_BT, new_BN.cpu(), pixels_ICHW.to(model.dtype), model.config.image_token_id)
        inputs = inputs.to(model.device)
        prediction = self._mllm(inputs, self._mllm.image_features(inputs))
        return Answer(
            name=self.name,
            text=generator.decode(new_BN)[0],
            tokens=_tokens(processor.tokenizer, new_BN[0], _log_probs(prediction, inputs)),
            is_cut=not len(ends),
            seen=_seen(pixels_ICHW[0], processor.image_processor),
            look=None if prediction.attended_IN is None else self._look(prediction.attended_IN[0], new_BN),
            blind=self._blind,
        )

    def _check_length(self, tokens: int) -> None:
        positions = getattr(self.generator.model.config.get_text_config(), "max_position_embeddings", None)
        needed = tokens + self.generator.max_new_tokens
        if isinstance(positions, int) and needed > positions:
            raise ValueError(
                f"question, picture and answer may need {needed} tokens, but the model has {positions} "
                "positions: ask a shorter question, or allow fewer tokens (--max_new_tokens)"
            )

    def _look(self, attended_P: Tensor, new_BN: Tensor) -> Look:
        """The sum over the answer's tokens as a mean; patches that the model never gets have none."""
        mean_P = attended_P.float().cpu() / new_BN.shape[1]
        generator = self.generator
        grid = visual_grid(generator.model.config, input_size(generator.processor.image_processor))
        patches = torch.nn.functional.pad(mean_P[grid.prefix :], (grid.missing, 0))
        return Look(patches_RK=patches.view(grid.rows, grid.columns), on_picture=float(mean_P.sum()))


def ask_all(respondents: Sequence[Respondent], picture: bytes, question: str) -> list[Answer]:
    """Ask them at the same time; an answer each, in their order. ValueError for what none could be asked.

    What one alone cannot be asked, such as a question longer than it can read, is the `fault` of its answer.
    """
    question = checked(question)
    opened(picture)

    def ask(respondent: Respondent) -> Answer:
        try:
            return respondent.ask(picture, question)
        except ValueError as error:
            return Answer(name=respondent.name, fault=str(error))
        except torch.OutOfMemoryError:
            return Answer(name=respondent.name, fault="the answer needs more memory than the device has")

    with ThreadPoolExecutor(len(respondents)) as pool:
        return list(pool.map(ask, respondents))


def checked(question: str) -> str:
    """The question without space around it. ValueError for none, and for one that is too long."""
    question = question.strip()
    if not question.replace(IMAGE_PLACEHOLDER, "").strip():
        raise ValueError("there is no question: write one")
    if len(question) > MAX_QUESTION:
        raise ValueError(f"the question has {len(question)} characters, and may have {MAX_QUESTION}")
    return question


def opened(picture: bytes, *, upright: bool = False) -> Image.Image:
    """ValueError for bytes that are no whole picture of bounded size."""
    try:
        return open_picture(picture, upright)
    except (OSError, ValueError) as error:
        raise ValueError(f"the picture cannot be read: {' '.join(str(error).split())}") from error


def _watched(mllm: MLLM, dtype: torch.dtype) -> str:
    """Let the model show what its answers attend to, in all layers; else why it cannot."""
    try:
        mllm.watch_answers(range(len(mllm.language_model.layers)), dtype)
    except (ValueError, AttributeError) as error:
        kind = mllm.stock.config.get_text_config().model_type
        reason = str(error).partition(":")[2].split(";")[0].strip() if isinstance(error, ValueError) else ""
        return f"no map: the attention of this {kind!r} model cannot be read" + f" ({reason})" * bool(reason)
    return ""


def _inputs(prompt_BT: Tensor, new_BN: Tensor, pixels_ICHW: Tensor, image_token_id: int) -> Inputs:
    """The prompt and its answer as one record, whose targets are the tokens of the answer."""
    ids_BT = torch.cat([prompt_BT, new_BN], dim=1)
    length = ids_BT.shape[1]
    return Inputs(
        input_ids_BT=ids_BT,
        labels_BT=torch.cat([torch.full_like(prompt_BT, IGNORE_INDEX), new_BN], dim=1),
        position_ids_BT=torch.arange(length).view(1, length),
        segment_ids_BT=torch.ones_like(ids_BT),
        visual_BT=torch.cat([prompt_BT == image_token_id, torch.zeros_like(new_BN, dtype=torch.bool)], dim=1),
        pixels_ICHW=pixels_ICHW,
        image_is_valid_I=torch.ones(1, dtype=torch.bool),
    )


def _log_probs(prediction: Prediction, inputs: Inputs) -> Tensor:
    """[N, V] at the places that predict the answer, fp32."""
    hidden_ND = prediction.hidden_BTD.flatten(0, 1)[inputs.places.response_N]
    logits_NV = torch.nn.functional.linear(hidden_ND, prediction.head_VD, prediction.bias_V).float()
    if prediction.cap is not None:
        logits_NV = prediction.cap * torch.tanh(logits_NV / prediction.cap)
    return logits_NV.log_softmax(-1)


def _tokens(tokenizer: PreTrainedTokenizerBase, new_N: Tensor, log_probs_NV: Tensor) -> tuple[Token, ...]:
    own_N = log_probs_NV.gather(1, new_N.unsqueeze(1)).squeeze(1).exp()
    others_NV = log_probs_NV.scatter(1, new_N.unsqueeze(1), -torch.inf)
    best_N = others_NV.max(1)
    rows = zip(
        new_N.tolist(), own_N.tolist(), best_N.indices.tolist(), best_N.values.exp().tolist(), strict=True
    )
    return tuple(
        Token(
            text=written(tokenizer, number),
            probability=own,
            other=written(tokenizer, other),
            other_probability=its,
        )
        for number, own, other, its in rows
    )


def written(tokenizer: PreTrainedTokenizerBase, number: int) -> str:
    """A token as a reader knows it; as the vocabulary has it where it is a part of a character."""
    raw = tokenizer.convert_ids_to_tokens(number)
    if not isinstance(raw, str):
        return f"row {number}"  # a head is often padded with rows that no token has
    text = str(tokenizer.decode([number]))
    if not text or "\ufffd" in text:
        return raw
    return f" {text}" if raw.startswith(_SPACE_MARKS) and not text.startswith(" ") else text


def _seen(pixels_CHW: Tensor, processor: object) -> Image.Image:
    """The picture of some pixel values: what was cut off or padded by the processor shows in it."""
    pixels_CHW = pixels_CHW.float().cpu()
    if getattr(processor, "do_normalize", True):
        mean, std = (
            torch.tensor(getattr(processor, name)).view(-1, 1, 1) for name in ("image_mean", "image_std")
        )
        pixels_CHW = pixels_CHW * std + mean
    scale = 255 if getattr(processor, "do_rescale", True) else 1
    bytes_HWC = (pixels_CHW * scale).round().clamp(0, 255).byte().permute(1, 2, 0)
    return Image.fromarray(bytes_HWC.contiguous().numpy())
