"""What a trainer writes into its run folder: events, readings, signs of life."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from workbench import events, launcher, storage
from workbench.errors import WorkbenchError

TOGETHER = 0.01
"""Seconds within which the readings of one step come."""
GATHER = 0.1
"""Least seconds between two writings of readings."""
BEAT = 1.0
"""Seconds between two signs of life."""
_RESERVE = 1 << 16


def say_failed(folder: Path, attempt: int, rank: int, event: events.Failed) -> None:
    """Note why an attempt failed before there was a recorder for it."""
    journal = storage.Journal(folder / "events" / f"rank-{rank:05d}.jsonl")
    try:
        journal.append(event.model_copy(update={"attempt": attempt}).model_dump_json(), durable=True)
    finally:
        journal.close()


class Recorder:
    """Writer of one rank for one attempt.

    Events are on disk when :meth:`emit` returns. Readings are written by a thread, ten times a second at most; it also keeps
    rank 0's heartbeat. A small reserve file leaves room to say why a run ended when the disk is full.
    """

    def __init__(self, folder: Path, attempt: int, rank: int) -> None:
        self.folder, self.attempt, self.rank = folder, attempt, rank
        self._journal = storage.Journal(folder / "events" / f"rank-{rank:05d}.jsonl")
        self._segments = storage.SegmentWriter(folder / "readings", attempt, rank)
        self._process = launcher.Process.current()
        self._step, self._step_time = 0, time.time()
        self._waiting: dict[str, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._error: Exception | None = None
        self._closing, self._due = threading.Event(), threading.Event()
        self._reserve = folder / "logs" / f".reserve-{rank}"
        storage.write_atomic(self._reserve, bytes(_RESERVE), durable=False)
        self._beat()
        self._thread = threading.Thread(target=self._keep, name=f"workbench-recorder-{rank}", daemon=True)
        self._thread.start()

    def emit(self, event: events.Event) -> None:
        """Append an event; on disk for good when it is of a durable kind.

        Raises:
            RunError: the disk is full.
        """
        stamped = event.model_copy(update={"attempt": self.attempt})
        try:
            self._journal.append(stamped.model_dump_json(), durable=stamped.durable)
        except WorkbenchError:
            self._reserve.unlink(missing_ok=True)
            raise

    def progressed(self, step: int) -> None:
        """``step`` optimizer steps have been issued."""
        self._step, self._step_time = step, time.time()
        if self._error is not None:
            raise self._error

    def reading(self, kind: str, step: int, columns: dict[str, Any]) -> None:
        """Take in a reading, to be written soon; one without rows says nothing, not even its columns' types."""
        if not len(next(iter(columns.values()))):
            return
        with self._lock:
            self._waiting[kind].append((step, columns))
        self._due.set()

    def flush(self, *, durable: bool = False) -> None:
        """Write the readings taken in so far; with ``durable``, they and the events survive a power cut too."""
        import pyarrow as pa

        with self._flushing:
            with self._lock:
                waiting, self._waiting = self._waiting, defaultdict(list)
            for kind, parts in waiting.items():
                tables = [pa.table(columns) for _, columns in parts]
                self._segments.write(kind, pa.concat_tables(tables), parts[0][0])
            if durable:
                self._segments.sync()
        if durable:
            self._journal.sync()

    def close(self) -> None:
        """Write what waits and end the thread."""
        self._closing.set()
        self._due.set()
        self._thread.join()
        with contextlib.suppress(WorkbenchError, OSError):
            self.flush()
            self._beat()
        self._segments.close()
        self._journal.close()
        self._reserve.unlink(missing_ok=True)

    def _beat(self) -> None:
        if self.rank == 0:
            launcher.Heartbeat(self._process, time.time(), self.attempt, self._step, self._step_time).write(self.folder)

    def _keep(self) -> None:
        """The thread: an error here is raised in the trainer at its next step."""
        beat = time.monotonic() + BEAT
        while True:
            self._due.wait(max(0.0, beat - time.monotonic()))
            if self._closing.is_set():
                return
            try:
                if self._due.is_set():
                    self._closing.wait(TOGETHER)
                    self._due.clear()
                    self.flush()
                if time.monotonic() >= beat:
                    beat = time.monotonic() + BEAT
                    self._beat()
            except Exception as error:
                self._reserve.unlink(missing_ok=True)
                self._error = error
                return
            self._closing.wait(GATHER)
