"""What readings cost, as measured while training, and how often probes on ``auto`` read so that they keep to their share of time.

A *reading* is a step on which just the probes in question read: those on auto, or where there are none, all. :class:`Budget`
notes the moments at which it and the steps after it begin, on the device's own clock. What is known of its cost goes to all ranks
as a command (:data:`READ`), which they apply after the same step (:mod:`~workbench.training.control`).
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Collection

import torch

from workbench import events
from workbench.probes import ProbeSet
from workbench.probes.base import Moment, seconds_between
from workbench.training.decisions import MOST, within_epochs

READ = "read"
"""Command of rank 0 to all: how often to read from now on, and why. It is no user's, and is not repeated with a run."""
LEAST = 20
"""Readings over a run without which it tells too little, however much they take."""
WARM = 3
"""First readings that don't count: of compilation, autotuning, an allocator that grows, layers looked at only once."""
UNREAD = 2
"""Unread steps timed after a reading. The host tables it in the first, so that only the last is as if nothing had been read."""
COUNTED = 9
"""Costs whose median is the cost of a reading."""
FRESH = 5
"""New ones, after which the interval is reckoned again."""
SELDOM = 50
"""Readings from one that is timed to the next, once :data:`COUNTED` are and steps must be left unread for it."""
SLACK = 0.25
"""Change of the interval that is not worth making: what is measured varies."""


class Budget:
    """Times readings and chooses their interval. No host waits for a device, and no other step is timed.

    Args:
        probes: of this rank, their first intervals set.
        auto: names of those whose interval may change.
        overhead: share of the training time that their readings may take.
        total_steps, steps_per_epoch: of the run.
        now: the present moment of the device that computes (see :func:`clock`).
        post: called on rank 0 with settings for :meth:`apply`, which all ranks are to call after the same step; None on others.
        changed: called on every rank with what was found, by an event and in words.
        light: of ``auto``, those that cost next to nothing. They keep their intervals, and read whenever the others do.
    """

    def __init__(
        self,
        probes: ProbeSet,
        auto: Collection[str],
        overhead: float,
        total_steps: int,
        steps_per_epoch: int,
        now: Callable[[], Moment],
        post: Callable[..., None] | None,
        changed: Callable[[events.ReadingsTimed, str], None],
        light: Collection[str] = (),
    ) -> None:
        self.probes, self.overhead = probes, overhead
        all_auto = [name for name in probes.every if name in auto]
        self.auto = [name for name in all_auto if name not in light] or all_auto
        self._grain = math.lcm(*(probes.every[name] for name in all_auto if name not in self.auto))
        self._watched = all_auto or list(probes.every)
        self._bounds = max(1, total_steps // MOST), max(1, total_steps // LEAST)
        self._epoch = steps_per_epoch
        self._now, self._post, self._changed = now, post, changed
        self._moments: list[Moment] = []
        self._on_the_way: deque[list[Moment]] = deque()
        self._costs: deque[float] = deque(maxlen=COUNTED)
        self._fresh = self._readings = self._timed = self._last = 0
        self._leaves_out = False

    def begin(self, step: int) -> None:
        """Step ``step``, from 1, is about to run: arm the probes that read it, and note the moment if it counts.

        Every rank comes to the same: it goes by counts of steps, not by what is measured.
        """
        due = self.probes.due(step)
        if self._moments:
            self._moments.append(self._now())
        if len(self._moments) == UNREAD + 2:
            self._on_the_way.append(self._moments)
            self._moments = []
            self._timed, self._last = self._timed + 1, self._readings
        leave_out = bool(self._moments and due and self._leaves_out)
        if due and not leave_out:
            self._moments = []
            if due == self._watched:
                self._count()
        self.probes.begin(step, leave_out=leave_out)

    def _count(self) -> None:
        self._readings += 1
        if self._readings > WARM:
            self._moments = [self._now()]
        ours = bool(self.auto) and len(self._watched) == len(self.probes.every)
        self._leaves_out = ours and (self._timed < COUNTED or self._readings - self._last >= SELDOM)

    def interrupted(self) -> None:
        """Something that is no step comes next, or steps change: the reading that is being timed doesn't count."""
        self._moments = []

    def after(self) -> None:
        """Between two steps: take in the times that have come, and say so if they are enough to go by."""
        while self._on_the_way and _reached(self._on_the_way[0][-1]):
            moments = self._on_the_way.popleft()
            usual = seconds_between(*moments[-2:])
            if usual <= 0:  # less than the clock can tell
                continue
            self._costs.append(seconds_between(moments[0], moments[-2]) / usual - UNREAD)
            self._fresh += 1
        if self._fresh >= FRESH and self._post is not None:
            self._fresh = 0
            cost = max(0.0, statistics.median(self._costs))
            every = self._wanted(cost)
            if every is not None:
                self._post(READ, every=every, cost=cost, counted=len(self._costs))

    def _wanted(self, cost: float) -> int | None:
        """Steps from reading to reading; None where probes with fixed intervals have several."""
        held = {self.probes.every[name] for name in self.auto or self._watched}
        now = max(held)
        if not self.auto:
            return now if len(held) == 1 else None
        low, high = self._bounds
        wanted = max(low, min(math.ceil(cost / self.overhead), max(high, now)))
        if len(held) == 1 and abs(wanted - now) <= SLACK * now:
            return now
        return within_epochs(self._grain * math.ceil(wanted / self._grain), self._epoch, self._grain)

    def apply(self, step: int, every: int, cost: float, counted: int) -> None:
        """Read once in ``every`` steps from here on; a reading adds ``cost`` of a step, the median of ``counted``."""
        self.probes.every |= dict.fromkeys(self.auto, every)
        share = cost / (every + cost)
        told = f"a reading adds {_percent(cost)} of a step (median of {counted}): one in {every}"
        if share <= self.overhead:
            reason = f"{told} keeps to {_percent(self.overhead)}"
        else:
            reason = f"{told} takes {_percent(share)} of the time"
            reason += f", and rarer would be fewer than {LEAST} over the run" if every >= self._bounds[1] else ""
        self._changed(events.ReadingsTimed(step=step, cost=cost, counted=counted, every=every, overhead=share), reason)


def clock(device: torch.device) -> Callable[[], Moment]:
    """What tells the present moment: an event on the stream that computes, the wall clock on a CPU."""
    return _event if device.type == "cuda" else time.perf_counter


def _event() -> Moment:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def _reached(moment: Moment) -> bool:
    return isinstance(moment, float) or moment.query()
