"""A chat template that puts pictures where training had them, in llama.cpp's server too.

The server gives a template no pictures but marks, texts such as `<__media_x__>`: inside the question's
string, or, to templates that it believes to read lists, as parts of the question. A stock LLaVA template
prints them like words, and what it puts around pictures, a newline and the order, is lost. Around the
template go a few lines that make pictures of the marks before it, and marks of its image tokens after it.
"""

from __future__ import annotations

from jinja2 import TemplateError
from transformers import LlavaProcessor

_MARK = "<__media_x__>"
_BEFORE = (
    "{%- set seen = namespace(mark='', messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- set turn = namespace(content=message['content']) -%}"
    "{%- if turn.content is string -%}"
    "{%- if '<__media' in turn.content -%}"
    "{%- set seen.mark = '<__media' + turn.content.split('<__media')[1].split('__>')[0] + '__>' -%}"
    "{%- set turn.content = [] -%}"
    "{%- for text in message['content'].split(seen.mark) -%}"
    "{%- if not loop.first -%}{%- set turn.content = turn.content + [{'type': 'image'}] -%}{%- endif -%}"
    "{%- if text -%}{%- set turn.content = turn.content + [{'type': 'text', 'text': text}] -%}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- else -%}"
    "{%- set turn.content = [] -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['text'] is defined and '<__media' in part['text'] -%}"
    "{%- set seen.mark = part['text'] -%}"
    "{%- set turn.content = turn.content + [{'type': 'image'}] -%}"
    "{%- else -%}{%- set turn.content = turn.content + [part] -%}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- set seen.messages = seen.messages + [{'role': message['role'], 'content': turn.content}] -%}"
    "{%- endfor -%}"
    "{%- set messages = seen.messages -%}"
    "{%- set conversation -%}"
)
_AFTER = (
    "{{%- endset -%}}"
    "{{%- if seen.mark -%}}{{{{ conversation.split({image})|join(seen.mark) }}}}"
    "{{%- else -%}}{{{{ conversation }}}}{{%- endif -%}}"
)


def chat_template(processor: LlavaProcessor) -> str | None:
    """For the file: with marks where that is possible, or else the stock one."""
    stock = processor.chat_template
    return template_with_marks(processor) or (stock if isinstance(stock, str) else None)


def template_with_marks(processor: LlavaProcessor) -> str | None:
    """The chat template between those lines; None where it then renders anything else than to stock code."""
    template = processor.chat_template
    if not isinstance(template, str):
        return None
    image = "'" + processor.image_token.replace("\\", "\\\\").replace("'", "\\'") + "'"
    wrapped = f"{_BEFORE}{template}{_AFTER.format(image=image)}"
    for kinds in (["text"], ["image", "text"], ["text", "image"], ["image", "image", "text"]):
        try:
            stock = _rendered(processor, template, [_parts(kinds, {"type": "image"})] * 2)
            given = [_parts(kinds, {"type": kind, "text": _MARK}) for kind in ("media_marker", "text")]
            given += ["".join(part["text"] for part in given[0])]
            marked = [_rendered(processor, wrapped, [content] * 2) for content in given]
        except (TemplateError, TypeError, ValueError, KeyError):
            return None
        if any(text != stock.replace(processor.image_token, _MARK) for text in marked):
            return None
    return wrapped


def _parts(kinds: list[str], picture: dict[str, str]) -> list[dict[str, str]]:
    return [picture if kind == "image" else {"type": "text", "text": "What?"} for kind in kinds]


def _rendered(processor: LlavaProcessor, template: str, questions: list) -> str:
    """Turns with these questions, and the opening of the last answer."""
    talk: list[dict] = []
    for question in questions:
        talk += [{"role": "user", "content": question}, {"role": "assistant", "content": "That."}]
    return str(
        processor.apply_chat_template(
            talk[:-1], chat_template=template, tokenize=False, add_generation_prompt=True
        )
    )
