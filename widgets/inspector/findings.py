"""What a run reported and what its readings show now, looked for beside following it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from widgets.inspector.recording import Recording
from workbench import diagnosis, events
from workbench.run import Run

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

EVERY = 5.0
"""Least seconds between two looks."""


class Findings:
    """Findings of a run, one of a name, worst first.

    A look takes longer than it takes to follow a run from reading to reading: while the run is followed, :meth:`look_apart` looks
    from a thread, at most a tenth of the time.
    """

    def __init__(self) -> None:
        self.rows: list[events.Finding] = []
        self._next, self._looks = 0.0, 0

    def look(self, recording: Recording) -> None:
        """Look now. The caller holds the lock of ``recording``."""
        self._looks += 1
        self.rows = _found(recording.run, _kept(recording))

    def look_apart(
        self, recording: Recording, lock: threading.RLock, done: Callable[[], None], failed: Callable[[Exception], None]
    ) -> None:
        """Look from a thread, if it is time for it. The caller holds ``lock``, that of ``recording``.

        Args:
            done: called with the lock held when there are findings, unless there are newer ones.
            failed: called with the lock held instead of it.
        """
        if time.monotonic() < self._next:
            return
        self._next = float("inf")
        self._looks += 1
        look, kept = self._looks, _kept(recording)

        def go() -> None:
            began, error, rows = time.thread_time(), None, None
            try:
                rows = _found(recording.run, kept)
            except Exception as caught:
                error = caught
            with lock:
                self._next = time.monotonic() + max(EVERY, 10 * (time.thread_time() - began))
                if look != self._looks:
                    return
                if error is not None:
                    failed(error)
                    raise error
                self.rows = rows or []
                done()

        threading.Thread(target=go, name=f"findings-{recording.run.id}", daemon=True).start()


def _kept(recording: Recording) -> dict[str, list[tuple[int, pa.Table]]]:
    """(rank, table) of the first and the last readings, by the kinds that :mod:`workbench.diagnosis` takes."""
    return {
        kind: [(rank, table) for rank, (head, tail) in recording.tables[kind].items() for table in [*head, *tail]]
        for kind in diagnosis.KINDS
    }


def _found(run: Run, kept: Mapping[str, list[tuple[int, pa.Table]]]) -> list[events.Finding]:
    tables: dict[str, Any] = {kind: _frame(parts) for kind, parts in kept.items()}
    return diagnosis.gathered(run, diagnosis.diagnose(run.history, **tables, config=diagnosis.config_now(run)))


def _frame(parts: list[tuple[int, pa.Table]]) -> pd.DataFrame:
    import pandas as pd
    import pyarrow as pa

    if not parts:
        return pd.DataFrame()
    tables = [table.append_column("rank", pa.array([rank] * table.num_rows, pa.int64())) for rank, table in parts]
    return pa.concat_tables(tables, promote_options="permissive").to_pandas().sort_values("step", kind="stable")
