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
            f"`peer` learns from the student alone, and teaches it alone, but `{name}` is set; set it to "
            "null, or peer",
        )
    require(
        projector == "own",
        f"`peer.projector` is {projector}, but beside a peer there is no teacher to take one from; leave it "
        "out",
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
            f"`objective.{name}` reads attention, another pass, stored means or another tokenizer of a "
            "model, which a peer does not give; leave it out, or set peer to null",
        )
    require(
        engine_kind != "deepspeed",
        "`peer` was never tried under `engine.kind` deepspeed; use auto, single, ddp or fsdp2",
    )
