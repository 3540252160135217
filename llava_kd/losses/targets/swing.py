"""A teacher's soft targets at a temperature and with noise of each row's own.

With z the teacher's logits over the common columns, T the temperature of the divergence, h >= 1 a row's heat,
c >= 0 its noise and d a random distribution of its own (noise.py), the row's target is

    q = (softmax(z / (h T)) + c d) / (1 + c)

while the student stays at T, and the divergence keeps its factor T^2: multiplied by (h T)^2 instead, softened
rows would count more than the others. After Swing Distillation (arXiv 2212.08349), which gives each token a
temperature by how likely it is private, and noise to soft targets. Neither its code nor its equations were
found: that the temperature is raised on the teacher's side alone, and the law of the noise, are ours.

Shape legend: N rows, C rows of a chunk, R those of them that are changed, U teacher vocabulary, V common
columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava_kd.losses.targets.noise import random_distributions

ELEMENTS_AT_A_TIME = 2**22  # of a few temporaries, whole numbers of 64 bits among them


@dataclass(frozen=True, kw_only=True)
class SwingTarget:
    """Changes logits so that softmax(logits / `temperature`) is the target; rows of heat 1 stay as they are.

    `key_N` int64 draws the noise. To be given to a head loss as its `teacher_change`.
    """

    heat_N: Tensor
    noise_N: Tensor
    key_N: Tensor
    temperature: float
    num_common: int

    @torch.no_grad()
    def __call__(self, index_C: Tensor, logits_CU: Tensor) -> None:
        """In place, of the rows `index_C`."""
        is_changed_C = (self.heat_N[index_C] != 1) | (self.noise_N[index_C] != 0)
        step = max(1, ELEMENTS_AT_A_TIME // self.num_common)
        for places_R in is_changed_C.nonzero().squeeze(1).split(step):
            logits_RV = logits_CU[places_R, : self.num_common]
            logits_CU[places_R, : self.num_common] = self._of(index_C[places_R], logits_RV)

    def _of(self, index_R: Tensor, logits_RV: Tensor) -> Tensor:
        dtype = torch.promote_types(logits_RV.dtype, torch.float32)
        heat_R1 = self.heat_N[index_R].to(dtype).unsqueeze(1)
        noise_R1 = self.noise_N[index_R].to(dtype).unsqueeze(1)
        log_q_RV = (logits_RV.to(dtype) / (heat_R1 * self.temperature)).log_softmax(1)
        if bool((noise_R1 > 0).any()):
            drawn_RV = random_distributions(self.key_N[index_R], self.num_common).to(dtype)
            log_q_RV = torch.logaddexp(log_q_RV, (noise_R1 * drawn_RV).log()) - noise_R1.log1p()
        return (log_q_RV * self.temperature).to(logits_RV.dtype)
