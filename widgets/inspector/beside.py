"""Two runs side by side: which ones there are to choose from, and in which settings they differ.

* :func:`neighbours` — names of the other runs of the folder; :func:`differences` — settings whose values differ.
"""

from __future__ import annotations

from typing import Any

from workbench.run import Run

MOST = 100
"""Runs that a page offers: the newest."""


def neighbours(run: Run) -> list[str]:
    """Names of the other runs in the folder of ``run``, newest first."""
    return [other.id for other in Run.all(run.path.parent) if other.path != run.path][:MOST]


def differences(run: Run, other: Run) -> list[tuple[str, str, str]]:
    """(dotted setting, value in ``run``, value in ``other``) of the settings that differ, by name; an absent one is ``–``."""
    one, two = run.config.flat(), other.config.flat()
    names = sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
    return [(name, _text(one, name), _text(two, name)) for name in names]


def _text(values: dict[str, Any], name: str) -> str:
    return str(values[name]) if name in values else "–"
