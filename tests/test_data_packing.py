"""Packs and plans against the rules in plain words: exact rows, deals, epochs and messages."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from llava_kd.data.batches.packing import Packing, RecordSizes, pack
from llava_kd.data.batches.plan import Epoch, Plan, dealt
from llava_kd.data.sources.mixture import permutation


def sizes_of(seed: int, count: int, *, longest: int = 40, images: int = 3) -> RecordSizes:
    rng = np.random.default_rng(seed)
    return RecordSizes(
        tokens=rng.integers(1, longest + 1, count).astype(np.int32),
        images=rng.integers(0, images + 1, count).astype(np.int32),
    )


def packs_by_the_rule(order: np.ndarray, sizes: RecordSizes, packing: Packing) -> list[list[int]]:
    """The longest, then about as long as divides the room evenly, last the longest that fits; lists alone."""

    def tokens(place: int) -> int:
        return int(sizes.tokens[order[place]])

    waiting: list[int] = []
    packs: list[list[int]] = []
    for start in range(0, len(order), packing.window):
        waiting += range(start, min(start + packing.window, len(order)))
        waiting.sort(key=lambda place: (tokens(place), place))
        is_last = start + packing.window >= len(order)
        while len(waiting) > (0 if is_last else packing.window // 16):
            members: list[int] = []
            room, images_left = packing.max_tokens, packing.max_images
            chosen = waiting[-1]
            while int(sizes.images[order[chosen]]) <= images_left:
                waiting.remove(chosen)
                members.append(int(order[chosen]))
                room -= tokens(chosen)
                images_left -= int(sizes.images[order[chosen]])
                fitting = [place for place in waiting if tokens(place) <= room]
                if not fitting:
                    break
                chosen = fitting[-1]
                more = round(room * len(waiting) / sum(map(tokens, waiting)))
                longer = [place for place in fitting if tokens(place) > room // more] if more > 1 else []
                chosen = longer[0] if longer else chosen
            packs.append(members)
    return packs


@pytest.mark.parametrize("window", [5, 32, 48, 1000])
@pytest.mark.parametrize(("room", "images"), [(40, 3), (100, 4), (100, 99), (333, 12)])
def test_packs_are_those_of_the_rule(window: int, room: int, images: int) -> None:
    packing = Packing(max_tokens=room, max_images=images, window=window)
    for seed, count in enumerate((1, 2, 47, 160)):
        sizes = sizes_of(seed, count)
        order = permutation(count, seed=seed, epoch=0)
        assert pack(order, sizes, packing) == packs_by_the_rule(order, sizes, packing)


def test_records_as_large_as_a_pack_fill_one_each() -> None:
    sizes = RecordSizes(tokens=np.array([9, 9, 2]), images=np.array([4, 0, 4]))
    packs = pack(np.arange(3), sizes, Packing(max_tokens=9, max_images=4))
    assert packs == [[1], [0], [2]]


def test_tokens_of_a_pack_may_need_all_of_32_bits() -> None:
    tokens = np.array([2**31 - 1, 2**31 - 2, 5], dtype=np.int32)
    sizes = RecordSizes(tokens=tokens, images=np.zeros(3, dtype=np.int32))
    assert pack(np.array([2, 0, 1]), sizes, Packing(max_tokens=2**31)) == [[0], [1], [2]]


@pytest.mark.parametrize(
    ("packing", "message"),
    [
        (
            Packing(max_tokens=9, max_images=4),
            "a pack may hold 9 tokens, but record number 1 alone has 10; raise packing.max_tokens",
        ),
        (
            Packing(max_tokens=10, max_images=1),
            "a pack may hold 1 images, but record number 2 alone has 3; raise packing.max_images",
        ),
    ],
)
def test_the_largest_record_over_a_budget_is_named(packing: Packing, message: str) -> None:
    sizes = RecordSizes(tokens=np.array([5, 10, 1]), images=np.array([0, 2, 3]))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        pack(np.arange(3), sizes, packing)


# Deals ----


def deal_by_the_rule(tokens: list[int], world_size: int, step: int) -> list[list[int]]:
    """To and fro from the longest; at each step the one who begins is a stride further."""
    stride = round(world_size / ((1 + math.sqrt(5)) / 2))
    while math.gcd(stride, world_size) != 1:
        stride += 1
    order = sorted(range(len(tokens)), key=lambda row: -tokens[row])
    hands: list[list[int]] = [[] for _ in range(world_size)]
    for k in range(0, len(order), world_size):
        round_of = order[k : k + world_size]
        for rank in range(world_size):
            turn = (rank + step * stride) % world_size
            hands[rank].append(round_of[turn] if k // world_size % 2 == 0 else round_of[::-1][turn])
    return [sorted(hand) for hand in hands]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 6, 8, 12])
def test_rows_are_dealt_to_and_fro_from_the_longest(world_size: int) -> None:
    rng = np.random.default_rng(world_size)
    for step in range(7):
        tokens = rng.integers(1, 6, 3 * world_size)  # with equal ones, which keep their order
        hands = [dealt(tokens, rank=rank, world_size=world_size, step=step) for rank in range(world_size)]
        assert hands == deal_by_the_rule(tokens.tolist(), world_size, step)
        assert all(type(row) is int for hand in hands for row in hand)


# Plans ----


def plan_of(count: int = 50, **changes: object) -> Plan:
    told: dict = {"num_records": count, "seed": 4, "global_batch_size": 6, "world_size": 1} | changes
    return Plan(**told)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_unpacked_rows_go_round_the_ranks_in_the_order_of_the_epochs(world_size: int) -> None:
    plan = plan_of(11, world_size=world_size)
    order = [int(i) for epoch in range(4) for i in permutation(11, seed=4, epoch=epoch)]
    for step in (0, 5, 1, 2, 4, 3, 0):  # also backwards
        for rank in range(world_size):
            mine = order[6 * step : 6 * step + 6][rank::world_size]
            assert plan.rows(step, rank) == [(i,) for i in mine]
    assert plan.steps_per_epoch == 2
    assert plan_of(12).steps_per_epoch == 2
    assert plan_of(13).steps_per_epoch == 3


def rows_by_the_rule(sizes: RecordSizes, packing: Packing, epochs: int) -> list[tuple[int, ...]]:
    """Rows of the run one after the other: each epoch's packs in an order of their own."""
    rows, count = [], len(sizes.tokens)
    for epoch in range(epochs):
        packs = pack(permutation(count, seed=4, epoch=epoch), sizes, packing)
        places = permutation(len(packs), seed=4, epoch=epoch, purpose=1)
        rows += [tuple(packs[place]) for place in places]
    return rows


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_packed_rows_are_dealt_by_their_tokens(world_size: int) -> None:
    sizes, packing = sizes_of(3, 50), Packing(max_tokens=70, max_images=5, packs_per_step=8, window=20)
    plan = plan_of(world_size=world_size, packing=packing, sizes=sizes)
    rows = rows_by_the_rule(sizes, packing, epochs=4)
    assert plan.rows_per_step == 8
    per_epoch = len(rows_by_the_rule(sizes, packing, epochs=1))
    assert plan.steps_per_epoch == math.ceil(per_epoch / 8)
    for step in (0, 1, 2, 3, 7, 4, 2):
        of_step = rows[8 * step : 8 * step + 8]
        tokens = [int(sizes.tokens[list(row)].sum()) for row in of_step]
        hands = deal_by_the_rule(tokens, world_size, step)
        for rank in range(world_size):
            assert plan.rows(step, rank) == [of_step[number] for number in hands[rank]]


