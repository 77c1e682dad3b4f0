"""Following a run: a thread that hands over what is new, at a tenth of the kernel's time unless a look takes over 0.2 s."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence

from workbench import events, launcher
from workbench.run import TERMINAL, Run

PERIOD = 0.25
"""Least seconds between two looks."""
LONGEST = 2.0
"""Seconds to wait after a look that took long, as the first at a long run does."""
GLANCE = 0.02
"""Seconds between two glances at whether the run's files have grown; more where a glance takes long."""
PATIENCE = 1.0
"""Seconds after which to look though nothing has grown: a process may have ended without a word, or a file system be late."""


class Follower:
    """Watches a run until it has finished or :meth:`close` is called; one that is resumed is followed on.

    Args:
        run: the run.
        on_events: called with (events, anew): the events since the last call; ``anew`` when what was handed over before no
            longer counts, as after a restart from a checkpoint.
        on_look: called after each look, with the run's status.
        period: least seconds between two looks.
    """

    def __init__(
        self,
        run: Run,
        on_events: Callable[[Sequence[events.Event], bool], None],
        on_look: Callable[[str], None],
        period: float = PERIOD,
    ) -> None:
        self.run, self._period = run, period
        self._on_events, self._on_look = on_events, on_look
        self._seen: list[events.Event] = []
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=f"follow-{run.id}", daemon=True)

    def start(self) -> Follower:
        self._thread.start()
        return self

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        """Stop watching; the thread ends within one look."""
        self._closed.set()

    def join(self) -> None:
        """Wait until nothing is handed over any more. The caller holds no lock that the callbacks take."""
        if self._thread is not threading.current_thread():
            self._thread.join(5)

    def _watch(self) -> None:
        while not self._closed.is_set():
            started, sizes = time.thread_time(), self._sizes()
            attempt = launcher.Attempt.latest(self.run.path)
            status = self.run.status  # before the events: a run that ended in between is looked at once more
            self._look()
            if self._closed.is_set():
                return
            self._on_look(status)
            if status == "finished":
                return
            if status in TERMINAL:
                self._wait_for_a_restart(attempt)
                continue
            self._closed.wait(max(self._period, min(LONGEST, 10 * (time.thread_time() - started))))
            self._wait_for_more(sizes)

    def _wait_for_more(self, sizes: dict[str, int]) -> None:
        latest = time.monotonic() + PATIENCE
        while time.monotonic() < latest:
            began = time.monotonic()
            if self._sizes() != sizes or self._closed.wait(max(GLANCE, 20 * (time.monotonic() - began))):
                return

    def _sizes(self) -> dict[str, int]:
        """Bytes of the files that grow while a run trains."""
        found: dict[str, int] = {}
        for name in ("events", "readings", "attempts"):
            with contextlib.suppress(FileNotFoundError), os.scandir(self.run.path / name) as entries:
                found |= {entry.path: entry.stat().st_size for entry in entries}
        return found

    def _wait_for_a_restart(self, attempt: launcher.Attempt | None) -> None:
        """A run that stopped, failed or was lost may be resumed, here or elsewhere: one look a second at its attempts."""
        while not self._closed.wait(1.0) and launcher.Attempt.latest(self.run.path) == attempt:
            pass

    def _look(self) -> None:
        current = self.run.events
        count = len(self._seen)
        # The journal keeps its event objects, so identity tells whether what was seen still counts.
        continues = count <= len(current) and (count == 0 or current[count - 1] is self._seen[-1])
        fresh = current[count:] if continues else current
        if fresh or not continues:
            self._on_events(fresh, not continues)
        self._seen = current
