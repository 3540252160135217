"""How many operations a run's steps take, beside what its loader counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from llava_kd.batch import Batch
from llava_kd.training.trainer import Loader

# Dense bf16 products with fp32 sums, in operations a second, by a part of the device's name: makers' sheets.
PEAKS = {
    "A10G": 70e12,
    "A10": 125e12,
    "A100": 312e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "A6000": 154.8e12,
    "B200": 2250e12,
    "H100": 989.4e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H200": 989.4e12,
    "L4": 121e12,
    "L40": 181e12,
    "L40S": 362e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165.2e12,
}


class Counted:
    """A loader whose telemetry also tells the operations of the micro-batches that it gave, of each model."""

    def __init__(
        self, loader: Loader, operations: Mapping[str, Callable[[Batch], float]], *, peak: float | None
    ) -> None:
        """`operations`: of a micro-batch, by whose they are. `peak`: the most that the device can do."""
        self._loader, self._operations, self._peak = loader, operations, peak
        self._since_last_call = dict.fromkeys(operations, 0.0)

    def batches(self, first_step: int, last_step: int) -> Iterator[list[Batch]]:
        for group in self._loader.batches(first_step, last_step):
            for name, count in self._operations.items():
                self._since_last_call[name] += sum(map(count, group))
            yield group

    def telemetry(self) -> dict[str, float]:
        counted = {f"{name}_tflop": 1e-12 * value for name, value in self._since_last_call.items()}
        self._since_last_call = dict.fromkeys(self._operations, 0.0)
        peak = {} if self._peak is None else {"peak_tflops": 1e-12 * self._peak}
        return {**self._loader.telemetry(), **counted, **peak}
