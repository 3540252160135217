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

    url: Annotated[str, Doc("Address of the server, such as http://localhost:8000.")]
    model: Annotated[str | None, Doc("Name of the student on the server; null if it serves one model.")] = (
        None
    )
    key_env: Annotated[str | None, Doc("Environment variable with the server's API key; null: none.")] = None
    reload_every: Annotated[
        PositiveInt, Doc("Steps between updates of the server with the student's weights.")
    ] = 1
    weights: Annotated[
        str | None,
        Doc("Folder for these weights, which the server reads too. Null: `on_policy_weights` in output_dir."),
    ] = None
    jobs: Annotated[PositiveInt, Doc("Parallel requests of a rank.")] = 8
    timeout: Annotated[PositiveFloat, Doc("Timeout of a request, in seconds.")] = 600.0
    retries: Annotated[NotNegativeInt, Doc("Number of retries of a request.")] = 6


@dataclass(frozen=True, kw_only=True)
class OnPolicyConfig:
    """At a share of the steps the student answers the records itself, and its teacher corrects it: GKD."""

    share: Annotated[
        Share,
        Doc(
            "Lambda: share of the steps that train on the student's own answers; drawn by `seed` and the "
            "step."
        ),
    ] = 0.5
    temperature: Annotated[float, Interval(ge=0, lt=100), Doc("Sampling temperature; 0 is greedy.")] = 1.0
    top_p: Annotated[
        float,
        Interval(gt=0, le=1),
        Doc("Nucleus sampling: tokens are drawn from the smallest set with this probability mass."),
    ] = 1.0
    max_new_tokens: Annotated[
        int,
        Gt(0),
        Le(2**16),
        Doc("Largest number of tokens in an answer; longer answers are cut off and counted."),
    ] = 128
    batch_size: Annotated[PositiveInt, Doc("Generation batch size of a rank, without a server.")] = 32
    server: Annotated[
        WriterServerConfig | None,
        Doc("Server that generates the student's answers; null: the ranks generate them."),
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
            "`on_policy` needs a teacher to correct the student's answers, but `teacher` is null; set "
            "teacher.checkpoint, or on_policy to null"
        )
    require(
        teacher.several is None or teacher.several.weights != "agreement",
        "`on_policy` has no labels, but `teacher.several.weights` agreement weights teachers by labels; "
        "choose other weights, or set on_policy to null",
    )
    for name, other in (
        ("token_policy", config.token_policy),
        ("pictures", config.pictures),
        ("teacher.visual_dependency", teacher.visual_dependency),
    ):
        require(
            other is None,
            f"`{name}` and `on_policy` both weight the tokens of an answer, which was never tested "
            "together; set one to null",
        )
    templates = sorted({part.template for part in config.data.sources if part.template is not None})
    require(
        asked.server is None or not templates,
        "`on_policy.server` generates all answers with one chat template, but data.sources[].template "
        f"names {', '.join(templates)}; set on_policy.server to null",
    )
    require(
        asked.server is None or config.student.lora is None,
        "`on_policy.server` needs whole weights during training, but the weights of `student.lora` are "
        "merged only at the end; set one of them to null",
    )
    _check_terms(config, asked)


def _check_terms(config: TrainConfig, asked: OnPolicyConfig) -> None:
    terms = config.objective.terms
    require(
        any(
            t.weight > 0 and t.reads.teacher != "nothing" and "response" in t.reads.places
            for t in terms.values()
        ),
        "`on_policy` needs a term that compares answers with the teacher's, but the terms are "
        f"{', '.join(terms)}; add response_kl, best with `divergence: reverse` or `jsd`",
    )
    labelled = [name for name, term in terms.items() if term.reads.labels]
    require(
        not labelled,
        f"`on_policy` generates answers that may be wrong, but `objective.{' and '.join(labelled)}` uses "
        "them as labels; leave it out (in response_kl: set trust to all), or set on_policy to null",
    )
    require(
        asked.share < 1 or "cross_entropy" not in terms,
        "`on_policy.share` 1 leaves `objective.cross_entropy` without labels at every step; leave "
        "cross_entropy out, or lower the share",
    )
