"""`llava-kd` and `python -m llava_kd.cli` for scripts under test, each started in a moment.

A start is a fork of a process that has imported everything, with the caller's words, folder, environment and
streams. A signal to it is not handed on, so tests of signals start the real ones.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import ranks

_SHIM = """#!{python} -SE
import json, os, socket, sys
words = sys.argv[1:]
if os.path.basename(sys.argv[0]) == "python":
    if words[:2] != ["-m", "llava_kd.cli"]:
        os.execv({python!r}, [{python!r}, *words])
    words = words[2:]
with socket.socket(socket.AF_UNIX) as server:
    server.connect({socket!r})
    socket.send_fds(server, [b"!"], [0, 1, 2])
    server.sendall(json.dumps([words, os.getcwd(), dict(os.environ)]).encode())
    server.shutdown(socket.SHUT_WR)
    status = server.recv(8)
sys.exit(int(status) if status else 1)
"""


class QuickCommands:
    """Both commands in `bin_dir`, to be put first on PATH, until `close`."""

    def __init__(self, bin_dir: Path) -> None:
        self.bin_dir = bin_dir
        address = bin_dir / "socket"
        text = _SHIM.format(python=sys.executable, socket=str(address))
        for name in ("llava-kd", "python"):
            (bin_dir / name).write_text(text)
            (bin_dir / name).chmod(0o755)
        self._server = ranks.Ranks([str(address)], bin_dir / "log", function=_serve)
        self._server.wait_for(address.exists)

    def close(self) -> None:
        self._server.signal(signal.SIGKILL)
        self._server.wait()


def _serve(address: str) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        waiting = f"{address}.starts"
        listening.bind(waiting)
        listening.listen(16)
        os.rename(waiting, address)  # whoever sees it can connect
        while True:
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                _answer(connection)
            connection.close()
            _reap()


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            time.sleep(0)
    except ChildProcessError:
        return


def _answer(connection: socket.socket) -> None:
    """One command, in this process alone, which ends here."""
    from llava_kd.cli import main

    code: object = 1
    try:
        _, streams, _, _ = socket.recv_fds(connection, 1, 3)
        text = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        words, folder, environment = json.loads(text)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        code = main(words)
    except SystemExit as error:
        code = error.code
    except BaseException:  # as the interpreter does at its top: shown, and status 1
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    connection.sendall(str(code if isinstance(code, int) else int(code is not None)).encode())
    os._exit(0)
