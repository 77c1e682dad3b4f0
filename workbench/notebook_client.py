"""What executes a stage's notebook: papermill's client, made to notice a kernel that is gone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from papermill.clientwrap import PapermillNotebookClient


class Client(PapermillNotebookClient):  # type: ignore[misc]
    """Executes a notebook in a kernel with an environment of its own.

    Args:
        nb_man: papermill's manager of the notebook.
        kernel_name: which kernel.
        environment: of the kernel.
        log: takes what the kernel's process prints.
        started: called with the kernel's process id.
        timeout: seconds a cell may take; None for ever.
    """

    def __init__(
        self,
        nb_man: Any,
        kernel_name: str,
        environment: Mapping[str, str],
        log: BinaryIO,
        started: Callable[[int], None],
        timeout: float | None,
    ) -> None:
        # A busy machine may keep a finished cell's last message waiting for long: 4 s, the default, fails sound notebooks.
        super().__init__(nb_man, kernel_name=kernel_name, timeout=timeout, startup_timeout=300, iopub_timeout=60)
        self._environment, self._kernel_log, self._started = dict(environment), log, started

    def start_new_kernel(self, **kwargs: Any) -> Any:
        manager = super().start_new_kernel(env=self._environment, stdout=self._kernel_log, stderr=self._kernel_log, **kwargs)
        self._started(self.km.provisioner.pid)
        return manager

    def execute(self, **kwargs: Any) -> Any:
        """Run every cell. papermill asks the kernel for its language afterwards, without a time limit; we don't."""
        self.reset_execution_trackers()
        with self.setup_kernel(**kwargs):
            self.papermill_execute_cells()
            self.set_widgets_metadata()
        return self.nb
