"""``repro.py``: Python that repeats a run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from workbench import events
from workbench.storage import write_atomic
from workbench.training.config import TrainConfig
from workbench.training.sources import kept_name

_SOURCES = ("model.name", "data.name", "loss.name", "optim.name", "distill.teacher")


def code(config: TrainConfig, said: Iterable[events.Event] = (), nproc: int = 1) -> str:
    """Python that repeats a run, the changes made while it ran included.

    Files that the run was given are taken from its folder, which holds them as they were.
    """
    changes: list[tuple[int, str, dict[str, float]]] = []
    for event in said:
        if isinstance(event, events.AttemptStarted):
            changes = [change for change in changes if change[1] != "stop"]  # it was resumed
        elif isinstance(event, events.CommandApplied) and event.name in ("set", "stop"):
            changes.append((event.step, event.name, dict(event.settings)))
    kept = {
        name: value
        for name, value in config.flat().items()
        if name in _SOURCES and (kept_name(value) != value or value.startswith("source/"))
    }
    lines, replay = [], f", replay={changes!r}" if changes else ""
    verb, more = ("train", "") if nproc == 1 else ("launch", f", nproc={nproc}")
    if kept:
        lines += ["from pathlib import Path", ""]
    lines += [f"from workbench import TrainConfig, {verb}", ""]
    if kept:
        lines += ["here = Path(__file__).resolve().parent"]
    lines += [f"config = {config.to_code()}"]
    lines += [f'config = config.override({{"{name}": f"{{here}}/{kept_name(value)}"}})' for name, value in kept.items()]
    lines += [f"result = {verb}(config{more}{replay})"]
    return "\n".join(lines) + "\n"


def write_code(folder: Path, config: TrainConfig, said: Iterable[events.Event] = (), nproc: int = 1) -> None:
    write_atomic(folder / "repro.py", code(config, said, nproc))
