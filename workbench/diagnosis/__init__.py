"""Readings → findings in words, each with remedies: dicts of config overrides, the best first.

:func:`diagnose` runs every rule of :data:`RULES` over a run's tables (those of :class:`workbench.run.Run`: ``history`` and its
readings); :func:`findings_of` does so for a run, and adds what the run itself reported. A rule is a pure function from
:class:`Tables` to findings, one a fault: it names the worst layer and counts the others. Thresholds look at the recent readings
only, so a fault that was cured is not reported.

Rules by subject: :mod:`losses`, :mod:`gradients`, :mod:`updates` (the learning rate), :mod:`activations`, :mod:`memory`,
:mod:`times`. One is added by decorating it with :func:`rule`. ``tests/bench/faults.py`` plants each fault on real data.
"""

from __future__ import annotations

from workbench.diagnosis.base import RULES, SEVERITIES, Rule, Tables, rule
from workbench.diagnosis.runs import KINDS, config_now, diagnose, findings_of, gathered

__all__ = ["KINDS", "RULES", "SEVERITIES", "Rule", "Tables", "config_now", "diagnose", "findings_of", "gathered", "rule"]
