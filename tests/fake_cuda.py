"""A CUDA device that is not there: tensors without values, so that its code paths run on any machine.

Inside `fake_cuda()` PyTorch's FakeTensorMode carries shapes, types and devices, and refuses to mix devices
or to give a value; `Watch` notes what makes the host wait, and which products are made in fp32. What only a
driver can answer (streams, properties of the card, Triton's launch) is answered here instead: a launch is
checked against its kernel's arguments. The autograd engine needs a driver too, so its graph is walked here.
"""

from __future__ import annotations

import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton.runtime.jit
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llava_kd.models import mllm
from llava_kd.models.attention import probe

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
OURS = str(Path(__file__).parent.parent / "llava_kd")
COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm"}


@dataclass(frozen=True)
class Product:
    """A matrix product: what its operands are rounded to, its sizes, and the line of ours that wants it."""

    precision: str
    sizes: tuple[int, ...]
    line: str


class Watch(TorchDispatchMode):
    """What a block did: `waits` by line of ours, products, launches of Triton kernels.

    `races`: copies to the host that it does not wait for, and so reads before they are there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.races: Counter[str] = Counter()
        self.products: list[Product] = []
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        if func in COPIES and (source_and_target := _crossing(func, args, out)) is not None:
            is_free = _is_non_blocking(func, args, kwargs or {})
            if not is_free:
                self.waits[_line_of_ours()] += 1
            elif not source_and_target[1].is_cuda:
                self.races[_line_of_ours()] += 1
        if func in INDEXING and any(_is_awkward(index, args[0]) for index in args[1]):
            self.waits[_line_of_ours()] += 1
        if func.namespace == "aten" and func._opname in PRODUCTS:
            one, other = [a for a in args if isinstance(a, Tensor)][-2:]
            is_tf32 = one.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
            precision = "tf32" if is_tf32 else str(one.dtype).removeprefix("torch.")
            self.products.append(Product(precision, (*one.shape, other.shape[-1]), _line_of_ours()))
        return out


def _crossing(func: Callable, args: tuple, out: Any) -> tuple[Tensor, Tensor] | None:
    """Source and target of a copy from one kind of device to another."""
    source, target = (args[1], args[0]) if func is aten.copy_.default else (args[0], out)
    return None if source.device.type == target.device.type else (source, target)


def _is_non_blocking(func: Callable, args: tuple, kwargs: dict) -> bool:
    if func is aten.copy_.default and len(args) > 2:
        return args[2]
    return kwargs.get("non_blocking", False)


def _is_awkward(index: Tensor | None, tensor: Tensor) -> bool:
    return index is not None and (index.dtype == torch.bool or index.device != tensor.device)


def _line_of_ours() -> str:
    """Nearest function of the package on the stack."""
    frames = [f for f in traceback.extract_stack() if f.filename.startswith(OURS)]
    return f"{Path(frames[-1].filename).name} {frames[-1].name}" if frames else "the test"


class _Stream:
    """Stands for streams and events: they order nothing here."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def nothing(self, *_: object) -> None:
        pass

    wait_stream = wait_event = record = synchronize = nothing


def forget_tensors() -> None:
    """Of all caches of the package that may hold one."""
    for module in [m for name, m in sys.modules.items() if name.startswith("llava_kd.data.pixels.")]:
        for kept in vars(module).values():
            if hasattr(kept, "cache_clear"):
                kept.cache_clear()


@contextmanager
def fake_cuda() -> Iterator[tuple[FakeTensorMode, Watch]]:
    """The mode that holds the tensors, and a watch that sees nothing until it is entered."""
    watch = Watch()
    renewed: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}

    def launch(kernel: Any, *args: object, grid: tuple[int, ...], warmup: bool, **kwargs: object) -> None:
        named = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
        bound = kernel.signature.bind(*args, **named)
        for name, value in bound.arguments.items():
            assert not isinstance(value, Tensor) or value.device == CUDA, f"{kernel.__name__}: {name}"
        watch.launches[kernel.__name__] += 1

    def apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return _apply(module, change, renewed)

    def numpy(tensor: Tensor, *words: object, **more: object) -> np.ndarray:
        if isinstance(tensor, FakeTensor):  # hashes are of shapes alone
            return np.zeros(tensor.shape, np.uint8)
        return real_numpy(tensor, *words, **more)

    real_numpy: Any = Tensor.numpy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "numpy", numpy)
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "get_rng_state", lambda *_: torch.zeros(16, dtype=torch.uint8))
        patch.setattr(torch.cuda, "set_rng_state", lambda *_: None)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        patch.setattr(torch.cuda, "_exchange_device", lambda _: 0)
        patch.setattr(torch.cuda, "_maybe_exchange_device", lambda _: 0)
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        patch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda *_: SimpleNamespace(name="NVIDIA H200", total_memory=80 * 10**9),
        )
        for name in ("Stream", "Event"):
            patch.setattr(torch.cuda, name, _Stream)
        patch.setattr(triton.runtime.jit.JITFunction, "run", launch)
        patch.setattr(nn.Module, "_apply", apply)
        patch.setattr(Tensor, "backward", lambda tensor, *_, **__: backward(tensor))
        patch.setattr(Tensor, "pin_memory", lambda tensor, *_: tensor)
        patch.setattr(torch.autograd, "grad", _grad)
        patch.setattr(torch, "equal", lambda *_: True)
        patch.setattr(probe, "_fault", lambda *_, **__: "")  # this and the next compare values
        patch.setattr(mllm, "check_maps", lambda *_, **__: None)
        patch.setattr(torch, "_check_tensor_all_with", lambda *_: None)
        patch.setattr(torch._C, "_current_graph_task_id", lambda: 1)  # one recomputation a checkpoint
        forget_tensors()  # what is kept from before has values, and is refused inside
        try:
            with FakeTensorMode() as mode:
                yield mode, watch
        finally:
            forget_tensors()  # what is kept from inside has none, and other tests would be given it


