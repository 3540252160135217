"""The templates that a config can name. One more is one more entry."""

from __future__ import annotations

from collections.abc import Mapping

from llava_kd.data.text.template import Template

LLAVA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        # Image, then caption. LLaVA closes the caption with a newline; an end token lets generation stop.
        Template(name="plain", images_only=True),
        Template(
            name="vicuna",
            after_system=" ",
            before_user="USER: ",
            before_answer=" ASSISTANT:",
            answer_lead=" ",
        ),
        Template(
            name="llava_v1",
            system=LLAVA_SYSTEM,
            after_system=" ",
            before_user="USER: ",
            before_answer=" ASSISTANT:",
            answer_lead=" ",
        ),
        Template(
            name="chatml",
            before_system="<|im_start|>system\n",
            after_system="<|im_end|>\n",
            before_user="<|im_start|>user\n",
            before_answer="<|im_end|>\n<|im_start|>assistant\n",
            end_token="<|im_end|>",
            after_answer="\n",
        ),
        Template(
            name="llama3",
            before_system="<|start_header_id|>system<|end_header_id|>\n\n",
            after_system="<|eot_id|>",
            before_user="<|start_header_id|>user<|end_header_id|>\n\n",
            before_answer="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            end_token="<|eot_id|>",
        ),
        Template(
            name="gemma",
            before_system="<start_of_turn>user\n",  # as Gemma 3; its forerunners refuse a system turn
            after_system="\n\n",
            system_opens_user=True,
            before_user="<start_of_turn>user\n",
            before_answer="<end_of_turn>\n<start_of_turn>model\n",
            end_token="<end_of_turn>",
            after_answer="\n",
        ),
        Template(
            name="phi3",
            before_system="<|system|>\n",
            after_system="<|end|>\n",
            before_user="<|user|>\n",
            before_answer="<|end|>\n<|assistant|>\n",
            end_token="<|end|>",
            after_answer="\n",
        ),
        Template(
            name="phi4",
            before_system="<|im_start|>system<|im_sep|>",
            after_system="<|im_end|>",
            before_user="<|im_start|>user<|im_sep|>",
            before_answer="<|im_end|><|im_start|>assistant<|im_sep|>",
            end_token="<|im_end|>",
        ),
        # OLMo 2: words, not tokens, mark its turns.
        Template(
            name="tulu",
            before_system="<|system|>\n",
            after_system="\n",
            before_user="<|user|>\n",
            before_answer="\n<|assistant|>\n",
            after_answer="\n",
            starts_with_bos=True,
        ),
    )
}
# The template of a family of language models: by the tokens that only its turns are made of, the first that
# a tokenizer has all of, then where turns are made of plain words by the start of the model type.
MARKS: Mapping[str, tuple[str, ...]] = {
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "phi4": ("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "phi3": ("<|user|>", "<|assistant|>", "<|end|>"),
}
WORDS: Mapping[str, str] = {"tulu": "olmo"}
ANY_OTHER = "vicuna"
