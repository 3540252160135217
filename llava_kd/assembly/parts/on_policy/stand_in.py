"""A student without the hooks of its engine, which writes with weights that are lent to it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

HEAD = "lm_head."


class StandIn:
    """The modules of `stock` once more, without a weight of their own.

    An engine that shards puts hooks on modules that gather weights whenever they are called, on all ranks
    together. Ranks that write answers call them each as often as their own answers need, so they call these.
    """

    def __init__(self, stock: LlavaForConditionalGeneration) -> None:
        """To be made before an engine wraps `stock`."""
        self._stock = stock
        held: dict[int, object] = {id(buffer): buffer for buffer in stock.buffers()}
        for p in stock.parameters():
            held[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
        self.model = copy.deepcopy(stock, held).eval()
        self._places: dict[str, list[tuple[nn.Module, str]]] = {}
        names: dict[int, str] = {}
        for path, module in self.model.named_modules():
            for own, p in module.named_parameters(recurse=False):
                name = names.setdefault(id(p), f"{path}.{own}" if path else own)  # a tied one's is the first
                self._places.setdefault(name, []).append((module, own))

    @contextmanager
    def lent(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """In the block the model has these weights, by their names in an `MLLM`, else those of `stock`."""
        stock_names = {n if n.startswith(HEAD) else f"model.{n}": t for n, t in weights.items()}
        empty = {name: self.model.get_parameter(name) for name in self._places}
        if unknown := stock_names.keys() - empty.keys():
            raise ValueError(f"the new weights must be the student's, which has no weight {min(unknown)!r}")
        for mine, its in zip(self.model.modules(), self._stock.modules(), strict=True):
            mine._buffers.update(its._buffers)
        try:
            for name in self._places:
                given = stock_names.get(name)
                self._put(name, self._stock.get_parameter(name).data if given is None else given)
            yield
        finally:
            for name, parameter in empty.items():
                self._put(name, parameter)

    def _put(self, name: str, value: Tensor) -> None:
        if not isinstance(value, nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)
        for module, own in self._places[name]:
            module._parameters[own] = value
