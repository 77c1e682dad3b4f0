"""Commands to a running trainer: what there is, and posting one into the run folder."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from pathlib import Path

from workbench import storage
from workbench.errors import RunError

COMMANDS = ("stop", "pause", "resume", "save", "set", "snapshot")
LIVE: Mapping[str, str] = {
    "optim.lr": "peak",
    "optim.weight_decay": "weight_decay",
    "clip.mode": "clip_mode",
    "clip.max_norm": "clip_max_norm",
}
"""Settings of a config that :meth:`workbench.run.Run.set` changes while a run trains, and what they are called there."""
CLIP_MODES = ("off", "fixed", "dynamic", "agc")


def post(folder: Path, name: str, settings: Mapping[str, float | str]) -> str:
    """Leave a command in a run folder, whose trainer applies those it finds in the order of their ids; returns the id."""
    identifier = f"{time.time_ns():020d}-{secrets.token_hex(3)}"
    content = json.dumps({"id": identifier, "name": name, "settings": dict(settings)})
    storage.write_atomic(folder / "commands" / f"{identifier}.json", content)
    return identifier


def check(name: str, settings: Mapping[str, float | str]) -> None:
    """Refuse what no trainer obeys.

    Raises:
        RunError: there is no such command or setting, or a value is out of range.
    """
    match name:
        case "set":
            _check_set(settings)
        case "snapshot":
            if not 1 <= (steps := settings.get("steps", 1)) <= 50:  # type: ignore[operator]
                raise RunError(f"steps={steps} must lie between 1 and 50.", "Two show what stays from one step to the next.")
        case _ if name not in COMMANDS:
            raise RunError(f"There is no command {name!r}.", f"Commands: {', '.join(COMMANDS)}.")
        case _ if settings:
            raise RunError(f"The command {name!r} takes no settings, and {', '.join(settings)} was given.")


def _check_set(settings: Mapping[str, float | str]) -> None:
    allowed = ("lr", "weight_decay", "peak", "clip_mode", "clip_max_norm")
    for name, value in settings.items():
        if name not in allowed:
            raise RunError(f"{name!r} cannot be changed while training.", f"What can: {', '.join(allowed)}.")
        if name == "clip_mode":
            if value not in CLIP_MODES:
                raise RunError(f"clip_mode={value!r} must be one of {', '.join(CLIP_MODES)}.")
        elif isinstance(value, str) or not value >= 0 or value == float("inf"):
            raise RunError(f"{name}={value} must be a finite number of at least 0.")
        elif name == "clip_max_norm" and not value:
            raise RunError("clip_max_norm=0 must be above 0.", "clip_mode='off' ends clipping.")
