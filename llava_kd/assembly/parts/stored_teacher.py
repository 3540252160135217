"""What a cache of a teacher must agree with, and hold, to stand in for it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from llava_kd.assembly.parts.objective import terms_of, token_policy
from llava_kd.assembly.parts.teaching.visual_dependency import stored_form
from llava_kd.config import TeacherConfig, TrainConfig
from llava_kd.data.batches.model_side import AnySide
from llava_kd.data.foreign.side import ForeignSide
from llava_kd.data.sources.conversation import Source
from llava_kd.data.teacher_store.store import Contents, TeacherCache
from llava_kd.distill.head_terms import head_requests
from llava_kd.distill.objective import beyond_top_k, places_read
from llava_kd.distill.terms.term import LISTED, Term
from llava_kd.distill.token_policy import BEYOND_TOP_K
from llava_kd.losses.divergence import Temperature
from llava_kd.models.files.teacher_head import checkpoint_fingerprint, config_fingerprint

HEAD = "head.safetensors"
_WEIGHTS, _SERVED = "weights of the teacher", "served as "
_OF_OLDER = {"data.exif": "ignore"}  # what was done before it was asked
_REMEDY = "write another cache with `llava-kd cache-teacher` into a new directory"


def open_cache(config: TrainConfig, reader: AnySide, source: Source) -> TeacherCache:
    """The cache that the settings name. `reader`: how the teacher reads these data.

    Raises ValueError naming all in which it was written for something else, or that it does not hold.
    """
    assert config.teacher is not None
    assert config.teacher.cache is not None
    terms = terms_of(config.objective)
    cache = TeacherCache(config.teacher.cache, places_read(terms))
    there = cache.manifest.identity
    here = identity(config.teacher, reader, source, served=served_as(there))
    refuse_other(there, here, f"the teacher cache {config.teacher.cache}")
    policy = token_policy(config)
    is_beyond = policy is not None and policy.changes_targets
    contents = cache.manifest.contents
    _refuse_missing(contents, terms, config.teacher.cache, has_own_targets=is_beyond)
    asked = stored_form(config.teacher)
    if asked is not None and asked != contents.dependency:
        held = "none" if contents.dependency is None else f"those of {contents.dependency}"
        raise ValueError(
            f"the teacher cache {config.teacher.cache} does not have the scores that "
            f"`teacher.visual_dependency` needs ({asked}): it has {held}. Write a new cache with these "
            "settings (`llava-kd cache-teacher`), or set teacher.visual_dependency to null"
        )
    return cache


def served_as(there: Mapping[str, str]) -> str | None:
    """What the teacher of a cache was called by the server that ran it; None where its weights were here."""
    weights = there.get(_WEIGHTS, "")
    return weights.removeprefix(_SERVED) if weights.startswith(_SERVED) else None


def identity(
    teacher: TeacherConfig, reader: AnySide, source: Source, *, served: str | None = None
) -> dict[str, str]:
    """Everything that decides what a teacher says of which record, by name.

    `served`: the name of the model on a server, whose weights nobody here can look at.
    """
    checkpoint = teacher.checkpoint
    if isinstance(reader, ForeignSide):
        return {
            "weights of the teacher": checkpoint_fingerprint(checkpoint),
            "configuration of the teacher": config_fingerprint(checkpoint),
            "teacher.dtype": teacher.dtype,
            "teacher.quantize": str(teacher.quantize),
            "data.exif": "apply" if reader.upright else "ignore",
            "data": source.fingerprint,
            **reader.prints,
        }
    others = {name: _sha(repr(template)) for name, template in sorted(reader.source_templates.items())}
    return {
        **({"data.sources[].template": str(others)} if others else {}),
        _WEIGHTS: checkpoint_fingerprint(checkpoint) if served is None else f"{_SERVED}{served}",
        "configuration of the teacher": config_fingerprint(checkpoint),
        "teacher.dtype": teacher.dtype if served is None else "of the server",
        "teacher.quantize": str(teacher.quantize) if served is None else "of the server",
        "image processor": _sha(repr(reader.transform)),
        "data.exif": "apply" if reader.upright else "ignore",
        "tokenizer": _sha(reader.tokenizer.backend_tokenizer.to_str()),
        "data.template": f"{reader.template.name}, {_sha(repr(reader.template))}",
        "visual tokens": f"{reader.tokens_per_image} an image, id {reader.image_token_id}",
        "data.max_length": str(reader.max_length),
        "data": source.fingerprint,
    }


def refuse_other(there: Mapping[str, str], here: Mapping[str, str], what: str, remedy: str = _REMEDY) -> None:
    """ValueError naming every entry that differs between what `what` was written for and this.

    What was written by an older version ignored orientation tags.
    """
    there = {**{name: value for name, value in _OF_OLDER.items() if name in here}, **there}
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if names:
        shown = [f"{name}: {_short(there.get(name))} there, {_short(here.get(name))} here" for name in names]
        raise ValueError(
            f"{what} was written with other inputs ({'; '.join(shown)}); restore them, or {remedy}"
        )


def reads_projector(terms: Mapping[str, Term]) -> list[str]:
    return [name for name, term in terms.items() if term.reads.projector and term.reads.teacher != "nothing"]


def temperatures(terms: Mapping[str, Term]) -> Sequence[Temperature]:
    """Those of the terms that compare logits, each once: numbers first, then `std`."""
    found: set[Temperature] = set()
    for request in head_requests(terms).values():
        if request.divergence is not None:
            found.add(request.temperature)
    return sorted(found, key=lambda t: (isinstance(t, str), t))


def in_words(temperature: Temperature | None) -> str:
    return f"{temperature:g}" if isinstance(temperature, float | int) else str(temperature)


def trusted_by_probability(terms: Mapping[str, Term]) -> list[str]:
    """Those whose trust needs how likely the label is, not only whether it is the first choice."""
    found = head_requests(terms).items()
    return [name for name, request in found if request.trust in ("probability", "better", "worse")]


def listed(terms: Mapping[str, Term]) -> int:
    """How many of a teacher's largest logits a term looks through; 0 where none does."""
    requests = head_requests(terms).values()
    return max((request.listed for request in requests if request.trust in LISTED), default=0)


