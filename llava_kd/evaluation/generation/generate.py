"""Batched answers of a stock LLaVA model, greedy ones or drawn.

Shape legend: B questions of a batch, T prompt tokens (left-padded), N new tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BatchFeature, DynamicCache, LlavaForConditionalGeneration, LlavaProcessor

import llava_kd.models.towers.adapted  # noqa: F401  (registers towers that stock LLaVA has no class for)
from llava_kd.bar import Bar
from llava_kd.data.pixels.images import GREY
from llava_kd.data.text.template_reading import FAILURES
from llava_kd.evaluation.answers import CUT, ERROR, AnswerWriter
from llava_kd.evaluation.generation.model_directory import model_directory
from llava_kd.evaluation.generation.pictures import open_picture
from llava_kd.evaluation.generation.prompt import model_inputs, render_talk
from llava_kd.evaluation.generation.questions import Question
from llava_kd.evaluation.generation.ranks import Ranks
from llava_kd.evaluation.generation.writing import GREEDY, Writing
from llava_kd.models.attention.packed import leave_out_cudnn
from llava_kd.models.files.checkpoint import load_processor, load_stock
from llava_kd.models.files.served import end_of_answer
from llava_kd.models.files.upright import reads_upright


@dataclass(frozen=True)
class Generator:
    """A LLaVA model and its processor, ready to answer batches of questions."""

    model: LlavaForConditionalGeneration
    processor: LlavaProcessor
    max_new_tokens: int = 32
    early_stop: bool = (
        True  # False: every batch takes the same number of steps on every rank (sharded models)
    )
    writing: Writing = GREEDY
    num_tokens: int | None = None  # only the first of the vocabulary are written; None: all of them
    more_ends: tuple[int, ...] = ()  # further ids that end an answer

    @staticmethod
    def load(
        directory: str | Path,
        *,
        device: torch.device,
        dtype: torch.dtype | None = None,
        max_new_tokens: int = 32,
    ) -> Generator:
        """Load a stock LLaVA directory: bf16 on a GPU and fp32 on the CPU unless `dtype` says otherwise."""
        directory = model_directory(directory)
        leave_out_cudnn(device)
        if dtype is None:
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        check_processor(load_processor(str(directory)), directory)  # before the weights are read
        parts = load_stock(str(directory), dtype=dtype)
        processor = check_processor(parts.processor, directory)
        nn.Module.to(parts.stock, device)
        return Generator(parts.stock.eval(), processor, max_new_tokens)

    def answer(self, questions: Sequence[Question]) -> list[str]:
        """An answer each; nothing for a question whose pictures cannot be read."""
        ready = prepare(self.processor, questions)
        texts = self.decode(self.greedy(ready.inputs))
        return ["" if fault else text for text, fault in zip(texts, ready.faults, strict=True)]

    def greedy(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Greedy continuation ids_BN with a KV cache; after its end token a row is filled with padding."""
        return self._read_whole(inputs, None)

    def written(self, inputs: Mapping[str, Tensor], ids: Sequence[str]) -> Tensor:
        """The continuation ids_BN of the questions with these ids, as `writing` says."""
        return self.greedy(inputs) if self.writing.is_greedy else self._read_whole(inputs, ids)

    def new_cache(self) -> DynamicCache:
        """Nothing read yet."""
        return DynamicCache(config=self.model.config.get_text_config())

    def _read_whole(self, inputs: Mapping[str, Tensor], names: Sequence[str] | None) -> Tensor:
        given = {"input_ids": inputs["input_ids"]}
        if "pixel_values" in inputs:
            given["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return self.continued(given, inputs["attention_mask"], self.new_cache(), names)

    @torch.no_grad()
    def continued(
        self, given: Mapping[str, Tensor], mask_BT: Tensor, cache: DynamicCache, names: Sequence[str] | None
    ) -> Tensor:
        """The continuation ids_BN of `given`, the last columns of T, behind those that the cache holds.

        Rows are left-padded. Without `names` it is greedy; else `writing` decides. `cache` is then longer by
        what was read: all but the last token.
        """
        device, is_greedy = self.model.device, names is None or self.writing.is_greedy
        given = {name: value.to(device) for name, value in given.items()}
        uniform_BN = None if is_greedy else self.writing.draws(names or (), self.max_new_tokens)
        mask_BT = mask_BT.to(device)
        read = given["inputs_embeds"] if "inputs_embeds" in given else given["input_ids"]
        position_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)[:, -read.shape[1] :]
        end_ids = torch.tensor(self.end_ids, device=device)
        finished_B = torch.zeros(len(mask_BT), dtype=torch.bool, device=device)
        steps: list[Tensor] = []
        while True:
            output = self.model(
                **given,
                attention_mask=mask_BT,
                position_ids=position_BT,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            uniform_B = None if uniform_BN is None else uniform_BN[:, len(steps)]
            next_B = self.writing.choose(output.logits[:, -1, : self.num_tokens], uniform_B)
            next_B = torch.where(finished_B, end_ids[0], next_B)
            steps.append(next_B)
            finished_B = finished_B | torch.isin(next_B, end_ids)
            if len(steps) == self.max_new_tokens or (self.early_stop and bool(finished_B.all())):
                return torch.stack(steps, dim=1)
            given = {"input_ids": next_B[:, None]}
            mask_BT = torch.nn.functional.pad(mask_BT, (0, 1), value=1)
            position_BT = position_BT[:, -1:] + 1

    @cached_property
    def end_ids(self) -> list[int]:
        """Ids that end an answer: the tokenizer's, the generation config's, and the chat template's."""
        tokenizer = self.processor.tokenizer
        generation = self.model.generation_config
        configured = generation.eos_token_id if generation is not None else None
        ids = [tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])]
        ids += self.more_ends
        # What the template puts after an answer; a base model's own end token is often another one.
        talk = [{"role": "user", "content": "-"}, {"role": "assistant", "content": "\u2603"}]
        try:
            after = self.processor.apply_chat_template(talk, tokenize=False).rpartition("\u2603")[2]
        except FAILURES:  # of a template that takes content in parts alone
            return sorted({i for i in (*ids, end_of_answer(self.processor)) if i is not None})
        follows = tokenizer(after, add_special_tokens=False)["input_ids"][:1]
        ids += [i for i in follows if i in tokenizer.added_tokens_decoder]
        return sorted({i for i in ids if i is not None})

    def ended(self, ids_BN: Tensor) -> list[bool]:
        """Whether each row has its end token: an answer without one was cut off."""
        return torch.isin(ids_BN, torch.tensor(self.end_ids, device=ids_BN.device)).any(1).tolist()

    def decode(self, ids_BN: Tensor) -> list[str]:
        """Text of each row up to its first end token."""
        ends = set(self.end_ids)
        rows = []
        for row in ids_BN.tolist():
            stop = next((k for k, token in enumerate(row) if token in ends), len(row))
            rows.append(self.processor.tokenizer.decode(row[:stop], skip_special_tokens=True).strip())
        return rows


