"""The launch scripts: which launcher they start, and where signals go."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"

# A launcher whose one rank writes a checkpoint when told to, which takes a while.
LAUNCHER = """#!/bin/bash
if [ "$DEEP" = yes ]; then DEEP= bash "$0" & wait; exit $?; fi
trap 'echo launcher was told' INT USR1 TERM
echo "launcher $$"
%s
"""
RANK = """
import os, signal, time
from llava_kd.assembly.runs import stopping
told = []
with stopping.stoppable():
    for number in stopping.STOPS:
        signal.signal(number, lambda number, _: told.append(number))
    print("rank", os.getpid(), flush=True)
    while not told:
        time.sleep(0.02)
    time.sleep(0.3)
    print("rank saved", flush=True)
"""


@pytest.fixture
def bin_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("python", "deepspeed"):
        write(folder / name, '#!/bin/sh\necho "$(basename "$0") $*"\n')
    return folder


def write(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def environment(bin_dir: Path, **more: str) -> dict[str, str]:
    clean = {
        k: v for k, v in os.environ.items() if k not in ("CONFIG", "MASTER_PORT", "MASTER_ADDR", "NNODES")
    }
    return clean | {"PATH": f"{bin_dir}:{os.environ['PATH']}", **more}


def said(bin_dir: Path, script: str, *words: str, **more: str) -> str:
    command = ["bash", str(SCRIPTS / script), *words]
    done = subprocess.run(
        command, env=environment(bin_dir, **more), capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120  # a Python that imports starts in 15 s where ten others want its core
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_runs_on_one_machine_need_no_port(bin_dir: Path) -> None:
    assert "--standalone" in said(bin_dir, "stage1_dpt.sh", NPROC="2")
    assert "--master-port 123" in said(bin_dir, "stage1_dpt.sh", NPROC="2", MASTER_PORT="123")


def test_several_machines_meet_at_the_first(bin_dir: Path) -> None:
    line = said(bin_dir, "stage1_dpt.sh", NPROC="8", NNODES="4", NODE_RANK="3", MASTER_ADDR="n0")
    assert "runs.supervise python -m llava_kd.assembly.runs.torchrun --nnodes 4 --node-rank 3 " in line
    assert "--nproc-per-node 8 " in line
    assert "--master-addr n0 --master-port 29500" in line


def test_the_deepspeed_launcher_is_a_choice(bin_dir: Path, tmp_path: Path) -> None:
    line = said(bin_dir, "train.sh", "x.yaml", "--seed=1", NPROC="2", LAUNCHER="deepspeed")
    start = "deepspeed --num_gpus 2 --master_port 29500 --no_local_rank --module llava_kd.cli train"
    assert line == f"python -m llava_kd.assembly.runs.supervise {start} x.yaml --seed=1"
    more = {
        "NPROC": "8",
        "NNODES": "2",
        "NODE_RANK": "1",
        "MASTER_ADDR": "n0",
        "HOSTFILE": str(tmp_path / "h"),
    }
    line = said(bin_dir, "train.sh", "x.yaml", LAUNCHER="deepspeed", **more)
    assert f"--hostfile {tmp_path / 'h'} --no_ssh --node_rank 1 --master_addr n0" in line


def test_stopping_a_script_of_two_students_stops_both_after_they_saved(tmp_path: Path) -> None:
    log = tmp_path / "log"
    training = "trap 'sleep 0.5; echo saved; exit 0' TERM; echo runs; while :; do sleep 0.05; done"
    script = [
        "set -euo pipefail",
        f'source "{SCRIPTS}/both.sh"',
        f'work() {{ bash -c "{training}" >>{log}; echo next >>{log}; }}',
        "both work work",
    ]
    log.touch()
    running = subprocess.Popen(["bash", "-c", "\n".join(script)], stderr=subprocess.PIPE, text=True)
    until(lambda: log.read_text().count("runs") == 2)
    running.terminate()
    _, said_then = running.communicate(timeout=30)
    assert running.returncode == 143
    assert said_then.startswith("stopping; run the same command again to continue\n")  # then bash: Terminated
    assert sorted(log.read_text().split()) == ["runs", "runs", "saved", "saved"]


def test_the_scripts_own_environment_is_used_where_none_is_active(tmp_path: Path) -> None:
    """As after the quickstart: nothing on PATH knows llava_kd."""
    plain = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "NPROC": "1"}

    def run(script: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = ["/bin/bash", str(SCRIPTS / script), "x.yaml"]
        return subprocess.run(
            command, env={**plain, **more}, cwd=tmp_path, capture_output=True, text=True, check=False
        )

    made = tmp_path / "made" / "bin"
    made.mkdir(parents=True)
    for name in ("python", "llava-kd"):
        write(made / name, '#!/bin/sh\necho "$0 $*"\n')
    assert run("train.sh", VENV=str(made.parent)).stdout.startswith(f"{made}/python -m llava_kd.cli train")
    assert run("pipeline.sh", VENV=str(made.parent)).stdout.startswith(f"{made}/python -m llava_kd.cli run")
    for script in ("train.sh", "pipeline.sh"):
        done = run(script, VENV=str(tmp_path / "none"))
        assert done.returncode == 2
        assert "llava_kd is not installed here: activate its environment" in done.stderr


def test_another_launcher_is_refused(bin_dir: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        said(bin_dir, "train.sh", "x.yaml", NPROC="2", LAUNCHER="mpirun")
    assert "LAUNCHER must be torchrun or deepspeed; got mpirun" in caught.value.stderr


def test_a_dry_run_starts_one_process_that_knows_the_number_of_ranks(bin_dir: Path) -> None:
    line = said(bin_dir, "train.sh", "x.yaml", "--dry_run", NPROC="8", NNODES="2")
    assert line == "python -m llava_kd.cli train x.yaml --dry_run --ranks=16"


class Script:
    """`train.sh` over a launcher made here, in a process group of its own, as a shell starts it."""

    def __init__(self, bin_dir: Path, body: str, launcher: str = "torchrun", **more: str) -> None:
        write(bin_dir / launcher, LAUNCHER % body)
        start = f'[ "$2" != llava_kd.assembly.runs.torchrun ] || exec {bin_dir / launcher} "$@"'
        write(bin_dir / "python", f'#!/bin/sh\n{start}\nexec {sys.executable} "$@"\n')
        (bin_dir / "rank.py").write_text(RANK)
        self.log = bin_dir / "log"
        path = f"{bin_dir}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        changes = {"NPROC": "2", "LAUNCHER": launcher, "RANK_PY": str(bin_dir / "rank.py"), **more}
        with self.log.open("w") as stream:
            self.process = subprocess.Popen(
                ["bash", str(SCRIPTS / "train.sh"), "x.yaml"],
                env={**environment(bin_dir), **changes, "PATH": path},
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )

    def pid_of(self, who: str) -> int:
        def said() -> list[str]:
            return re.findall(rf"^{who} (\d+)$", self.log.read_text(), re.M)

        until(lambda: self.process.poll() is not None or bool(said()))
        assert said(), self.log.read_text()
        return int(said()[0])


def is_gone(pid: int) -> bool:
    """Ended, be it that nobody has asked for its status yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"