def _apply(
    module: nn.Module,
    change: Callable[[Tensor], Tensor],
    renewed: dict[int, tuple[nn.Parameter, nn.Parameter]],
) -> nn.Module:
    """As PyTorch's own, which cannot swap fake parameters; tied ones stay tied."""
    for child in module.children():
        child._apply(change)
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        if id(parameter) not in renewed:
            with torch.no_grad():
                changed = nn.Parameter(change(parameter).detach(), requires_grad=parameter.requires_grad)
            renewed[id(parameter)] = (parameter, changed)
        module._parameters[name] = renewed[id(parameter)][1]
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else change(buffer)
    return module


def on_fake_cuda(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """A real tensor's shadow on the device."""
    return mode.from_tensor(tensor).to(CUDA)


def without_values(module: nn.Module, mode: FakeTensorMode) -> None:
    """The weights of a loaded model, still on the host, as shadows of themselves."""
    module._apply(mode.from_tensor)


def _grad(output: Tensor, leaves: Tensor | Sequence[Tensor], **_: object) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` of a scalar with respect to leaves."""
    leaves = [leaves] if isinstance(leaves, Tensor) else leaves
    kept = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    backward(output)
    found = [leaf.grad for leaf in leaves]
    for leaf, grad in zip(leaves, kept, strict=True):
        leaf.grad = grad
    return tuple(found)


def backward(root: Tensor) -> None:
    """The autograd engine's work: every node after those that it depends on, leaves accumulate."""
    assert root.grad_fn is not None
    waiting = _uses(root.grad_fn)
    found: dict[Any, dict[int, Tensor]] = {root.grad_fn: {0: torch.ones_like(root)}}
    ready: list[Any] = [root.grad_fn]
    while ready:
        node = ready.pop()
        gradients = _as_expected(node, found.pop(node, {}))
        made = _run(node, gradients)
        for (after, slot), gradient in zip(node.next_functions, made, strict=True):
            if after is None:
                continue
            if gradient is not None:
                slots = found.setdefault(after, {})
                slots[slot] = slots[slot] + gradient if slot in slots else gradient
            waiting[after] -= 1
            if not waiting[after]:
                ready.append(after)


def _uses(root: Any) -> Counter[Any]:
    """How many nodes hand a gradient to each node below `root`."""
    uses: Counter[Any] = Counter()
    seen, stack = {root}, [root]
    while stack:
        for after, _ in stack.pop().next_functions:
            if after is None:
                continue
            uses[after] += 1
            if after not in seen:
                seen.add(after)
                stack.append(after)
    return uses


def _as_expected(node: Any, gradients: dict[int, Tensor]) -> list[Tensor | None]:
    """What reaches a node, in the shape and type of its output; a gradient from elsewhere is an error."""
    given: list[Tensor | None] = []
    for slot, output in enumerate(node._input_metadata):
        gradient = gradients.get(slot)
        if gradient is not None:
            assert gradient.device == output.device, f"{node.name()}: {gradient.device}, not {output.device}"
            gradient = gradient.sum_to_size(output.shape).to(output.dtype)
        given.append(gradient)
    return given


@torch.no_grad()
def _run(node: Any, gradients: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    if isinstance(leaf := getattr(node, "variable", None), Tensor):
        (gradient,) = gradients
        if gradient is not None:
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
        return ()
    if not any(isinstance(gradient, Tensor) for gradient in tree_leaves(gradients)):
        return (None,) * len(node.next_functions)
    call = node.apply if isinstance(node, torch.autograd.function.BackwardCFunction) else node
    made = call(*gradients)
    made = made if isinstance(made, tuple) else (made,)
    return made[: len(node.next_functions)]