@dataclass(frozen=True)
class Prepared:
    """Processor output for a batch, left-padded ids and pixel values, on the CPU.

    A fault is what is wrong with a question's pictures, which grey ones stand in for, or nothing.
    """

    inputs: BatchFeature
    faults: list[str]


def prepare(processor: LlavaProcessor, questions: Sequence[Question]) -> Prepared:
    texts = [render_talk(processor, q.messages, has_images=bool(q.images), begun=q.begun) for q in questions]
    upright = reads_upright(processor)
    opened = [pictures(question, upright) for question in questions]
    images = [image for found, _ in opened for image in found]
    return Prepared(model_inputs(processor, texts, images), [fault for _, fault in opened])


def pictures(question: Question, upright: bool = False) -> tuple[list[Image.Image], str]:
    """The images, a grey one in the place of one that cannot be read, and what is wrong with that."""
    found, fault = [], ""
    for index in range(len(question.images)):
        try:
            found.append(_open_image(question, index, upright))
        except (OSError, ValueError) as error:
            found.append(Image.new("RGB", (32, 32), (GREY, GREY, GREY)))
            source = question.images[index]
            name = source if isinstance(source, Path) else f"image {index}"
            fault = fault or f"question {question.id!r}: cannot read {name}: {error}; fix or replace it"
    return found, fault


