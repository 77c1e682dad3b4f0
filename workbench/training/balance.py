"""Shares of a batch that follow the speed of the ranks.

:func:`first_shares` says how a run begins; :class:`Balance` changes it while training. What a rank computes is weighted by its
share (:meth:`workbench.data.order.SharedOrder.parts`), so that the gradient is that of the whole batch throughout.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from workbench import events
from workbench.data.batches import Batches
from workbench.distributed import World
from workbench.errors import ConfigError
from workbench.probes.base import StepTiming
from workbench.training.balance_config import BalanceConfig
from workbench.training.config import TrainConfig
from workbench.training.decisions import Decisions

SETTING = "balance.sizes"
LAG = 2
"""Steps from a rank's saying how fast it is to its hearing of the others."""
SETTLING = 2
"""Steps after a change that are not measured: allocators and autotuners meet new shapes."""


def apportion(total: int, speeds: Sequence[float], grain: int = 1) -> tuple[int, ...]:
    """``total`` samples as multiples of ``grain``, at least one of them each, so that the slowest is done as early as possible.

    Args:
        speeds: of each, in any unit.

    Raises:
        ConfigError: ``total`` is no multiple of ``grain``, or too small.
    """
    units = total // grain
    if total % grain or units < len(speeds):
        least = grain * max(len(speeds), math.ceil(total / grain))
        raise ConfigError(
            f"data.batch_size={total} cannot be shared out to {len(speeds)} rank(s) in multiples of accumulate={grain}.",
            f"Take a multiple of {grain}, e.g. {least}.",
        )
    shares = [1] * len(speeds)
    for _ in range(units - len(speeds)):  # each next one goes to where it is done first
        shares[min(range(len(speeds)), key=lambda rank: (shares[rank] + 1) / speeds[rank])] += 1
    return tuple(share * grain for share in shares)


def first_shares(
    config: TrainConfig, arranged: Mapping[str, int], world: World, compile_mode: str, decided: Decisions
) -> tuple[int, ...]:
    """Samples of each rank at the start: as decided before, where the number of ranks is the same; ``()`` for equal shares.

    Args:
        arranged: ranks along each dimension of the mesh.
        compile_mode: of torch.compile, or ``off``.

    Raises:
        ConfigError: shares that the mesh, the batch or the kind of step does not allow.
    """
    wanted, size = config.balance.shares, config.data.batch_size
    if wanted == "even":
        return ()
    if spread := [name for name, ranks in arranged.items() if ranks > 1 and name != "replicate"]:
        raise ConfigError(
            f"balance.shares={wanted!r} is for copies of a model, and mesh.{spread[0]}={arranged[spread[0]]} splits one.",
            "Take balance.shares=even, or mesh.replicate alone.",
        )
    if wanted != "speed":
        if len(wanted) != world.size:
            raise ConfigError(
                f"balance.shares={list(wanted)} names {len(wanted)} rank(s), and there are {world.size}.",
                "Give a number for each, or take even or speed.",
            )
        return apportion(size, wanted, config.accumulate)
    if compile_mode in ("reduce-overhead", "max-autotune"):
        raise ConfigError(
            f"compile={compile_mode!r} captures graphs of one shape, and balance.shares='speed' changes it.",
            "Take compile=default or off, or fixed shares, e.g. balance.shares=[2, 1].",
        )
    if config.deterministic:
        raise ConfigError(
            "deterministic=true repeats a run bit for bit, and balance.shares='speed' goes by what it measures.",
            "Take fixed shares, e.g. balance.shares=[2, 1], or deterministic=false.",
        )
    known = tuple(decided.made.get(SETTING, {}).get("value", ()))
    if len(known) == world.size and sum(known) == size and all(share % config.accumulate == 0 for share in known):
        return known
    return apportion(size, [1.0] * world.size, config.accumulate)


class Balance:
    """Moves samples from slow ranks to fast ones.

    Each rank times its own work, without its waits for others. Every so many steps ranks tell one another the median, over a
    group of its own and without waiting; two steps later all know, and reckon the same shares: in proportion to samples per
    second. They change if the step is to become shorter by some per cent, at a step whose samples nobody has chosen yet. What a
    step costs beside its samples makes the first guess wrong and later ones less so: in the end all ranks take equally long.

    Args:
        world: of copies; alone there is nothing to balance.
        changed: called with (sizes, finding in words) when shares change, on every rank alike.
    """

    def __init__(
        self, config: BalanceConfig, batches: Batches, world: World, changed: Callable[[tuple[int, ...], events.Finding], None]
    ) -> None:
        self.config, self.batches, self.world, self._changed = config, batches, world, changed
        self.watching = config.shares == "speed" and world.size > 1
        """Whether steps are to be timed."""
        self._group: Any = dist.new_group(backend="gloo") if self.watching else None
        self._timings: list[StepTiming] = []
        self._said: tuple[int, torch.Tensor, Any] | None = None
        self._since = 0  # the step from which the present shares hold

    def take(self, step: int, timing: StepTiming | None) -> None:
        """Take in the timing of optimizer step ``step``, counted from 0."""
        if self.watching and timing is not None and step >= self._since + SETTLING:
            self._timings.append(timing)

    def after(self, step: int) -> None:
        """Between two steps, ``step`` of which are done; every rank calls it."""
        if not self.watching:
            return
        if self._said is not None and step >= self._said[0] + LAG:
            self._hear(step)
        if step % self.config.every == 0 and self._said is None:
            self._say(step)

    def drain(self) -> None:
        """Before ranks stop stepping: hear what was said."""
        if self._said is not None:
            self._said[2].wait()
            self._said = None

    def _say(self, step: int) -> None:
        measured = [timing.busy for timing in self._timings if timing.arrived()]
        self._timings.clear()
        busy = torch.zeros(self.world.size, dtype=torch.float64)
        busy[self.world.rank] = statistics.median(measured) if measured else math.nan
        self._said = (step, busy, dist.all_reduce(busy, group=self._group, async_op=True))

    def _hear(self, step: int) -> None:
        assert self._said is not None
        _, heard, work = self._said
        work.wait()
        self._said = None
        busy, sizes = heard.tolist(), self.batches.sizes(step)
        if not all(seconds > 0 for seconds in busy):  # not a number where a rank has measured nothing yet
            return
        speeds = [size / seconds for size, seconds in zip(sizes, busy, strict=True)]
        shares = apportion(sum(sizes), speeds, self.batches.shard.micro)
        expected = max(size / speed for size, speed in zip(shares, speeds, strict=True))
        if expected > (1 - self.config.gain) * max(busy):
            return
        self._since = step + self.batches.ahead
        self._timings.clear()
        self.batches.share_out(shares, self._since)
        per_sample = [1000 / speed for speed in speeds]
        fast, slow = per_sample.index(min(per_sample)), per_sample.index(max(per_sample))
        message = (
            f"Rank {slow} takes {per_sample[slow]:.3g} ms a sample and rank {fast} {per_sample[fast]:.3g} ms: from step "
            f"{self._since + 1} on, the batch is shared out as {' : '.join(map(str, shares))} instead of "
            f"{' : '.join(map(str, sizes))}, to end in {1000 * expected:.3g} ms instead of {1000 * max(busy):.3g} ms."
        )
        self._changed(shares, events.Finding(name="shares", severity="info", step=step, message=message))
