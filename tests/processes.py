"""The processes a launched run has."""

from __future__ import annotations

import psutil

from workbench import Run, launcher


def ranks(run: Run) -> dict[int, psutil.Process]:
    """Processes of the ranks of the latest attempt that have begun their program: until then a child of the
    supervisor has the supervisor's environment, which names no rank.
    """
    attempt = launcher.Attempt.latest(run.path)
    assert attempt is not None and attempt.supervised
    children = [(child, child.environ()) for child in psutil.Process(attempt.process.pid).children()]
    return {int(environment["RANK"]): child for child, environment in children if "RANK" in environment}
