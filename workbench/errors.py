"""Errors a person can act on: what happened, the offending value, what to do.

Every error the workbench raises on purpose is a :class:`WorkbenchError`. Panels, the command line and
run folders show the same text, so it must stand on its own.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class WorkbenchError(Exception):
    """Base of all errors raised on purpose.

    Args:
        what: what happened, with the offending value.
        remedy: what the reader can do about it, as a sentence; empty when ``what`` already says so.
    """

    def __init__(self, what: str, remedy: str = "") -> None:
        self.what = what
        self.remedy = remedy
        super().__init__(f"{what} {remedy}".strip())

    def __reduce__(self) -> tuple[type[WorkbenchError], tuple[str, str]]:
        return type(self), (self.what, self.remedy)


class ConfigError(WorkbenchError, ValueError):
    """A setting is unknown, out of range, or contradicts another."""


class DataError(WorkbenchError):
    """Data is missing, corrupt, or not of the shape its reader expects."""


class ModelError(WorkbenchError):
    """A model cannot be built, or its output does not fit the loss."""


class DeviceError(WorkbenchError):
    """The requested accelerator is absent or cannot do what was asked."""


class MemoryExhausted(DeviceError):
    """The accelerator ran out of memory; the remedy names settings that need less."""


class NonFiniteLoss(WorkbenchError):
    """The loss became NaN or infinite."""


class RunError(WorkbenchError):
    """A run folder is missing, unreadable, or in a state that forbids the request."""


class ArtefactError(WorkbenchError):
    """A saved model or export is missing, incomplete, or does not match its description."""


class MissingDependency(WorkbenchError):
    """An optional library is not installed; the remedy gives the command that installs it."""

    def __init__(self, package: str, feature: str, extra: str = "") -> None:
        self.package, self.feature, self.extra = package, feature, extra
        target = f"'workbench[{extra}]'" if extra else package
        super().__init__(f"{feature} needs the package {package!r}, which is not installed.", f"Install it: pip install {target}")

    def __reduce__(self) -> tuple[type[MissingDependency], tuple[str, str, str]]:  # type: ignore[override]
        return type(self), (self.package, self.feature, self.extra)


def nearest(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """The known names closest to ``name``, best first; empty when none is close."""
    by_folded = {k.casefold().replace("-", "_"): k for k in known}
    found = difflib.get_close_matches(name.casefold().replace("-", "_"), by_folded, n=limit, cutoff=0.6)
    return [by_folded[f] for f in found]


def unknown(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """A :class:`ConfigError` for an unknown name, with the nearest match or the full list."""
    known = sorted(known)
    close = nearest(name, known)
    if close:
        remedy = f"Did you mean {' or '.join(repr(c) for c in close)}?"
    elif len(known) <= 30:
        remedy = f"Known: {', '.join(known)}."
    else:
        remedy = f"There are {len(known)} known names, from {known[0]!r} to {known[-1]!r}."
    return ConfigError(f"There is no {kind} named {name!r}.", remedy)
