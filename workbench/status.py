"""How a run stands: from what it said last, and whether its processes live."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from workbench import launcher
from workbench.journal import JournalReader

STALE_HEARTBEAT = 20.0
"""Seconds without a heartbeat after which a run on another host counts as lost."""


def status_of(folder: Path, journal: JournalReader) -> str:
    """A run's status, as :attr:`workbench.run.Run.status` describes it."""
    attempt = launcher.Attempt.latest(folder)
    if attempt is None:
        return "created"
    turns, said = journal.turns(attempt.number)
    heartbeat = launcher.Heartbeat.read(folder)
    if heartbeat is not None and heartbeat.attempt != attempt.number:
        heartbeat = None
    for event in reversed(turns):
        if event.type in ("finished", "stopped"):
            return event.type
        if event.type == "failed":
            return "starting" if attempt.deciding() else "failed"
        if event.type in ("attempt_started", "paused", "resumed"):
            break
    if attempt.ended:
        return "starting" if attempt.deciding() else "failed"  # it could not even say so: a full disk
    process = heartbeat.process if heartbeat else attempt.process
    alive = process.alive()
    if alive is None:
        alive = heartbeat is not None and time.time() - heartbeat.time < STALE_HEARTBEAT
    if not said:
        return "starting" if alive or attempt.process.alive() else "failed"
    if not alive:
        if attempt.deciding():
            return "starting"
        return "failed" if journal.failures(attempt.number) else "lost"
    if next((e.type for e in reversed(turns) if e.type in ("paused", "resumed")), "") == "paused":
        return "paused"
    return "hung" if heartbeat and _overdue(heartbeat, journal) else "running"


def _overdue(heartbeat: launcher.Heartbeat, journal: JournalReader) -> bool:
    """Whether no step has ended for far longer than steps take."""
    windows = journal.latest_steps(20)
    pace = [(b.time - a.time) / len(b.loss) for a, b in zip(windows, windows[1:], strict=False) if b.loss]
    return bool(pace) and time.time() - heartbeat.step_time > max(120.0, 50 * statistics.median(pace))
