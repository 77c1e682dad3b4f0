"""``repro.py``: Python that repeats a run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from workbench import events
from workbench.storage import write_atomic
from workbench.training.config import TrainConfig
from workbench.training.sources import kept_name, named


def code(config: TrainConfig, said: Iterable[events.Event] = (), nproc: int = 1) -> str:
    """Python that repeats a run, the changes made while it ran included.

    Files that the run was given are taken from its folder, which holds them as they were.
    """
    changes: list[tuple[int, str, dict[str, float | str]]] = []
    for event in said:
        if isinstance(event, events.AttemptStarted):
            changes = [change for change in changes if change[1] != "stop"]  # it was resumed
        elif isinstance(event, events.CommandApplied) and event.name in ("set", "stop"):
            changes.append((event.step, event.name, dict(event.settings)))
    kept = {name: kept_name(name) for name in named(config) if kept_name(name) != name or name.startswith("source/")}
    settings = config.to_code()
    for name, place in kept.items():
        settings = settings.replace(repr(name), f'f"{{here}}/{place}"')
    lines, replay = [], f", replay={changes!r}" if changes else ""
    verb, more = ("train", "") if nproc == 1 else ("launch", f", nproc={nproc}")
    if kept:
        lines += ["from pathlib import Path", ""]
    lines += [f"from workbench import TrainConfig, {verb}", ""]
    if kept:
        lines += ["here = Path(__file__).resolve().parent"]
    lines += [f"config = {settings}", f"result = {verb}(config{more}{replay})"]
    return "\n".join(lines) + "\n"


def write_code(folder: Path, config: TrainConfig, said: Iterable[events.Event] = (), nproc: int = 1) -> None:
    write_atomic(folder / "repro.py", code(config, said, nproc))
