"""How answers are continued, token by token: greedily, or drawn with a seed of each question's own.

Shape legend: B questions of a batch, V vocabulary, N new tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Writing:
    """`temperature` 0 is greedy; above it tokens are drawn, from the smallest set of them that holds `top_p`.

    `seed` and the question's id decide what is drawn: neither the batch nor the number of ranks does.
    `marks_cut`: an answer that did not end within its tokens says so. Raises ValueError for values beyond
    their ends.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    marks_cut: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < 100:
            raise ValueError(f"temperature must lie from 0 (greedy) to 100; got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1; got {self.top_p}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def identity(self) -> dict[str, str]:
        """What decides the answers, for the folder that holds them; nothing where they are greedy."""
        if self.is_greedy:
            return {}
        return {"drawn": f"temperature {self.temperature}, top_p {self.top_p}, seed {self.seed}"}

    def draws(self, ids: Sequence[str], num_tokens: int) -> Tensor:
        """Uniform numbers [B, N] of these questions, each from a generator of its own."""
        rows = []
        for name in ids:
            text = f"{self.seed} {name}".encode("utf-8", "surrogatepass")
            generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:7]))
            rows.append(torch.rand(num_tokens, generator=generator, dtype=torch.float64))
        return torch.stack(rows)

    def choose(self, logits_BV: Tensor, uniform_B: Tensor | None) -> Tensor:
        """The next token of each row: the likeliest, or the one where `uniform_B` falls.

        Tokens are laid out by falling probability, so the first of them that reach `top_p` are a prefix.
        """
        if uniform_B is None or self.is_greedy:
            return logits_BV.argmax(-1)
        share_BV, token_BV = (logits_BV.double() / self.temperature).softmax(-1).sort(-1, descending=True)
        before_BV = share_BV.cumsum(-1) - share_BV
        share_BV = torch.where(before_BV < self.top_p, share_BV, 0.0)
        reached_BV = share_BV.cumsum(-1)
        place_B = (reached_BV <= (uniform_B.to(reached_BV.device) * reached_BV[:, -1])[:, None]).sum(-1)
        last_B = (share_BV > 0).sum(-1) - 1
        return token_BV.gather(1, torch.minimum(place_B, last_B)[:, None]).squeeze(1)


GREEDY = Writing()
