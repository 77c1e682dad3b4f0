"""An action's code in a fresh process: it outlives the kernel that asked for it, and tells its folder how it went.

* :class:`Job` — starts the code, or finds what became of it: ``action.py`` the code, ``action.json`` the process, ``action.log``
  what it printed, ``result.json`` how it ended.
* ``python -m widgets.job FOLDER`` — the process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from widgets import theme
from workbench.errors import WorkbenchError
from workbench.launcher import Process, terminate
from workbench.storage import write_atomic

CODE, STARTED, LOG, RESULT = "action.py", "action.json", "action.log", "result.json"


class Job:
    """The code of an action, in the folder where its result lies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def start(cls, folder: Path, code: str) -> Job:
        """Run ``code`` in a fresh process, detached from this one; returns at once."""
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / CODE, code)
        (folder / RESULT).unlink(missing_ok=True)
        here = [os.getcwd(), str(Path(__file__).resolve().parent.parent)]
        paths = os.pathsep.join([*here, *filter(None, [os.environ.get("PYTHONPATH")])])
        with (folder / LOG).open("wb") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "widgets.job", str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": paths},
                start_new_session=True,
            )
        write_atomic(folder / STARTED, json.dumps({"process": asdict(Process.of(child.pid)), "time": time.time()}))
        threading.Thread(target=child.wait, daemon=True).start()  # else it stays a zombie; not sooner, or it may be gone
        return cls(folder)

    @property
    def status(self) -> str:
        """``running``, ``finished``, ``failed``, or ``lost`` when its process is gone without a word."""
        result = self.result
        if result:
            return str(result["status"])
        process = self._process()
        if process is None or process.alive() is False:
            return str(self.result.get("status", "lost"))  # it may have ended between the two looks
        return "running"

    @property
    def result(self) -> dict[str, Any]:
        """``status``, and what the code made or why it failed; empty while it runs."""
        return _read(self.folder / RESULT)

    @property
    def code(self) -> str:
        return (self.folder / CODE).read_text(encoding="utf-8")

    @property
    def seconds(self) -> float:
        """Since it was started; until it ended."""
        started = float(_read(self.folder / STARTED).get("time", time.time()))
        return float(self.result.get("time", time.time())) - started

    def wait(self, timeout: float | None = None) -> dict[str, Any]:
        """Block until the code has ended; its result."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.status == "running" and (deadline is None or time.monotonic() < deadline):
            time.sleep(0.05)
        return self.result

    def cancel(self) -> None:
        """End the process."""
        process = self._process()
        if process is not None:
            terminate(process, grace=3)

    def problem(self) -> str:
        """What went wrong, as HTML; empty unless it failed or was lost."""
        status = self.status
        if status == "failed":
            result = self.result
            return theme.notice(result["what"], remedy=result["remedy"], details=result["details"])
        if status == "lost":
            return theme.notice(
                "The process ended without a word.", remedy="It may have run out of memory, or been ended.", details=self.tail()
            )
        return ""

    def tail(self, lines: int = 20) -> str:
        """The last lines it printed."""
        try:
            return "\n".join((self.folder / LOG).read_text(errors="replace").splitlines()[-lines:])
        except FileNotFoundError:
            return ""

    def _process(self) -> Process | None:
        values = _read(self.folder / STARTED)
        return Process(**values["process"]) if values else None


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def execute(code: str, name: str = "<the panel's code>", given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run an action's code in a namespace of its own, with the names ``given``; all names there are then."""
    names: dict[str, Any] = {"__name__": "workbench_action", **(given or {})}
    exec(compile(code, name, "exec"), names)  # the very text the panel shows
    return names


def main(folder: Path) -> int:
    """Run the folder's code and write down how it went."""
    result: dict[str, Any]
    try:
        names = execute((folder / CODE).read_text(encoding="utf-8"), str(folder / CODE))
        result = {"status": "finished", **_made(names)}
    except BaseException as error:
        ours = isinstance(error, WorkbenchError)
        what = error.what if isinstance(error, WorkbenchError) else f"{type(error).__name__}: {error}"
        remedy = error.remedy if isinstance(error, WorkbenchError) else "This is unexpected; the details say where it happened."
        details = "" if ours and not error.__cause__ else traceback.format_exc()
        result = {"status": "failed", "what": what, "remedy": remedy, "details": details}
    write_atomic(folder / RESULT, json.dumps({**result, "time": time.time()}, default=str))
    return 0 if result["status"] == "finished" else 1


def _made(names: dict[str, Any]) -> dict[str, Any]:
    """What the code left behind that a panel shows: a run by its path, a comparison by its rows."""
    made: dict[str, Any] = {}
    if hasattr(names.get("run"), "path"):
        made["run"] = str(names["run"].path)
    comparison = names.get("comparison")
    if comparison is not None:
        made["rows"] = json.loads(comparison.frame().to_json(orient="records"))
        made["warnings"] = list(comparison.warnings)
        made["comparison"] = comparison.to_json()
    return made


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