def _refuse_missing(
    contents: Contents, terms: Mapping[str, Term], directory: str, *, has_own_targets: bool = False
) -> None:
    """ValueError if a term reads what is not kept."""
    lacking = ""
    if missing := [place for place in places_read(terms) if place not in contents.places]:
        lacking = f"the teacher at {' and '.join(missing)} places, which the terms of `objective` read"
    if contents.mode == "hidden" and (names := reads_projector(terms)) and not contents.projected:
        lacking = f"the projector's output, which {' and '.join(names)} reads"
    if contents.mode == "topk" and (names := beyond_top_k(terms)):
        lacking = (
            f"what {' and '.join(names)} compares: it has only the largest logits. Set the term to null, "
            "or choose a divergence other than `adaptive`"
        )
    if contents.mode == "topk" and contents.temperature != 1 and (names := trusted_by_probability(terms)):
        lacking = (
            f"the label's probability, which the trust of {' and '.join(names)} needs: it was written for "
            f"temperature {in_words(contents.temperature)}, not 1"
        )
    if contents.mode == "topk" and (more := listed(terms)) > (contents.k or 0):
        lacking = f"the {more} largest logits, which a term needs: it has {contents.k}"
    if contents.mode == "topk" and (found := temperatures(terms)) != [contents.temperature]:
        written, asked = in_words(contents.temperature), ", ".join(map(in_words, found))
        lacking = f"probabilities at temperature {asked}: it was written for {written}"
    if contents.mode == "topk" and has_own_targets:
        lacking = f"what {BEYOND_TOP_K} needs"
    if lacking:
        raise ValueError(
            f"the teacher cache {directory} does not have {lacking}. Or write a new cache for these terms "
            "(`llava-kd cache-teacher`)"
        )


def _short(value: str | None) -> str:
    return "nothing" if value is None else value if len(value) < 48 else f"{value[:40]}..."


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