STATUS = {signal.SIGTERM: 0, signal.SIGUSR1: 0, signal.SIGINT: 130}
stops = pytest.mark.parametrize("number", STATUS, ids=lambda number: number.name)
WITH_A_RANK = 'python "$RANK_PY" &\nwait $!'


@pytest.mark.parametrize(("launcher", "deep"), [("torchrun", ""), ("deepspeed", "yes")])
@stops
def test_a_signal_to_the_group_goes_to_the_ranks_alone_and_the_script_waits_for_them(
    bin_dir: Path, launcher: str, deep: str, number: signal.Signals
) -> None:
    script = Script(bin_dir, WITH_A_RANK, launcher, DEEP=deep)
    script.pid_of("rank")
    os.killpg(script.process.pid, number)
    assert script.process.wait(30) == STATUS[number], script.log.read_text()
    assert "rank saved" in script.log.read_text()
    assert "launcher was told" not in script.log.read_text()


@stops
def test_a_signal_before_the_ranks_exist_ends_everything_at_once(
    bin_dir: Path, number: signal.Signals
) -> None:
    script = Script(bin_dir, "while :; do sleep 0.1; done")
    launcher = script.pid_of("launcher")
    os.killpg(script.process.pid, number)
    assert script.process.wait(30) == STATUS[number]
    assert f"stopped by {number.name} before any rank started" in script.log.read_text()
    until(lambda: is_gone(launcher))


