"""The settings of answers that the student writes while it trains, and what they need of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt, Interval, Le
from typing_extensions import Doc

from llava_kd.config.ranges import NotNegativeInt, PositiveFloat, PositiveInt, Share, require

if TYPE_CHECKING:
    from llava_kd.config.sections import TrainConfig


@dataclass(frozen=True, kw_only=True)
class WriterServerConfig:
    """A server in vLLM's protocol that writes the answers with weights that it is given on the way."""

    url: Annotated[str, Doc("Its address, such as http://localhost:8000.")]
    model: Annotated[str | None, Doc("What it serves the student as; null where it serves one model.")] = None
    key_env: Annotated[str | None, Doc("The environment variable with its key; null is none.")] = None
    reload_every: Annotated[PositiveInt, Doc("Steps after which it is given the student's weights.")] = 1
    weights: Annotated[
        str | None,
        Doc("Where they are written, by the same path there; null is `on_policy_weights` in output_dir."),
    ] = None
    jobs: Annotated[PositiveInt, Doc("Records that a rank asks about at once.")] = 8
    timeout: Annotated[PositiveFloat, Doc("Seconds that one request may take.")] = 600.0
    retries: Annotated[NotNegativeInt, Doc("Times that a request is tried again.")] = 6


@dataclass(frozen=True, kw_only=True)
class OnPolicyConfig:
    """At a share of the steps the student answers the records itself, and its teacher corrects it: GKD."""

    share: Annotated[
        Share, Doc("Lambda: steps whose answers are the student's own, drawn by `seed` and the step.")
    ] = 0.5
    temperature: Annotated[
        float, Interval(ge=0, lt=100), Doc("Tokens are drawn at it; 0 takes the likeliest.")
    ] = 1.0
    top_p: Annotated[
        float, Interval(gt=0, le=1), Doc("They are drawn from the smallest set that holds so much.")
    ] = 1.0
    max_new_tokens: Annotated[
        int, Gt(0), Le(2**16), Doc("A longer answer is cut off there, and counted.")
    ] = 128
    batch_size: Annotated[PositiveInt, Doc("Records that a rank answers at once, without a server.")] = 32
    server: Annotated[
        WriterServerConfig | None, Doc("Who writes in the student's place; null is the student itself.")
    ] = None


def check_on_policy(config: TrainConfig) -> None:
    """ValueError where a student that answers does not fit the teacher or the terms.

    A cached teacher is refused with all else that needs the teacher itself.
    """
    asked, teacher = config.on_policy, config.teacher
    if asked is None:
        return
    if teacher is None:
        raise ValueError(
            "`on_policy` has the teacher correct the student's answers, but `teacher` is null; set it, or "
            "on_policy to null"
        )
    require(
        teacher.several is None or teacher.several.weights != "agreement",
        "`on_policy` has no labels for `teacher.several.weights` agreement to weigh teachers by; take other "
        "weights, or set on_policy to null",
    )
    for name, other in (
        ("token_policy", config.token_policy),
        ("pictures", config.pictures),
        ("teacher.visual_dependency", teacher.visual_dependency),
    ):
        require(
            other is None,
            f"`{name}` and `on_policy` both decide what an answer's tokens weigh, and were never tried "
            "together; set one to null",
        )
    templates = sorted({part.template for part in config.data.sources if part.template is not None})
    require(
        asked.server is None or not templates,
        "`on_policy.server` writes every answer by one chat template, but data.sources[].template names "
        f"{', '.join(templates)}; set on_policy.server to null",
    )
    require(
        asked.server is None or config.student.lora is None,
        "`on_policy.server` is given whole weights on the way, and those of `student.lora` are merged at the "
        "end alone; set one of them to null",
    )
    _check_terms(config, asked)


def _check_terms(config: TrainConfig, asked: OnPolicyConfig) -> None:
    terms = config.objective.terms
    require(
        any(
            t.weight > 0 and t.reads.teacher != "nothing" and "response" in t.reads.places
            for t in terms.values()
        ),
        f"`on_policy` needs a term that compares answers with the teacher's, and {', '.join(terms)} do not; "
        "add response_kl, best with `divergence: reverse` or `jsd`",
    )
    labelled = [name for name, term in terms.items() if term.reads.labels]
    require(
        not labelled,
        f"`on_policy` gives answers that are no truth, which `objective.{' and '.join(labelled)}` takes for "
        "one; leave that out (of response_kl: trust all), or set on_policy to null",
    )
    require(
        asked.share < 1 or "cross_entropy" not in terms,
        "`on_policy.share` 1 leaves `objective.cross_entropy` without a label at any step; leave it out, or "
        "lower the share",
    )
