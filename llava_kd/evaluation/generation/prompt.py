"""A conversation as the text, and the tensors, that a stock LLaVA reads.

Words of a conversation that look like control tokens are covered in a prompt, and read as text: see
`ControlWords`, which training reads its records by.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from weakref import WeakKeyDictionary

from PIL import Image
from transformers import BatchFeature, LlavaProcessor, PreTrainedTokenizerFast

from llava_kd.data.sources.conversation import HALF_OF_A_PAIR, IMAGE_PLACEHOLDER
from llava_kd.data.text.control_words import ControlWords
from llava_kd.data.text.template_reading import FAILURES
from llava_kd.evaluation.generation.pictures import thin_pixels

Content = str | list[dict[str, str]]
_MARK = "\u2603"
_known: WeakKeyDictionary[PreTrainedTokenizerFast, tuple[object, ControlWords]] = WeakKeyDictionary()


def render_prompt(processor: LlavaProcessor, text: str, *, has_images: bool = True) -> str:
    """The chat template around one user message, ready for the answer."""
    return render_talk(processor, [{"role": "user", "content": text}], has_images=has_images)


def check_template(processor: LlavaProcessor, talks: Iterable[Sequence[Mapping[str, str]]]) -> None:
    """ValueError if the template refuses or drops the words of a talk: the first with any, of those whose
    roles are the same."""
    seen: set[tuple[str, ...]] = set()
    for messages in talks:
        roles = tuple(message["role"] for message in messages)
        has_words = any(message["content"].replace(IMAGE_PLACEHOLDER, "").strip() for message in messages)
        if has_words and roles not in seen:
            seen.add(roles)
            render_talk(processor, messages)


def render_talk(
    processor: LlavaProcessor,
    messages: Sequence[Mapping[str, str]],
    *,
    has_images: bool = True,
    begun: str = "",
) -> str:
    """The chat template around messages of role and content, ready for the answer, or for the rest of one
    that has `begun`: as far as that, and the line that it ends with, it is the text that would be trained on.

    A template that prints string content gets the text as it is, placeholders in place; one that only
    takes lists of parts gets the images of a message first, as the LLaVA data have them. "<image>" is a word
    in a talk that has no images, and in an answer.
    """
    if begun:
        # The mark keeps a template from stripping the end; what it puts after the answer goes with it.
        talk = [*messages, {"role": "assistant", "content": begun.lstrip() + _MARK}]
        return _rendered(processor, talk, has_images=has_images, asks=False).rpartition(_MARK)[0]
    return _rendered(processor, messages, has_images=has_images, asks=True)


def _rendered(
    processor: LlavaProcessor, messages: Sequence[Mapping[str, str]], *, has_images: bool, asks: bool
) -> str:
    """The talk as its template writes it, with the beginning of an answer where it `asks` for one."""
    texts = [message["content"] for message in messages]
    if any(map(HALF_OF_A_PAIR.search, texts)):
        raise ValueError("a question holds half of a surrogate pair: its text was cut inside a character")
    places = [has_images and message["role"] == "user" for message in messages]
    texts = _control(processor).covered(list(zip(texts, places, strict=True))) or texts
    prompt, refusal = _tried(processor, messages, texts, asks=asks)
    if refusal is None and _holds(prompt, texts):
        return prompt
    words = [text.replace(IMAGE_PLACEHOLDER, "").strip() for text in texts]
    counts = [text.count(IMAGE_PLACEHOLDER) for text in texts]
    parts = [
        [{"type": "image"}] * count + [{"type": "text", "text": text}]
        for count, text in zip(counts, words, strict=True)
    ]
    prompt, refused_parts = _tried(processor, messages, parts, asks=asks)
    if refused_parts is not None:
        raise ValueError(
            f"the chat template of this model fails on a talk of {', '.join(m['role'] for m in messages)}: "
            f"{refusal or refused_parts}; ask it in roles that it knows (many refuse a system turn), or mend "
            "chat_template.jinja"
        )
    is_complete = prompt.count(IMAGE_PLACEHOLDER) == sum(counts)
    if is_complete and any(words) and not any(text in prompt for text in words if text):
        raise ValueError(
            "the chat template of this model keeps the pictures and drops the text: it was trained on "
            "captions alone, as in a first stage, and answers no question; take a model of a later stage"
        )
    if not _holds(prompt, words) or not is_complete:
        raise ValueError(
            f"the chat template lost a question, an answer or an image: {texts!r} became {prompt!r}"
        )
    return prompt


def model_inputs(
    processor: LlavaProcessor, texts: Sequence[str], images: Sequence[Image.Image]
) -> BatchFeature:
    """Left-padded ids and pixel values of rendered texts, on the CPU.

    A text that a template began with the beginning-of-sequence token gets no second, and none gets an end.
    Pictures for which stock code would take gigabytes become the same pixels by the transform of training.
    """
    bos = processor.tokenizer.bos_token
    adds = not (bos and texts[0].startswith(bos))
    control = _control(processor)
    renamed = list(texts)
    if any(map(control.is_covered, texts)):
        renamed = [control.renamed(text) for text in texts]
        processor = copy.copy(processor)
        processor.image_token = control.renamed(processor.image_token)
        processor.tokenizer = control.reader
    thin = thin_pixels(processor.image_processor, images)
    shown = [Image.new("RGB", (32, 32)) if k in thin else image for k, image in enumerate(images)]
    inputs = processor(
        text=renamed,
        images=shown or None,
        text_kwargs={
            "padding": True,
            "return_tensors": "pt",
            "padding_side": "left",
            "add_special_tokens": adds,
        },
        images_kwargs={"return_tensors": "pt"},
    )
    for k, pixels_CHW in thin.items():
        inputs["pixel_values"][k] = pixels_CHW
    return _without_end(inputs, _num_behind(processor.tokenizer) if adds else 0)


def _num_behind(tokenizer: PreTrainedTokenizerFast) -> int:
    """How many tokens it puts behind a text by itself: an end of text, as some are set for training."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a", add_special_tokens=True)["input_ids"]
    before = next((k for k in range(len(whole)) if whole[k : k + len(bare)] == bare), len(whole))
    return max(len(whole) - before - len(bare), 0)