@pytest.mark.parametrize(
    ("script", "number", "status"),
    [("train.sh", *end) for end in STATUS.items()] + [("pipeline.sh", signal.SIGTERM, 143)],
)
def test_a_signal_in_the_first_lines_of_a_script_ends_it(
    bin_dir: Path, script: str, number: signal.Signals, status: int
) -> None:
    """To the shell alone, while it waits for a command that ends well: it must not go on after it."""
    write(bin_dir / "python", f"#!/bin/sh\ntouch {bin_dir}/asked; sleep 1; echo ran $*\n")
    command = ["bash", str(SCRIPTS / script), "x.yaml"]
    with subprocess.Popen(
        command,
        env=environment(bin_dir, NPROC="2"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        until((bin_dir / "asked").exists)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == status
    assert out == ""
    assert (
        err == f"stopped by {number.name} before anything started; run the same command again to continue\n"
    )


@pytest.mark.parametrize("victim", ["script", "launcher"])
def test_ranks_and_launcher_end_when_the_script_or_the_launcher_is_killed(bin_dir: Path, victim: str) -> None:
    script = Script(bin_dir, WITH_A_RANK)
    launcher, rank = script.pid_of("launcher"), script.pid_of("rank")
    os.kill(launcher if victim == "launcher" else script.process.pid, signal.SIGKILL)
    assert script.process.wait(30) == (128 + 9 if victim == "launcher" else -9)
    until(lambda: is_gone(rank) and is_gone(launcher))
    assert "rank saved" not in script.log.read_text()


def test_a_rank_that_comes_after_its_script_was_killed_ends(bin_dir: Path) -> None:
    # The launcher is named, not asked for: one that dies before its child's first line leaves another parent.
    parent_stays = "read -r _ _ _ parent _ </proc/$$/stat && [ $parent = $0 ]"
    late = f"while {parent_stays}; do sleep 0.05; done\nexec python $RANK_PY"
    script = Script(bin_dir, f"bash -c '{late}' $$ & echo \"late $!\"; wait $!")
    late_rank = script.pid_of("late")
    script.process.kill()
    script.process.wait()
    until(lambda: is_gone(late_rank))
    assert not re.search(r"^rank \d", script.log.read_text(), re.M)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"NNODES": "2"}, "NNODES is 2, so set MASTER_ADDR to the first machine (the same"),
        ({"NNODES": "2", "MASTER_ADDR": "n0"}, "NNODES is 2, so set MASTER_ADDR to the first machine"),
        (
            {"NNODES": "2", "MASTER_ADDR": "n0", "NODE_RANK": "2"},
            "NODE_RANK must be from 0 to 1, because NNODES is 2; got 2",
        ),
        ({"NPROC": "two"}, "NPROC must be a whole number from 0 to 99999; got 'two'"),
        ({"NPROC": "08"}, "NPROC must be a whole number from 0 to 99999; got '08'"),
        ({"NPROC": "9" * 20}, "NPROC must be a whole number from 0 to 99999; got '9999"),
        ({"NNODES": "-1"}, "NNODES must be a whole number from 1 to 99999; got '-1'"),
        ({"NNODES": "0"}, "NNODES must be a whole number from 1 to 99999; got '0'"),
    ],
)
def test_a_launch_that_could_only_wait_is_refused(bin_dir: Path, more: dict[str, str], line: str) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        said(bin_dir, "train.sh", "x.yaml", **{"NPROC": "2", **more})
    assert caught.value.returncode == 2
    assert caught.value.stderr.startswith(line)
    assert caught.value.stderr.count("\n") == 1


