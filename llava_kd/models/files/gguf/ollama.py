"""A Modelfile for Ollama: both files, the conversation in its own template language, and greedy answers."""

from __future__ import annotations

from jinja2 import TemplateError
from transformers import LlavaProcessor

_MARKS = {"system": "\u2603S", "user": "\u2603U", "assistant": "\u2603A"}


def modelfile(processor: LlavaProcessor, language: str, vision: str) -> str:
    """Of a conversation that a turn can be cut from; without a TEMPLATE otherwise.

    `processor` is the served one, whose `eos_token` ends an answer.
    """
    lines = [f"FROM ./{language}", f"FROM ./{vision}"]
    if (turns := _turns(processor)) is not None:
        lines.append(f'TEMPLATE """{turns}"""')
    end = processor.tokenizer.eos_token
    stop = [f'PARAMETER stop "{end}"'] if end and '"' not in end else []
    return "\n".join([*lines, *stop, "PARAMETER temperature 0", "PARAMETER repeat_penalty 1"]) + "\n"


def _turns(processor: LlavaProcessor) -> str | None:
    """The template of one exchange; Ollama repeats it, and adds the first token by itself."""
    try:
        whole = _rendered(processor, ["system", "user", "assistant"])
        without = _rendered(processor, ["user", "assistant"])
    except (TemplateError, TypeError, ValueError):
        return None
    places = [whole.find(_MARKS[role]) for role in ("system", "user", "assistant")]
    if -1 in places or places != sorted(places) or _MARKS["user"] not in without:
        return None
    before, rest = whole.split(_MARKS["system"], 1)
    between, rest = rest.split(_MARKS["user"], 1)
    answer, after = rest.split(_MARKS["assistant"], 1)
    opening = without.split(_MARKS["user"], 1)[0]
    if not between.endswith(opening):
        head = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{between}{{{{ else }}}}{opening}{{{{ end }}}}"
    else:
        system = between.removesuffix(opening)
        head = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{system}{{{{ end }}}}{opening}"
    template = f"{head}{{{{ .Prompt }}}}{answer}{{{{ .Response }}}}{after}"
    bos = processor.tokenizer.bos_token
    template = template.replace(bos, "") if bos else template
    return None if '"""' in template else template


def _rendered(processor: LlavaProcessor, roles: list[str]) -> str:
    talk = [{"role": role, "content": _MARKS[role]} for role in roles]
    return str(processor.apply_chat_template(talk, tokenize=False))