def _without_end(inputs: BatchFeature, num_tokens: int) -> BatchFeature:
    """A prompt goes on with its answer, so the last tokens of each left-padded row go."""
    shape = inputs["input_ids"].shape
    for name, value in inputs.items() if num_tokens else ():
        if value.shape == shape:
            inputs[name] = value[:, :-num_tokens]
    return inputs


def _control(processor: LlavaProcessor) -> ControlWords:
    """Of the processor as it is: found once for its tokenizer and chat template."""
    tokenizer, template = processor.tokenizer, processor.chat_template
    known = _known.get(tokenizer)
    if known is None or known[0] != template:
        talk = [{"role": "user"}, {"role": "assistant"}]
        text, refusal = _tried(processor, talk, ["-", "-"])
        if refusal is not None:
            text, _ = _tried(processor, talk, [[{"type": "text", "text": "-"}]] * 2)
        known = template, ControlWords(tokenizer, text)
        _known[tokenizer] = known
    return known[1]


def _tried(
    processor: LlavaProcessor,
    messages: Sequence[Mapping[str, str]],
    contents: Sequence[Content],
    *,
    asks: bool = True,
) -> tuple[str, Exception | None]:
    """What the template writes, or nothing and why it fails: it is a program, which may refuse a talk."""
    filled = [
        {"role": message["role"], "content": content}
        for message, content in zip(messages, contents, strict=True)
    ]
    try:
        return processor.apply_chat_template(filled, add_generation_prompt=asks, tokenize=False), None
    except FAILURES as error:
        return "", error


def _holds(prompt: str, texts: Sequence[str]) -> bool:
    """Whether all texts stand in the prompt, one after the other."""
    place = 0
    for text in texts:
        found = prompt.find(text, place)
        if found < 0:
            return False
        place = found + len(text)
    return True
