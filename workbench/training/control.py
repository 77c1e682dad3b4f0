"""Commands from the run folder, applied by every rank after the same step.

Rank 0 looks into the folder from a thread. Alone, it applies a command at the next step's end. With peers, each step rank 0
sends how many commands are due over a gloo group of its own, without waiting; a rank reads that message two steps later. So
all ranks apply a command after the same step, no accelerator is waited for, and no rank runs more than two steps ahead of
what rank 0 has said.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from workbench import launcher
from workbench.distributed import World

LAG = 2


@dataclass(frozen=True)
class Command:
    """A request from outside, or one repeated from a record."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    id: str = ""


class Control:
    """Source of commands for a trainer.

    Args:
        folder: the run folder.
        world: this process among its peers.
        replay: commands to apply after given steps, on every rank alike.
    """

    def __init__(self, folder: Path, world: World, replay: list[tuple[int, Command]] | None = None) -> None:
        self._folder, self._world = folder / "commands", world
        self._replay = deque(sorted(replay or [], key=lambda pair: pair[0]))
        # Commands posted to an earlier attempt died with it; one posted while this one was starting counts.
        attempt = launcher.Attempt.latest(folder)
        self._since = f"{int(attempt.time * 1e9) if attempt else time.time_ns():020d}"
        self._found: deque[Command] = deque()
        self._group: Any = dist.new_group(backend="gloo") if world.size > 1 else None
        self._sent: deque[tuple[torch.Tensor, Any]] = deque()
        self._announced = 0
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        if world.main:
            self._thread = threading.Thread(target=self._watch, name="workbench-commands", daemon=True)
            self._thread.start()

    def post(self, name: str, **settings: Any) -> None:
        """Post a command from within rank 0's own process."""
        self._found.append(Command(name, settings))

    def skip_to(self, step: int) -> None:
        """Forget what is to be repeated up to ``step``: the checkpoint that training goes on from has it."""
        while self._replay and self._replay[0][0] <= step:
            self._replay.popleft()

    def due(self, step: int) -> list[Command]:
        """Commands to apply now, after ``step``; the same on every rank."""
        replayed = []
        while self._replay and self._replay[0][0] <= step:
            replayed.append(self._replay.popleft()[1])
        if self._group is None:
            return replayed + [self._found.popleft() for _ in range(len(self._found))]
        waiting = len(self._found) - self._announced if self._world.main else 0
        self._announced += waiting
        count = torch.tensor([waiting])
        self._sent.append((count, dist.broadcast(count, src=0, group=self._group, async_op=True)))
        if len(self._sent) <= LAG:
            return replayed
        return replayed + self._receive()

    def wait(self) -> list[Command]:
        """While paused: the next commands, after a fifth of a second at most."""
        time.sleep(0.2)
        return self.due(-1)

    def drain(self) -> None:
        """Before ranks stop stepping: take in the messages still on their way, which are the same on every rank."""
        while self._sent:
            self._receive()

    def _receive(self) -> list[Command]:
        count, work = self._sent.popleft()
        work.wait()
        number = int(count)
        if number == 0:
            return []
        box: list[Any] = [None]
        if self._world.main:
            box = [[self._found.popleft() for _ in range(number)]]
            self._announced -= number
        dist.broadcast_object_list(box, src=0, group=self._group)
        return list(box[0])

    def close(self) -> None:
        self._closing.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._closing.wait(0.1):
            for path in sorted(self._folder.glob("*.json")):
                if path.stem > self._since:
                    self._since = path.stem
                    content = json.loads(path.read_bytes())
                    self._found.append(Command(content["name"], content["settings"], content["id"]))
