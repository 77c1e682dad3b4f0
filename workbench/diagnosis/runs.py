"""From a run's tables to its findings: every rule over what there is, and what the run itself reported."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from workbench.commands import LIVE
from workbench.config import Config
from workbench.diagnosis import activations, gradients, losses, memory, times, updates
from workbench.diagnosis.base import RULES, SEVERITIES, Tables
from workbench.events import CommandApplied, Finding, Steps
from workbench.run import Run

if TYPE_CHECKING:
    import pandas as pd

SUBJECTS = (losses, gradients, updates, activations, memory, times)
"""Modules of rules: importing one registers what it holds."""
KINDS = ("gradients", "activations", "communication", "memory")
"""Readings that rules look at."""


def diagnose(
    history: pd.DataFrame | None = None,
    gradients: pd.DataFrame | None = None,
    activations: pd.DataFrame | None = None,
    communication: pd.DataFrame | None = None,
    memory: pd.DataFrame | None = None,
    config: Config | None = None,
) -> list[Finding]:
    """What is wrong with a run, worst first; empty when nothing is.

    Args:
        history: ``run.history``.
        gradients, activations, communication, memory: ``run.readings("gradients")`` and so on.
        config: :func:`config_now` of the run; with it, remedies fit what is set.

    Example:
        >>> for finding in diagnose(run.history, run.readings("gradients"), run.readings("activations")):
        ...     print(finding.severity, finding.message, finding.remedy)
    """
    import pandas as pd

    given = (history, gradients, activations, communication, memory)
    history, gradients, activations, communication, memory = (pd.DataFrame() if t is None else t for t in given)
    tables = Tables(history, gradients, activations, communication, memory, config)
    return _worst_first(found for check in RULES.values() for found in check(tables))


def findings_of(run: Run) -> list[Finding]:
    """What a run reported and what its readings show now, worst first; at any time, from any process."""
    tables: dict[str, Any] = {kind: run.readings(kind) for kind in KINDS}
    return gathered(run, diagnose(run.history, **tables, config=config_now(run)))


def gathered(run: Run, now: Sequence[Finding]) -> list[Finding]:
    """``now`` and what the run itself reported, one of a name, worst first."""
    names = {finding.name for finding in now}
    reported = {finding.name: finding for finding in run.findings if finding.name not in names}
    return _worst_first([*now, *reported.values()])


def config_now(run: Run) -> Config:
    """The run's config with what was changed while it ran, so that advice starts from there."""
    config: Config = run.config
    said = run.events
    rates: dict[int, float] = {}
    for event in said:
        if isinstance(event, Steps):
            rates |= dict(enumerate(event.lr, event.first))
    for event in said:
        if isinstance(event, CommandApplied) and event.name == "set":
            changes = {setting: event.settings[name] for setting, name in LIVE.items() if name in event.settings}
            if "lr" in event.settings and "peak" not in event.settings and rates.get(event.step):
                # The schedule goes on in proportion to the step's rate, and so does its peak.
                changes["optim.lr"] = config.flat()["optim.lr"] * float(event.settings["lr"]) / rates[event.step]
            config = config.override(changes)
    return config


def _worst_first(findings: Iterable[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))
