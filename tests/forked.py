"""Ranks as forks of a process that has imported the engine, where a test is about what ranks compute.

Importing PyTorch takes a rank several seconds, more than all that most tests have it do. Whatever else a rank is, it is here too:
a process of its own, told by its command and environment alone, under a supervisor, killed as any other. That command lines start
ranks, and what becomes of ranks that are lost, is tested with real ones (``test_lost_ranks.py``, ``test_bad_input.py``).

* :class:`Fork` — ``subprocess.Popen`` of one of our command lines, as a fork of this process.
* :class:`Nursery` — stands in for the module ``subprocess``: its ``Popen`` has a process forked that never computed anything.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from types import SimpleNamespace
from typing import IO, Any, NoReturn

TICK = 0.01
"""Seconds between two looks at forks."""


class Fork:
    """What ``Popen`` gives, of the command ``[python, "-m", module, *arguments]``."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdout: IO[bytes] | int,
        env: dict[str, str],
        cwd: str | None = None,
        pass_fds: Sequence[int] = (),
        **options: Any,
    ) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            log = stdout if isinstance(stdout, int) else stdout.fileno()
            _become(list(command[2:]), log, env, cwd or os.getcwd(), set(pass_fds), "process_group" in options)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(TICK)
        return code


FORKING = SimpleNamespace(
    Popen=Fork, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT, TimeoutExpired=subprocess.TimeoutExpired
)


def _become(argv: list[str], log: int, env: dict[str, str], cwd: str, keep: set[int], group: bool) -> NoReturn:
    """Be the process that the command would start, from here to its end."""
    status: Any = 1
    try:
        os.setpgid(0, 0) if group else os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        for descriptor in {int(name) for name in os.listdir("/proc/self/fd")} - keep - {0, 1, 2}:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(env)
        os.chdir(cwd)
        sys.path[:0] = [cwd, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
        sys.argv = argv
        importlib.import_module("workbench.supervisor").subprocess = FORKING  # type: ignore[attr-defined]
        status = importlib.import_module(argv[0]).main()
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)


class Nursery:
    """The process that forks, started when it is first needed."""

    DEVNULL, STDOUT = subprocess.DEVNULL, subprocess.STDOUT

    def __init__(self) -> None:
        self.control, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with there:
            command = [sys.executable, __file__, str(there.fileno())]
            self.process = subprocess.Popen(command, pass_fds=[there.fileno()], stdin=subprocess.DEVNULL)
        self.born: list[Born] = []

    def Popen(self, command: Sequence[str], *, stdout: IO[bytes], env: dict[str, str], **options: Any) -> Born:
        mine, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with there:
            request = json.dumps({"command": list(command), "env": env, "cwd": os.getcwd()}).encode()
            socket.send_fds(self.control, [request], [stdout.fileno(), there.fileno()])
        self.born.append(Born(mine))
        return self.born[-1]

    def clear(self) -> None:
        """Kill all that were born and live."""
        for child in self.born:
            with contextlib.suppress(ProcessLookupError):
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
            child.wait()

    def close(self) -> None:
        self.clear()
        for child in self.born:  # only now: some thread may still be about to look
            child.link.close()
        self.control.close()
        self.process.wait()


class Born:
    """A fork of the nursery's, seen from the tests; its exit code is peeked at, since several threads wait for it."""

    def __init__(self, link: socket.socket) -> None:
        self.link = link
        self.pid = int(link.recv(32) or 0)
        assert self.pid, "the nursery is gone"
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self.link], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = int(self.link.recv(32, socket.MSG_PEEK) or -signal.SIGKILL)
        return self.returncode


def main(control: socket.socket) -> None:
    """Fork for whoever asks, and say how each fork ended; until nobody can ask any more."""
    sys.path.pop(0)  # this folder: a rank does not see it
    for module in ("torch._dynamo", "timm", "transformers.models.bert", "workbench.training.session", "workbench.worker"):
        importlib.import_module(module)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork has one thread only"
    living: dict[Fork, socket.socket] = {}
    while True:
        if select.select([control], [], [], TICK if living else None)[0]:
            request, descriptors, _, _ = socket.recv_fds(control, 1 << 20, 2)
            if not request:
                return
            asked = json.loads(request)
            child = Fork(asked["command"], stdout=descriptors[0], env=asked["env"], cwd=asked["cwd"])
            os.close(descriptors[0])
            living[child] = socket.socket(fileno=descriptors[1])
            living[child].send(str(child.pid).encode())
        for child in [child for child in living if child.poll() is not None]:
            with contextlib.suppress(OSError), living.pop(child) as link:
                link.send(str(child.returncode).encode())


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
