"""Engines on a small module: the arithmetic of a step, and states that load in any other engine.

Shape legend: B rows, D width.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llava_kd.parallel.engine import STATE_KINDS, AdamWSettings, ParameterGroup
from llava_kd.parallel.torch_engine import TorchEngine
from llava_kd.parallel.world import World, join, leave

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
EngineKind = Literal["single", "ddp", "fsdp2"]
State = dict[str, Tensor]


class Net(nn.Module):
    """Two trained layers of odd sizes and a frozen one; returns the sum of squares over its rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 7)
        self.frozen = nn.Linear(7, 7).requires_grad_(False)
        self.last = nn.Linear(7, 3)

    def forward(self, rows_BD: Tensor) -> Tensor:
        return self.last(self.frozen(self.first(rows_BD).tanh()).tanh()).square().sum()


def names_of(part: str) -> tuple[str, ...]:
    return (f"{part}.weight", f"{part}.bias")


def engine_of(
    kind: EngineKind = "single",
    world: World = ALONE,
    *,
    parts: Sequence[str] = ("first", "last"),
    lr: float = 0.01,
) -> TorchEngine:
    net = Net()
    groups = [ParameterGroup(names=names_of(part), lr=lr) for part in parts]
    settings = AdamWSettings(weight_decay=0.1)
    return TorchEngine(
        net, groups, world=world, kind=kind, adamw=settings, bf16=False, shard_units=[net.first, net.last]
    )


def rows_of(step: int) -> Tensor:
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(step))


def do_step(engine: TorchEngine, step: int, *, cuts: int = 1, max_grad_norm: float = 1.0) -> Tensor:
    """One update on this rank's share of the step's rows, in `cuts` micro-batches; the gradient norm."""
    own = rows_of(step).chunk(engine.world.size)[engine.world.rank].chunk(cuts)
    for number, rows_BD in enumerate(own):
        is_last = number == len(own) - 1
        engine.backward(engine.forward(rows_BD, is_last=is_last), is_last=is_last)
    return engine.step(lr_multiplier=1 / (step + 1), max_grad_norm=max_grad_norm)


def assert_same(got: State, expected: State, tolerance: float = 0) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=tolerance, atol=tolerance)


def test_a_step_is_adamw_on_the_clipped_sum_of_the_micro_batches() -> None:
    engine, net = engine_of(), Net()
    trained = [p for p in net.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=0.01, eps=1e-8, weight_decay=0.1)
    for step in range(3):
        norm = do_step(engine, step, cuts=4, max_grad_norm=0.5)
        net(rows_of(step)).backward()
        expected = nn.utils.clip_grad_norm_(trained, 0.5)
        torch.testing.assert_close(norm, expected)
        assert expected > 0.5
        adamw.param_groups[0]["lr"] = 0.01 / (step + 1)
        adamw.step()
        adamw.zero_grad()
    assert_same(engine.parameters(), {name: p.detach() for name, p in net.named_parameters()}, 1e-6)


def test_each_group_has_its_own_rate() -> None:
    net = Net()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    groups = [
        ParameterGroup(names=names_of("first"), lr=0.1),
        ParameterGroup(names=names_of("last"), lr=1e-3),
    ]
    engine = TorchEngine(net, groups, world=ALONE, kind="single", adamw=AdamWSettings(), bf16=False)
    do_step(engine, 0)
    change = {name: (value - before[name]).abs().max() for name, value in engine.parameters().items()}
    for name in names_of("first"):
        torch.testing.assert_close(change[name], torch.tensor(0.1), rtol=1e-3, atol=0)
    for name in names_of("last"):
        torch.testing.assert_close(change[name], torch.tensor(1e-3), rtol=1e-3, atol=0)
    assert all(change[name] == 0 for name in names_of("frozen"))


def test_a_state_holds_the_trained_parameters_and_both_moments() -> None:
    engine = engine_of(parts=("last",))
    fresh = engine.state()
    assert fresh.keys() == {f"{kind}/{name}" for kind in STATE_KINDS for name in names_of("last")}
    do_step(engine, 0)
    assert bool(engine.state()["exp_avg_sq/last.weight"].any())


@pytest.mark.parametrize("done", [0, 3])
def test_a_loaded_engine_goes_on_bit_for_bit(done: int) -> None:
    engine, other = engine_of(), engine_of()
    for step in range(done):
        do_step(engine, step)
    other.load_state(engine.state(), num_steps=done)
    for step in range(done, done + 3):
        do_step(engine, step)
        do_step(other, step)
    assert_same(other.state(), engine.state())


def test_a_loaded_state_is_a_copy() -> None:
    engine = engine_of()
    do_step(engine, 0)
    state = engine.state()
    kept = {name: value.clone() for name, value in state.items()}
    other = engine_of()
    other.load_state(state, num_steps=1)
    do_step(other, 1)
    assert_same(state, kept)


def test_a_state_of_other_parts_is_refused() -> None:
    state = engine_of(parts=("first",)).state()
    with pytest.raises(
        ValueError, match=r"no 'parameter/last\.weight'.* trained other parts; resume with the same"
    ):
        engine_of(parts=("first", "last")).load_state(state, num_steps=0)


def test_a_state_of_more_parts_is_refused() -> None:
    state = engine_of(parts=("first", "last")).state()
    with pytest.raises(ValueError, match="trained other parts"):
        engine_of(parts=("first",)).load_state(state, num_steps=0)


def test_one_device_is_refused_on_several_ranks() -> None:
    with pytest.raises(ValueError, match=r"engine\.kind is single but 2 processes run; use ddp or fsdp2"):
        engine_of("single", World(rank=0, size=2, device=torch.device("cpu")))


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match=r"engine\.device must be auto, cpu or cuda; got 'tpu'"):
        join("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_cuda_device_is_said() -> None:
    with pytest.raises(ValueError, match=r"engine\.device is cuda but no CUDA device is visible"):
        join("cuda")


def sharded(rank: int, kind: EngineKind, port: int, folder: str) -> None:
    """On one of two ranks: go on from the state in `folder` and leave the next one there."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    world = join("cpu")
    engine = engine_of(kind, world)
    engine.load_state(load_file(Path(folder) / "before.safetensors"), num_steps=2)
    norm = do_step(engine, 2, cuts=2)
    state = engine.state()
    assert (len(state) > 0) == world.is_main
    if world.is_main:
        save_file(state | {"norm": norm.detach().reshape(1)}, Path(folder) / f"{kind}.safetensors")
    world.barrier()
    leave()


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_state_moves_from_one_device_to_two_ranks_and_back(tmp_path: Path, kind: EngineKind) -> None:
    engine = engine_of()
    for step in range(2):
        do_step(engine, step)
    save_file(engine.state(), tmp_path / "before.safetensors")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(sharded, args=(kind, port, str(tmp_path)), nprocs=2)
    state = load_file(tmp_path / f"{kind}.safetensors")
    norm = state.pop("norm")[0]
    torch.testing.assert_close(norm, do_step(engine, 2))
    assert_same(state, engine.state(), 1e-5)
    back = engine_of()
    back.load_state(state, num_steps=3)
    do_step(back, 3)
    do_step(engine, 3)
    assert_same(back.state(), engine.state(), 1e-5)
