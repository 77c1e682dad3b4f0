"""Processes of a run folder: start them, know whether they live, end them. Knows paths, imports no engine.

Layout of a run folder, by name:

=====================  ==================================================================================
``config.yaml``        the config as given; ``resolved.yaml``: what ``auto`` became, and why
``attempts/N.json``    one file a start of the run: who started it, where (:class:`Process`), on how many processes
``heartbeat.json``     rank 0, about once a second: who, when, which step, when that step ended
``events/rank-R``      journals (:mod:`workbench.events`)
``readings/``          Arrow streams of the probes: ``KIND-aATTEMPT-rRANK-sSTEP.arrows``, STEP the first of it
``commands/``          one JSON file a command, named by time
``checkpoints/``       ``step-N`` folders; ``logs/``: output of the processes; ``source/``: code and models it was given
=====================  ==================================================================================
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import psutil

from workbench.errors import RunError
from workbench.storage import write_atomic

RANK_VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCHELASTIC_", "WORKBENCH_SUPERVISOR", "WORKBENCH_LISTENER"),
)
"""Beginnings of the variables that tell a rank who it is: a run that a rank starts is none of its own."""

_children: dict[int, subprocess.Popen[bytes]] = {}


@dataclass(frozen=True)
class Process:
    """A process, identified so that a reused pid or another machine is never mistaken for it."""

    host: str
    pid: int
    started: float

    @classmethod
    def current(cls) -> Self:
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int) -> Self:
        return cls(socket.gethostname(), pid, psutil.Process(pid).create_time())

    def alive(self) -> bool | None:
        """True or False on this host, None when the process belongs to another host."""
        if self.host != socket.gethostname():
            return None
        if self.pid in _children and _children[self.pid].poll() is not None:
            return False
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.started) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


@dataclass(frozen=True)
class Heartbeat:
    """Sign of life of rank 0. ``time`` and ``step_time`` are seconds since the epoch."""

    process: Process
    time: float
    attempt: int
    step: int
    step_time: float

    def write(self, folder: Path) -> None:
        write_atomic(folder / "heartbeat.json", json.dumps(asdict(self)), durable=False)

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        values = _read_json(folder / "heartbeat.json")
        return cls(**{**values, "process": Process(**values["process"])}) if values else None


@dataclass(frozen=True)
class Attempt:
    """One start of a run."""

    number: int
    nproc: int
    process: Process
    time: float
    mesh: dict[str, Any] | None = None
    """How its ranks share the work, where that isn't as the config says."""
    ended: float | None = None
    """When its trainer was done with the folder, however it ended; None while it is not, or if it was killed."""
    supervised: bool = False
    """Whether ``process`` is not a rank but the parent of all (:mod:`workbench.supervisor`), which says how they end."""
    failure: str = ""
    """Why its ranks ended, in their supervisor's words; empty while it has nothing to say."""

    @classmethod
    def latest(cls, folder: Path, *, before: int | None = None) -> Self | None:
        """The last attempt claimed, of those ``before`` a number; None before the first."""
        for path in sorted((folder / "attempts").glob("*.json"), reverse=True):
            if before is not None and int(path.stem) >= before:
                continue
            values = _read_json(path)
            if values:
                return cls(**{**values, "process": Process(**values["process"])})
        return None

    def deciding(self) -> bool:
        """Whether a supervisor lives that has yet to say how its ranks ended, or to start them again."""
        return self.supervised and not self.failure and bool(self.process.alive())


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def claim(folder: Path, nproc: int, *, supervisor: Process | None = None) -> int:
    """Number of a new attempt, which is this process's alone until :func:`record` names the worker.

    Args:
        supervisor: the parent of the run's ranks, which may be this process, and carries the run.

    Raises:
        RunError: another process is at it.
    """
    with _locked(folder / "attempts"):
        return _claim(folder, nproc, supervisor=supervisor)


def _claim(folder: Path, nproc: int, mesh: dict[str, Any] | None = None, *, supervisor: Process | None = None) -> int:
    carrier = at_work(folder)
    if carrier is not None and carrier not in (Process.current(), supervisor):
        raise RunError(
            f"The process {carrier.pid} is at the run {folder.name}.", "Open it with Run.open to follow it, or stop it first."
        )
    taken = [int(path.stem) for path in (folder / "attempts").glob("*.json")]
    number = max(taken, default=0) + 1
    latest = Attempt.latest(folder)
    mesh = mesh or (latest.mesh if latest else None)
    record(folder, number, nproc, supervisor or Process.current(), mesh, supervised=supervisor is not None)
    return number


