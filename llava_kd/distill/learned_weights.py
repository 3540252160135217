"""The weights of terms, where they are learned with the student.

Shape legend: K terms with a learned weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from llava_kd.batch import Counts
from llava_kd.distill.rows import count
from llava_kd.distill.terms.term import Term
from llava_kd.losses.uncertainty import learned_loss, log_variances


def learnable(terms: Mapping[str, Term]) -> list[str]:
    """Terms that count and read the teacher; the others keep their weights, as in Beta-KD.

    So do those that may be below 0: their variance has no meaning, and their weight would only grow.
    """
    reading = {name: term for name, term in terms.items() if term.reads.teacher != "nothing"}
    return [name for name, term in reading.items() if term.weight > 0 and not term.goes_below_zero]


class LearnedWeights(nn.Module):
    """A log-variance for each of these terms, trained, sharded and saved with the student's weights."""

    def __init__(self, names: Sequence[str], *, strength: float = 1.0, most: float = 100.0) -> None:
        """`strength`: what a term comes to count for. `most`: how far a weight may go from its setting."""
        super().__init__()
        self.names = tuple(names)
        self._strength = strength
        self._most = most
        self.free_K = nn.Parameter(torch.zeros(len(self.names)))

    def forward(self) -> Tensor:
        """[K] log-variances. A sharding engine gathers the weights here alone."""
        return log_variances(self.free_K, self._most)

    def factors(self, s_K: Tensor) -> dict[str, Tensor]:
        """Of the weights that are set, without gradient."""
        return dict(zip(self.names, (-s_K.detach()).exp().unbind(), strict=True))

    def loss(
        self, s_K: Tensor, terms: Mapping[str, Term], means: Mapping[str, Tensor], own: Counts, counts: Counts
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What learning them adds to the loss of a micro-batch, and the weights for the log.

        `own` are the micro-batch's counts and `counts` the step's: the parts of what is no mean over rows add
        up to one over the step. A step without a row of a term moves its weight nowhere.
        """
        of = [terms[name].denominator.name for name in self.names]
        share_K = torch.stack([(own[name] / count(counts, name)).float() for name in of])
        # A tensor of the weights would be made of host values, which waits for the device.
        weighted_K = torch.stack([terms[name].weight * means[name] for name in self.names])
        added = learned_loss(s_K, weighted_K, share_K, strength=self._strength)
        part = (_sum(own) / _sum(counts).clamp_min(1)).float()
        factors = self.factors(s_K)
        return added, {f"weight/{name}": terms[name].weight * factors[name] * part for name in self.names}


def _sum(counts: Counts) -> Tensor:
    return torch.stack(list(counts.values())).sum()
