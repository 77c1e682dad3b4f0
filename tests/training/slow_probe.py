"""A probe that takes far longer than a step of the small models."""

from __future__ import annotations

import time

from torch import Tensor

from workbench.probes import Probe, StepContext


class Slow(Probe):
    """Reads nothing, for 50 ms."""

    def read(self, context: StepContext) -> Tensor | None:
        time.sleep(0.05)
        return None
