"""What is taught of each response token of a micro-batch, by how likely it is private.

A score s in 0..1 moves each setting from what it is for all tokens to what it is at a score of 1: the
teacher's temperature is T + (temperature - T) s, the noise's mass noise s, the weights of the divergence and
of the hard label 1 - (1 - kl) s and 1 - (1 - cross_entropy) s. What is dropped still counts in the
denominators, so that the other tokens weigh what they would without it.

Shape legend: N response rows, R records.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_kd.batch import Batch, Inputs
from llava_kd.losses.divergence import Temperature
from llava_kd.losses.targets.noise import mixed
from llava_kd.losses.targets.swing import SwingTarget

BEYOND_TOP_K = (
    "token_policy.temperature or noise: of the other logits they hold only the sum at one temperature, and "
    "another temperature, or noise, needs each logit; cache hidden states, or use only the policy's weights "
    "(kl, cross_entropy)"
)


@dataclass(frozen=True, kw_only=True)
class TokenPolicy:
    """At a score of 1; `temperature` None is that of the divergence. `seed` is of the noise."""

    temperature: float | None = None
    noise: float = 0.0
    kl: float = 1.0
    cross_entropy: float = 0.0
    seed: int = 0

    @property
    def changes_targets(self) -> bool:
        """Whether it needs all of the teacher's logits, not their largest alone."""
        return self.noise > 0 or self.temperature is not None

    @torch.no_grad()
    def of(self, batch: Batch) -> PolicyRows:
        """For the response rows of a micro-batch, in their order."""
        score_N = batch.student.target_scores_N
        return PolicyRows(policy=self, score_N=score_N, key_N=self._keys(batch))

    def _keys(self, batch: Batch) -> Tensor:
        """Of each response row, from the seed, the step, its record and its place in that alone."""
        inputs = batch.student
        if self.noise == 0:
            return torch.zeros_like(inputs.places.response_N)
        texts = [f"{self.seed}\0{batch.step}\0{name}" for name in batch.record_ids]
        digests = [hashlib.sha256(text.encode()).digest() for text in texts]
        # 63 bits, so that a key is never negative.
        numbers = [int.from_bytes(digest[:8], "little") >> 1 for digest in digests]
        key_R = torch.tensor(numbers, dtype=torch.int64, device=inputs.input_ids_BT.device)
        rows_N = inputs.places.response_N
        place_N = inputs.position_ids_BT.flatten()[rows_N]
        key_N = key_R[records_of(inputs)[rows_N]]
        return (key_N >> 32 << 32) | mixed((key_N & 0xFFFFFFFF) + place_N)


def records_of(inputs: Inputs) -> Tensor:
    """At each place of the flattened rows, the number of its record in the batch."""
    is_start_BT = (inputs.position_ids_BT == 0) & (inputs.segment_ids_BT > 0)
    return is_start_BT.flatten().long().cumsum(0) - 1


@dataclass(frozen=True, kw_only=True)
class PolicyRows:
    """A policy at the response rows of one micro-batch, with their scores and the keys of their noise."""

    policy: TokenPolicy
    score_N: Tensor
    key_N: Tensor

    @property
    def kl_N(self) -> Tensor | None:
        """What each row's divergence is multiplied by; None is 1."""
        return self._moved(self.policy.kl)

    @property
    def cross_entropy_N(self) -> Tensor | None:
        return self._moved(self.policy.cross_entropy)

    def _moved(self, at_one: float) -> Tensor | None:
        return None if at_one == 1 else 1 - (1 - at_one) * self.score_N

    def target(
        self, temperature: Temperature, starts: tuple[int, ...], num_rows: int, num_common: int
    ) -> SwingTarget | None:
        """The teacher's change, for a call of `num_rows` rows in which the response rows begin at `starts`.

        None where it changes nothing. ValueError for a temperature that is no number.
        """
        if not self.policy.changes_targets or not starts:
            return None
        if isinstance(temperature, str):
            raise ValueError(
                f"a token policy needs a number as temperature; got {temperature!r}: set the temperature of "
                "response_kl to one"
            )
        at_one = (self.policy.temperature or temperature) / temperature
        heat = self.score_N.new_ones(num_rows)
        noise, key = self.score_N.new_zeros(num_rows), self.key_N.new_zeros(num_rows)
        for start in starts:
            rows = slice(start, start + len(self.score_N))
            heat[rows] = 1 + (at_one - 1) * self.score_N
            noise[rows], key[rows] = self.policy.noise * self.score_N, self.key_N
        return SwingTarget(
            heat_N=heat, noise_N=noise, key_N=key, temperature=temperature, num_common=num_common
        )


def refuse_beside(policy: TokenPolicy, terms: Mapping[str, tuple[bool, Temperature | None]]) -> None:
    """ValueError for terms that would teach private tokens past the policy, or do not fit its temperature.

    `terms`: of each by name, whether it reads response tokens otherwise than through the head, and the
    temperature at which it compares them.
    """
    if past := [name for name, (is_past, _) in terms.items() if is_past]:
        raise ValueError(
            f"`token_policy` does not reach {' and '.join(past)}, which would train private tokens like all "
            "others; remove them, or set token_policy to null"
        )
    for name, (_, base) in terms.items():
        if base is None or not policy.changes_targets:
            continue
        if isinstance(base, str):
            raise ValueError(
                f"`token_policy.temperature` and `noise` need a number as `objective.{name}.temperature`; "
                f"got {base!r}"
            )
        if policy.temperature is not None and policy.temperature < base:
            raise ValueError(
                f"`token_policy.temperature` ({policy.temperature:g}) must be at least that of all tokens, "
                f"`objective.{name}.temperature` ({base:g}): a lower one would make the targets of private "
                "words sharper"
            )