def at_work(folder: Path) -> Process | None:
    """The process on this host that carries the run at present, None when there is none."""
    latest = Attempt.latest(folder)
    if latest is not None and latest.supervised and latest.process.alive():
        return latest.process
    if latest is None or latest.ended is not None:
        return None
    heartbeat = Heartbeat.read(folder)
    carrier = heartbeat.process if heartbeat is not None and heartbeat.attempt == latest.number else latest.process
    return carrier if carrier.alive() else None


def release(folder: Path, number: int, failure: str = "") -> None:
    """Note that the trainer of attempt ``number`` is done with the folder, though its process (a notebook's) may live on.

    Args:
        failure: why it ended, where its supervisor knows.
    """
    attempt = Attempt.latest(folder, before=number + 1)
    if attempt is not None and attempt.number == number:
        attempt = replace(attempt, ended=time.time(), failure=failure or attempt.failure)
        write_atomic(folder / "attempts" / f"{number:04d}.json", json.dumps(asdict(attempt)))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time within; a killed one lets go."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def record(
    folder: Path, number: int, nproc: int, process: Process, mesh: dict[str, Any] | None = None, *, supervised: bool = False
) -> None:
    """Name the process that carries attempt ``number``."""
    attempt = Attempt(number, nproc, process, time.time(), mesh, supervised=supervised)
    write_atomic(folder / "attempts" / f"{number:04d}.json", json.dumps(asdict(attempt)))


def worker_command(folder: Path, attempt: int | None = None) -> list[str]:
    """The command of one rank."""
    command = [sys.executable, "-m", "workbench.worker", str(folder)]
    return command if attempt is None else [*command, "--attempt", str(attempt)]


def command_line(folder: Path, nproc: int, attempt: int, restarts: int = 0, min_nproc: int | None = None) -> list[str]:
    """The command that carries the run: the worker itself, or the supervisor of several or of one that may start again."""
    if nproc == 1 and not restarts:
        return worker_command(folder, attempt)
    numbers = {"attempt": attempt, "nproc": nproc, "restarts": restarts, "min-nproc": min_nproc or nproc}
    options = [f"--{name}={number}" for name, number in numbers.items()]
    return [sys.executable, "-m", "workbench.supervisor", str(folder), *options]


def spawn(
    folder: Path, nproc: int, mesh: dict[str, Any] | None = None, *, restarts: int = 0, min_nproc: int | None = None
) -> Process:
    """Start the worker processes in a session of their own, output to ``logs/``; returns at once.

    The processes inherit nothing but the environment and outlive this one.

    Args:
        mesh: how they share the work, in place of what the config says; by default as at the last start.
        restarts: how often they start again by themselves after one was lost.
        min_nproc: the fewest that may go on when one cannot be started again; by default all must.

    Raises:
        RunError: another process is at the run.
    """
    with _locked(folder / "attempts"):  # until the child is named, so that of two threads that start a run one does
        attempt = _claim(folder, nproc, mesh)
        return _spawn(folder, nproc, attempt, command_line(folder, nproc, attempt, restarts, min_nproc))


def _spawn(folder: Path, nproc: int, attempt: int, command: list[str]) -> Process:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(RANK_VARIABLES)}
    environment["PYTHONUNBUFFERED"] = "1"
    # The worker must import what the notebook can: the folder it runs in, and this very package.
    here = [os.getcwd(), str(Path(__file__).resolve().parent.parent)]
    environment["PYTHONPATH"] = os.pathsep.join([*here, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // nproc)))
    with log_of(folder, attempt).open("ab") as log:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    process = Process.of(child.pid)  # until somebody waits for it, it is there, though it may have ended
    _children[child.pid] = child
    threading.Thread(target=child.wait, name="workbench-child", daemon=True).start()  # else it stays a zombie
    claimed = Attempt.latest(folder)
    supervised = "workbench.supervisor" in command
    record(folder, attempt, nproc, process, claimed.mesh if claimed else None, supervised=supervised)
    return process


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def terminate(process: Process, grace: float = 10.0) -> None:
    """End a process and its descendants: asked first, killed after ``grace`` seconds.

    Raises:
        RunError: the process belongs to another host.
    """
    state = process.alive()
    if state is None:
        raise RunError(f"The run's processes belong to the host {process.host}.", "End them there, or send the command stop.")
    if not state:
        return
    leader = psutil.Process(process.pid)
    family = [leader, *leader.children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGTERM)
    _, left = psutil.wait_procs(family, timeout=grace)
    for member in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(left, timeout=grace)


def log_of(folder: Path, attempt: int) -> Path:
    """Where the processes of an attempt print."""
    return folder / "logs" / f"attempt-{attempt:04d}.log"


def tail(folder: Path, attempt: int, lines: int = 30) -> str:
    """The last lines that the processes of an attempt printed."""
    path = log_of(folder, attempt)
    if not path.exists():
        return ""
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