def test_packs_of_a_step_hold_about_the_records_asked_for_in_a_multiple_of_the_ranks() -> None:
    sizes, packing = sizes_of(3, 50), Packing(max_tokens=70, max_images=9)
    packs = len(pack(permutation(50, seed=4, epoch=0), sizes, packing))
    for world_size in (1, 2, 3, 5):
        for size in (1, 6, 30):
            plan = plan_of(world_size=world_size, global_batch_size=size, packing=packing, sizes=sizes)
            want = max(1, round(size * packs / 50 / world_size)) * world_size
            assert plan.rows_per_step == want


def test_only_the_epochs_beside_the_last_asked_for_are_kept() -> None:
    plan, made = plan_of(11), []
    make = plan._make
    plan._make = lambda epoch: (made.append(epoch), make(epoch))[1]  # pyright: ignore
    plan._epochs.clear()
    for step in range(12):
        plan.rows(step, 0)
    assert made == sorted(set(made))  # going on, each is made once
    assert len(plan._epochs) == 2
    assert set(plan._epochs) == {made[-2], made[-1]}


def test_an_epoch_gives_its_rows_as_tuples_of_numbers() -> None:
    epoch = Epoch(records=np.array([4, 7, 9]), offsets=np.array([0, 2, 2, 3]))
    assert [epoch.row(r) for r in range(len(epoch))] == [(4, 7), (), (9,)]
    assert epoch.tokens is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"packing": Packing(max_tokens=50)},
            "packing and the sizes of the records must be given together; got only one of them",
        ),
        (
            {"sizes": sizes_of(0, 50)},
            "packing and the sizes of the records must be given together; got only one of them",
        ),
        (
            {"world_size": 4},
            "the global batch (6 rows) must be a multiple of the number of ranks (4)",
        ),
        (
            {"world_size": 2, "packing": Packing(max_tokens=50, packs_per_step=3), "sizes": sizes_of(0, 50)},
            "the global batch (3 rows) must be a multiple of the number of ranks (2)",
        ),
    ],
)
def test_a_plan_that_cannot_be_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        plan_of(**changes)
