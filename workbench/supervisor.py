"""``python -m workbench.supervisor RUN --attempt N --nproc P``: the parent of a run's ranks on this machine.

It starts them, watches them, and when one is lost ends the others, writes down which died and why
(:class:`workbench.launcher.Attempt`), and starts all again from the last checkpoint, as often as it was told to. An error that
would come again, as a setting out of range does, is not tried again. It imports no engine, so that it is up at once and holds
next to no memory. Ranks whose supervisor is gone end themselves (:mod:`workbench.worker`). Over several machines, torchrun does
the same (:mod:`workbench.cluster`).

* :class:`Ranks` — the processes of one attempt. * :func:`supervise` — attempts, until one ends well.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from workbench import launcher
from workbench.errors import ConfigError, RunError, WorkbenchError
from workbench.run import Run

TICK = 0.05
"""Seconds between two looks at the ranks."""
SETTLE = 2.0
"""Seconds that ranks have, once one is gone, to end by themselves: who died first is told from who died of that."""
PATIENCE = 20.0
"""Seconds that a killed process has to be gone."""
PERMANENT = 2
"""Exit code of a rank whose error would come again: a setting, a model, a full disk."""
UNFIT = 3
"""Exit code of a rank whose accelerator is absent or broken: others may do without it."""


class Ranks:
    """The processes of an attempt, each the leader of a process group, so that its helpers end with it.

    Args:
        folder: the run's.
        attempt: its number.
        places: the local rank (the accelerator's number) of each rank.
    """

    def __init__(self, folder: Path, attempt: int, places: Sequence[int]) -> None:
        self.places = list(places)
        # Ranks meet where rank 0 listens: on a port that is taken here already, so that nobody else gets it meanwhile.
        with socket.create_server(("127.0.0.1", 0)) as listener, launcher.log_of(folder, attempt).open("ab") as log:
            shared = {
                "WORLD_SIZE": len(self.places),
                "LOCAL_WORLD_SIZE": len(self.places),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": listener.getsockname()[1],
                "WORKBENCH_SUPERVISOR": os.getpid(),
            }
            self.children: list[subprocess.Popen[bytes]] = []
            for rank, place in enumerate(self.places):
                own = {"RANK": rank, "LOCAL_RANK": place} | ({"WORKBENCH_LISTENER": listener.fileno()} if rank == 0 else {})
                child = subprocess.Popen(
                    launcher.worker_command(folder, attempt),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=os.environ | {name: str(value) for name, value in (shared | own).items()},
                    pass_fds=[listener.fileno()] if rank == 0 else [],
                    process_group=0,
                )
                self.children.append(child)

    def watch(self) -> dict[int, int]:
        """Block until all have ended well, or one has not: exit codes by rank of those that ended badly by themselves."""
        deadline = float("inf")
        while True:
            codes = {rank: child.poll() for rank, child in enumerate(self.children)}
            bad = {rank: code for rank, code in codes.items() if code}
            if None not in codes.values() or time.monotonic() > deadline:
                return bad
            if bad:
                deadline = min(deadline, time.monotonic() + SETTLE)
            time.sleep(TICK)

    def end(self) -> None:
        """Kill what is left of them, helpers included, and wait until the system has taken back what they held."""
        for child in self.children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        for child in self.children:
            try:
                child.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                raise RunError(
                    f"The process {child.pid} was killed and does not end: it waits in a driver.",
                    "Reset its accelerator, or start the machine again; resume() then goes on from the last checkpoint.",
                ) from None


def supervise(folder: Path, attempt: int, nproc: int, restarts: int = 0, min_nproc: int | None = None) -> int:
    """Carry a run from attempt number ``attempt`` on; 0 when it ended well, 1 when it did not.

    Args:
        restarts: how often to start the ranks again after one was lost.
        min_nproc: the fewest ranks to go on with when one cannot be started again; by default all must.
    """
    places = list(range(nproc))
    while True:
        killed_before = out_of_memory_kills()
        ranks = Ranks(folder, attempt, places)
        try:
            bad = ranks.watch()
        finally:
            ranks.end()
        if not bad or _is_over(Run(folder), attempt):
            return 0
        failure = in_words(Run(folder), attempt, ranks, bad, _rise(killed_before, out_of_memory_kills()))
        left = remaining(Run(folder), attempt, places, bad, min_nproc or nproc)
        print(failure, file=sys.stderr, flush=True)
        if restarts == 0 or not left:
            launcher.release(folder, attempt, failure)
            return 1
        restarts, places = restarts - 1, left
        following = launcher.claim(folder, len(places), supervisor=launcher.Process.current())
        launcher.release(folder, attempt, failure)
        attempt = following


def remaining(run: Run, attempt: int, places: list[int], bad: dict[int, int], fewest: int) -> list[int]:
    """Places of the ranks to start again; none when that would not help.

    All of them, but for those whose accelerator is unfit, or that died before the run took a step: then as many of the others
    as the mesh and the batch allow.
    """
    if PERMANENT in bad.values():
        return []
    begun = next((event.step for event in run.events if event.type == "attempt_started" and event.attempt == attempt), None)
    heartbeat = launcher.Heartbeat.read(run.path)
    stepped = begun is not None and heartbeat is not None and heartbeat.attempt == attempt and heartbeat.step > begun
    unfit = {rank for rank, code in bad.items() if code == UNFIT}
    if not unfit and (stepped or fewest == len(places)):
        return places
    lost = unfit or {rank for rank, code in bad.items() if code < 0}
    left = [place for rank, place in enumerate(places) if rank not in lost]
    while len(left) >= fewest and not _fits(run, len(left)):
        left.pop()
    return left if len(left) >= fewest else []


def _is_over(run: Run, attempt: int) -> bool:
    """Whether all is done and saved, however ranks parted after that."""
    return any(event.attempt == attempt and event.type in ("finished", "stopped") for event in run.events)


def _fits(run: Run, ranks: int) -> bool:
    config = run.config
    try:
        config.mesh.arranged(ranks)
    except ConfigError:
        return False
    return config.data.batch_size % (ranks * config.accumulate) == 0


def in_words(run: Run, attempt: int, ranks: Ranks, bad: dict[int, int], memory_kills: int) -> str:
    """Which ranks died, and why; what a rank said of it itself, unless one was killed."""
    killed = {rank: code for rank, code in bad.items() if code < 0}
    said = run.failures(attempt)
    if said and not killed:
        return said[0].message
    done = max((event.step for event in run.events if event.attempt == attempt), default=None)
    step = " before training began" if done is None else f" after step {done}"
    whom = [f"Rank {rank} (process {ranks.children[rank].pid}) {_end_of(code)}{step}" for rank, code in (killed or bad).items()]
    words = f"{'; '.join(whom)}. "
    if -signal.SIGKILL in killed.values():
        if memory_kills > 0:
            return words + "The system's out-of-memory killer did it: take fewer loader processes (data.workers), or more memory."
        return words + "Somebody's kill -9, a scheduler, or a want of memory does that."
    return words + f"It printed:\n{launcher.tail(run.path, attempt, lines=10)}"


def _end_of(code: int) -> str:
    if code > 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def out_of_memory_kills(root: Path = Path("/")) -> int | None:
    """Processes that the out-of-memory killer ended so far in this control group, else on this machine; None if untold."""
    group = _memory_group(root)
    for file in (group / "memory.events", group / "memory.oom_control", root / "proc/vmstat"):
        with contextlib.suppress(OSError, ValueError):
            counts = dict(line.split()[:2] for line in file.read_text().splitlines())
            if "oom_kill" in counts:
                return int(counts["oom_kill"])
    return None


def _memory_group(root: Path) -> Path:
    """Folder of the control group that counts this process's memory, of version 2 or 1."""
    groups = root / "sys/fs/cgroup"
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "memory":
                return groups / "memory" / path.lstrip("/")
            if not controllers and (groups / path.lstrip("/") / "memory.events").exists():
                return groups / path.lstrip("/")
    return groups


def _rise(before: int | None, after: int | None) -> int:
    return after - before if before is not None and after is not None else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Start and watch the ranks of a workbench run.")
    parser.add_argument("run", type=Path)
    for name in ("attempt", "nproc", "restarts", "min-nproc"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = parser.parse_args()

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)  # the ranks end on the way out

    signal.signal(signal.SIGTERM, leave)
    try:
        return supervise(arguments.run, arguments.attempt, arguments.nproc, arguments.restarts, arguments.min_nproc)
    except WorkbenchError as error:
        print(error, file=sys.stderr)
        if (latest := launcher.Attempt.latest(arguments.run)) is not None:
            launcher.release(arguments.run, latest.number, str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