def _open_image(question: Question, index: int, upright: bool = False) -> Image.Image:
    source = question.images[index]
    try:
        picture = open_picture(source, upright)
    except FileNotFoundError:
        raise ValueError(f"no image file {source}; check the image root") from None
    return picture if question.noise is None else question.noise.on(picture, question.id, index)


def check_processor(processor: LlavaProcessor, directory: Path) -> LlavaProcessor:
    """The processor, when answers can be asked for and end."""
    if processor.chat_template is None:
        raise ValueError(f"{directory} has no chat template; save the training template with the processor")
    if processor.tokenizer.eos_token_id is None:
        raise ValueError(f"{directory}: the tokenizer has no end-of-text token, so no answer would stop")
    if processor.tokenizer.pad_token_id is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


@contextmanager
def evaluation_mode(model: LlavaForConditionalGeneration) -> Iterator[None]:
    """The model in eval mode; afterwards every module is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def batches_by_length(questions: Sequence[Question], batch_size: int) -> list[list[Question]]:
    """Batches of questions of similar length, the longest first, so that a lack of memory shows at once."""
    ordered = _longest_first(questions)
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def _longest_first(questions: Sequence[Question]) -> list[Question]:
    return sorted(questions, key=lambda q: (len(q.images), len(q.text) + len(q.begun)), reverse=True)


def generate(
    generator: Generator,
    questions: Sequence[Question],
    *,
    out_dir: Path,
    ranks: Ranks | None = None,
    batch_size: int = 32,
    prefetch: int = 2,
    progress: bool = True,
) -> None:
    """Answer this rank's part of the questions, batch by batch, appending to its file in `out_dir`."""
    ranks = ranks or Ranks()
    ordered = _longest_first(questions)
    batches = batches_by_length(ordered[ranks.rank :: ranks.world_size], batch_size)
    bar = Bar(sum(map(len, batches)), "answers", "questions", is_shown=progress and ranks.rank == 0)
    with AnswerWriter(out_dir, ranks.rank) as writer, bar, ThreadPoolExecutor(prefetch) as pool:
        for batch, ready in _prefetched(generator, batches, pool, prefetch):
            try:
                ids_BN = generator.written(ready.inputs, [question.id for question in batch])
            except torch.OutOfMemoryError as error:
                raise ValueError(
                    f"a batch of {len(batch)} questions needs more memory than {generator.model.device} has; "
                    "run again with a smaller batch size, the answers so far are kept"
                ) from error
            rows = zip(batch, generator.decode(ids_BN), ready.faults, strict=True)
            answers = [_answer(question, text, fault) for question, text, fault in rows]
            if generator.writing.marks_cut:
                for answer, is_ended in zip(answers, generator.ended(ids_BN), strict=True):
                    answer |= {} if is_ended else {CUT: str(generator.max_new_tokens)}
            writer.write(answers)
            bar.advance(len(batch))


def _prefetched(
    generator: Generator, batches: list[list[Question]], pool: ThreadPoolExecutor, ahead: int
) -> Iterator[tuple[list[Question], Prepared]]:
    """Each batch with its inputs; the next ones are read while this one is answered.

    How a fast tokenizer pads is a state that its last caller has set, so no two threads may share one: every
    batch borrows a copy of the processor, and the generator's own stays with the thread that answers.
    """
    free: SimpleQueue[LlavaProcessor] = SimpleQueue()
    for _ in range(ahead):
        free.put(copy.deepcopy(generator.processor))

    def prepared(batch: list[Question]) -> Prepared:
        processor = free.get()
        try:
            return prepare(processor, batch)
        finally:
            free.put(processor)

    waiting: list[Future[Prepared]] = []
    for index, batch in enumerate(batches):
        while len(waiting) <= ahead and index + len(waiting) < len(batches):
            waiting.append(pool.submit(prepared, batches[index + len(waiting)]))
        yield batch, waiting.pop(0).result()


def _answer(question: Question, text: str, fault: str) -> dict[str, str]:
    told = {
        "id": question.id,
        "type": question.kind,
        "question": question.text,
        "image": question.image_name(),
        "truth": question.truth,
        "answer": "" if fault else text,
    }
    return {**told, ERROR: fault} if fault else told
