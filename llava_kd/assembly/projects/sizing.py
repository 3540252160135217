"""How large the steps of a run are, from the number of records and from what the machine holds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from llava_kd.assembly.planning.estimate import ModelSizes, memory
from llava_kd.assembly.planning.machine import GB, Machine
from llava_kd.config import TrainConfig

LEAST_BATCH, MOST_BATCH = 8, 128  # records of a step; the most is that of the paper's second and third stage
STEPS_OF_EPOCH = 24  # an epoch of few records is cut into about as many
ENOUGH_STEPS, MOST_EPOCHS = 300, 10
MOST_MICRO_BATCH = 32
MEMORY_SHARE = 0.8  # of the device: activations are an estimate
VISUAL_TOKENS = 729  # of the usual tower, where another is not known
TEMPLATE_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """`steps` are those of one stage."""

    global_batch_size: int
    epochs: float
    steps: int

    @staticmethod
    def of(num_records: int, ranks: int) -> Sizing:
        """Fewer records: smaller batches, and more epochs, up to `MOST_EPOCHS`.

        The batch is a power of two from 8 to 128 times what makes it a multiple of `ranks`.
        """
        batch = LEAST_BATCH
        while batch < MOST_BATCH and num_records // (2 * batch) >= STEPS_OF_EPOCH:
            batch *= 2
        batch = -(-batch // ranks) * ranks
        of_epoch = -(-num_records // batch)
        epochs = min(MOST_EPOCHS, max(1, -(-ENOUGH_STEPS // of_epoch)))
        return Sizing(global_batch_size=batch, epochs=epochs, steps=of_epoch * epochs)

    def changed(self, num_records: int, own: Mapping[str, object]) -> Sizing:
        """By what a user sets: `global_batch_size`, `epochs` or `max_steps`."""
        batch, epochs, steps = (own.get(key) for key in ("global_batch_size", "epochs", "max_steps"))
        batch = batch if isinstance(batch, int) and batch > 0 else self.global_batch_size
        epochs = epochs if isinstance(epochs, int | float) and epochs > 0 else self.epochs
        if not isinstance(steps, int):
            steps = math.ceil(-(-num_records // batch) * epochs)
        return Sizing(global_batch_size=batch, epochs=epochs, steps=steps)


def max_length(longest: int, images_of_one: int, tokens_per_image: int = VISUAL_TOKENS) -> int:
    """Tokens that hold the longest record even at one token a byte, at most the paper's 2048."""
    wanted = longest + images_of_one * tokens_per_image + TEMPLATE_TOKENS
    return min(max(2048, images_of_one * tokens_per_image + 1024), -(-wanted // 128) * 128)


def micro_batch(
    config: TrainConfig, student: ModelSizes, teacher: ModelSizes | None, machine: Machine, ranks: int
) -> tuple[int, float]:
    """The largest power of two that fits, and the bytes that a rank then needs; 1 where none does."""
    share = max(1, config.global_batch_size // ranks)
    sizes = [1 << k for k in range(MOST_MICRO_BATCH.bit_length()) if (1 << k) <= share]
    sizes = [size for size in sizes if share % size == 0]
    needs = {}
    for size in sizes:
        sized = dataclasses.replace(config, micro_batch_size=size)
        needs[size] = sum(memory(sized, ranks, student, teacher).values())
    fitting = [size for size, need in needs.items() if need <= MEMORY_SHARE * machine.device_memory]
    chosen = max(fitting, default=1)
    return chosen, needs[chosen]


def too_large(need: float, machine: Machine) -> str | None:
    """A warning where a rank needs more than there is."""
    if need <= MEMORY_SHARE * machine.device_memory:
        return None
    where = "GPU" if machine.gpus else "machine"
    return (
        f"a micro-batch of one record is estimated to need {need / GB:.0f} GB, but this {where} has "
        f"{machine.device_memory / GB:.0f} GB; see `Less memory` in docs/clusters.md"
    )
