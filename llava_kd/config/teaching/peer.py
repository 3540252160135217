"""What fits beside a peer: a second student, in whose settings nothing is another's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llava_kd.config.ranges import require

if TYPE_CHECKING:
    from llava_kd.config.objective import TermSettings


def check_peer(
    beside: Mapping[str, object], terms: Mapping[str, TermSettings], *, projector: str, engine_kind: str
) -> None:
    """ValueError where other settings do not fit a peer.

    `beside`: the settings that were never tried with one, by their names; set where they are not None.
    """
    for name, value in beside.items():
        require(
            value is None,
            f"`peer` and the student learn only from each other, but `{name}` is set; set `{name}` or "
            "`peer` to null",
        )
    require(
        projector == "own",
        f"`peer.projector` is {projector}, but with a peer there is no teacher to take a projector from; "
        "leave projector out",
    )
    require(
        any(term.reads.teacher != "nothing" for term in terms.values()),
        "`peer` is set but no term of `objective` uses it; add a term that reads the teacher, such as "
        "response_kl, or set peer to null",
    )
    for name, term in terms.items():
        read = term.reads
        needs = read.attention or read.attended or read.switched or read.centroids or read.stretches
        require(
            not needs,
            f"`objective.{name}` reads attention, a second pass, stored means or another tokenizer, which "
            "a peer does not provide; leave it out, or set peer to null",
        )
    require(
        engine_kind != "deepspeed",
        "`peer` was never tested with `engine.kind` deepspeed; use auto, single, ddp or fsdp2",
    )