def test_the_limit_of_open_files_is_raised_to_the_hard_one(bin_dir: Path) -> None:
    write(bin_dir / "python", "#!/bin/sh\nulimit -Sn; ulimit -Hn\n")
    script = f'ulimit -Sn 300; ulimit -Hn 2000; exec bash "{SCRIPTS}/train.sh" x.yaml'
    more = environment(bin_dir, NPROC="1")
    done = subprocess.run(["bash", "-c", script], env=more, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2000", "2000"]


SRUN = """#!/bin/bash
echo "$*" >>"$SRUN_LOG"
while [[ "$1" == --* ]]; do shift; done
trap 'kill -USR1 $!' USR1
SLURM_NODEID=1 "$@" &
while :; do wait $! && status=0 || status=$?; kill -0 $! 2>/dev/null || exit $status; done
"""


def slurm(bin_dir: Path, tmp_path: Path, stage: str) -> tuple[subprocess.Popen[str], Path]:
    write(bin_dir / "srun", SRUN)
    # It writes its second line when a reader of the first has long left.
    write(bin_dir / "scontrol", f'#!/bin/sh\necho "$*" >>{tmp_path}/scontrol\necho n0; sleep 0.3; echo n1\n')
    write(tmp_path / "stage.sh", stage)
    job = {
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[0-1]",
        "SLURM_CPUS_PER_TASK": "64",
        "SRUN_LOG": str(tmp_path / "srun"),
    }
    log = tmp_path / "log"
    command = ["bash", str(SCRIPTS / "slurm.sh"), str(tmp_path / "stage.sh"), "--seed=1"]
    with log.open("w") as stream:
        process = subprocess.Popen(command, env=environment(bin_dir, **job), stdout=stream, text=True)
    return process, log


def test_a_slurm_job_tells_each_machine_its_place(bin_dir: Path, tmp_path: Path) -> None:
    process, log = slurm(bin_dir, tmp_path, 'echo "$NODE_RANK $NNODES $NPROC $MASTER_ADDR $MASTER_PORT $*"\n')
    assert process.wait(30) == 0
    assert log.read_text().strip() == "1 2 8 n0 20007 --seed=1"
    assert "--cpus-per-task=64 bash" in (tmp_path / "srun").read_text()
    assert "requeue" not in (tmp_path / "scontrol").read_text()


def test_a_preempted_slurm_job_waits_for_its_checkpoint_and_goes_back_into_the_queue(
    bin_dir: Path, tmp_path: Path
) -> None:
    stage = "trap 'sleep 0.3; echo saved; exit 0' USR1\necho runs\nwhile :; do sleep 0.05; done\n"
    process, log = slurm(bin_dir, tmp_path, stage)
    until(lambda: "runs" in log.read_text())
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 0
    assert "saved" in log.read_text()
    assert "requeue 7" in (tmp_path / "scontrol").read_text()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=lambda number: number.name)
def test_a_slurm_job_that_is_preempted_before_its_ranks_can_hear_it_goes_back_too(
    bin_dir: Path, tmp_path: Path, number: signal.Signals
) -> None:
    process, log = slurm(bin_dir, tmp_path, "echo runs\nwhile :; do sleep 0.05; done\n")  # it has no trap
    until(lambda: "runs" in log.read_text())
    process.send_signal(number)
    assert process.wait(30) == 0
    assert "requeue 7" in (tmp_path / "scontrol").read_text()
    (tmp_path / "scontrol").unlink()
    process, log = slurm(bin_dir, tmp_path, "echo runs\n")
    until((tmp_path / "scontrol").exists)  # the job asks for its machines
    process.send_signal(number)
    assert process.wait(30) == 0
    assert "runs" not in log.read_text()
    assert "requeue 7" in (tmp_path / "scontrol").read_text()


def test_a_slurm_job_that_fails_is_not_queued_again(bin_dir: Path, tmp_path: Path) -> None:
    process, _ = slurm(bin_dir, tmp_path, "exit 2\n")
    assert process.wait(30) == 2
    assert "requeue" not in (tmp_path / "scontrol").read_text()


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("**/*.sh")), ids=lambda path: path.name)
def test_a_script_neither_dies_of_a_pipe_nor_needs_pgrep(script: Path) -> None:
    """`... | head` ends a script under pipefail at random; not every machine has `pgrep`."""
    code = [line.split("#")[0] for line in script.read_text().splitlines()]
    assert not [line for line in code if re.search(r"\|\s*(head|grep -q)|\b(pgrep|pkill)\b", line)]


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sh")), ids=lambda path: path.name)
def test_a_script_is_sound_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


LATE_RANK = """
import os, signal, socket, sys
from pathlib import Path
from llava_kd.assembly.runs import supervise

end_group = os.killpg

def as_a_rank_comes(group, number):
    variables = Path(f"/proc/{group}/environ").read_bytes().split(b"\\0")
    path = next(v.partition(b"=")[2] for v in variables if v.startswith(supervise.SUPERVISOR.encode()))
    rank = socket.socket(socket.AF_UNIX)
    rank.connect(path)
    print("told", rank.recv(1)[0], flush=True)
    rank.close()
    end_group(group, number)

os.killpg = as_a_rank_comes
waits = "import time; print('ready', flush=True); time.sleep(60)"
sys.exit(supervise.supervise([sys.executable, "-c", waits]))
"""


def test_a_rank_that_comes_while_its_launcher_is_ended_changes_no_status() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", LATE_RANK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    said, complaint = process.communicate(timeout=30)
    assert said == f"told {int(signal.SIGTERM)}\n"
    assert process.returncode == 0, complaint
    assert "stopped by SIGTERM before any rank started; run the same command again to continue" in complaint
