"""A finished directory as stock code uses it: batches, ends and answers as ours are.

Training has its own reader, so these settings of a processor do not matter to it; whoever loads the directory
has nothing else.
"""

from __future__ import annotations

import copy
import json

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlavaProcessor, PreTrainedTokenizerFast

_ANSWER = "\u2603"


def served_processor(processor: LlavaProcessor) -> LlavaProcessor:
    """A copy that pads on the left, as batched generation must, and whose `eos_token` ends an answer alone.

    Servers and evaluation tools stop at the tokenizer's own end token, which for a base model is another one
    than the end of its template's answers.
    """
    served = copy.deepcopy(processor)
    tokenizer = served.tokenizer
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # only the latter is saved
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    end = end_of_answer(served)
    if end is not None and end != tokenizer.eos_token_id:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    if tokenizer.is_fast:  # what some earlier call padded or cut to is no part of the model
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
        _put_nothing_behind(tokenizer)
    return served


def _put_nothing_behind(tokenizer: PreTrainedTokenizerFast) -> None:
    """An end token behind each text, as some tokenizers are set for training, would end a prompt too."""
    if tokenizer.init_kwargs.get("add_eos_token"):
        tokenizer.init_kwargs["add_eos_token"] = tokenizer.add_eos_token = False
    backend = tokenizer.backend_tokenizer
    tree = json.loads(backend.to_str())
    step = tree["post_processor"] or {}
    templates = [one for one in step.get("processors", [step]) if one.get("type") == "TemplateProcessing"]
    ended = [one[form] for one in templates for form in ("single", "pair") if "SpecialToken" in one[form][-1]]
    if not ended:  # to build a tokenizer of a hundred thousand words takes a second
        return
    for pieces in ended:
        while "SpecialToken" in pieces[-1]:
            pieces.pop()
    backend.post_processor = Tokenizer.from_str(json.dumps(tree)).post_processor


def served_generation(before: GenerationConfig | None, processor: LlavaProcessor) -> GenerationConfig:
    """Greedy, with no penalty, as `llava-kd eval` answers; ends at the end of the template, and where it did.

    `processor` is the served one. A language model's own settings (sampling, a repetition penalty) are those
    of another model than the one that was scored.
    """
    tokenizer = processor.tokenizer
    known = None if before is None else before.eos_token_id
    ends = [tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )


def end_of_answer(processor: LlavaProcessor) -> int | None:
    """Id of the token that the chat template puts after an answer; None where it puts none."""
    tokenizer = processor.tokenizer
    for content in (_ANSWER, [{"type": "text", "text": _ANSWER}]):
        talk = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
        try:
            text = str(processor.apply_chat_template(talk, tokenize=False))
        except (TemplateError, TypeError, ValueError):  # none at all, or none for this form of content
            continue
        if text.count(_ANSWER) < 2:
            continue
        after = text.rpartition(_ANSWER)[2].lstrip(" \n")
        follows = tokenizer(after, add_special_tokens=False)["input_ids"][:1]
        return next((token for token in follows if token in tokenizer.added_tokens_decoder), None)
    return None
