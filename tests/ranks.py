"""`llava-kd` on several local processes, each started in a moment from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
ENGINES = {
    "ddp": ["--engine.kind=ddp"],
    "fsdp2": ["--engine.kind=fsdp2"],
    **{f"zero{n}": ["--engine.kind=deepspeed", f"--engine.zero_stage={n}"] for n in (1, 2, 3)},
}
_PRELOAD = ["llava_kd.assembly.train", "llava_kd.parallel.deepspeed_engine", "kill_points", "warm_up"]
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when the forkserver starts, as is the path
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _become(environment: Mapping[str, str], log: Path) -> None:
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def _call(
    function: Callable[..., None], words: Sequence[str], environment: Mapping[str, str], log: Path
) -> None:
    _become(environment, log)
    function(*words)


def execute(text: str, *words: str) -> None:
    """`python -c text words`, as the `function` of `Ranks`."""
    sys.argv = ["-c", *words]
    exec(compile(text, "<code of a test>", "exec"), {"__name__": "__main__"})


def _main(
    words: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    kill_at: int | None,
    max_file_bytes: int | None,
) -> None:
    _become(environment, log)
    import kill_points

    from llava_kd.assembly.parts import data as build_data
    from llava_kd.cli import main

    if kill_at is not None:
        kill_points.arm(kill_at)
    if max_file_bytes is not None:  # a write past it fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    if "STOP_AFTER" in environment:
        kill_points.stop_after(int(environment["STOP_AFTER"]))
    if "ONE_RECORD_PER_ROW" in environment:  # the oracle of packing is no setting of the config
        build_data.Order = partial(build_data.Order, one_record_per_row=True)  # type: ignore[misc]
    code = main(words)
    print(f"kill points passed: {kill_points.passed}", flush=True)
    sys.exit(code)


@dataclass(frozen=True, kw_only=True)
class Ended:
    """Exit status of each rank (negative: the signal that killed it), and what each printed."""

    codes: tuple[int, ...]
    logs: tuple[str, ...]

    @property
    def log(self) -> str:
        return "\n".join(f"--- rank {rank}\n{text}" for rank, text in enumerate(self.logs))


class Ranks:
    """Ranks of one run, started together; the test ends them, signals them, or waits for them."""

    def __init__(
        self,
        words: Sequence[str],
        log_dir: Path,
        *,
        ranks: int = 1,
        kill_at: Mapping[int, int] | None = None,
        max_file_bytes: int | None = None,
        environment: Mapping[str, str] | None = None,
        function: Callable[..., None] | None = None,
    ) -> None:
        """`kill_at`: at which of its kill points a rank kills itself (see `kill_points`).

        `function`, of an importable module, is called with the words in place of `llava-kd`.
        """
        log_dir.mkdir(parents=True, exist_ok=True)
        self._logs = [log_dir / f"rank{rank}.log" for rank in range(ranks)]
        common = {
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "HF_HUB_OFFLINE": "1",
            **(environment or {}),
        }
        if ranks > 1:
            common |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
            common |= {"MASTER_PORT": common.get("MASTER_PORT", str(free_port()))}
        _CONTEXT.set_forkserver_preload(_PRELOAD)
        self.processes = []
        for rank, log in enumerate(self._logs):
            log.unlink(missing_ok=True)
            of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            arguments = (list(words), {**common, **of_rank}, log, (kill_at or {}).get(rank), max_file_bytes)
            process = _CONTEXT.Process(target=_main, args=arguments)
            if function is not None:
                process = _CONTEXT.Process(target=_call, args=(function, *arguments[:3]))
            process.start()
            self.processes.append(process)

    def signal(self, number: signal.Signals, rank: int = 0) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    def wait_for(self, condition: Callable[[], bool], seconds: float = 90.0) -> None:
        """Until `condition` holds, while every rank lives.

        90 s: they read models, meet and train two steps, on a machine whose cores ten processes may share.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            waits = time.monotonic() < deadline and all(process.is_alive() for process in self.processes)
            assert waits, f"it never came\n{self.wait(0).log}"
            time.sleep(0.02)

    def wait(self, timeout: float = 480.0) -> Ended:
        """Wait for all; a rank that does not end in time is killed, and the test fails.

        480 s, of the 600 of a test: whole trainings, whose length is the machine's. ZeRO compiles at first.
        """
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hanging = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for rank in hanging:
            self.processes[rank].kill()
            self.processes[rank].join()
        ended = Ended(
            codes=tuple(p.exitcode or 0 for p in self.processes),
            logs=tuple(log.read_text() if log.exists() else "" for log in self._logs),
        )
        assert not hanging, f"ranks {hanging} hang\n{ended.log}"
        return ended


def train(
    config: Path,
    output: Path,
    *overrides: str,
    ranks: int = 1,
    timeout: float = 480.0,
    environment: Mapping[str, str] | None = None,
) -> Ended:
    """`llava-kd train` of `config` into `output`; it must succeed."""
    words = ["train", str(config), f"--output_dir={output}", *overrides]
    logs = output.with_name(output.name + "-logs")
    ended = Ranks(words, logs, ranks=ranks, environment=environment).wait(timeout)
    assert set(ended.codes) == {0}, ended.log
    return ended
