"""How far chance reaches: intervals and tests for shares of samples, alone and in pairs.

* :func:`wilson` — a share.
* :func:`paired_difference` — the change of a share on the same samples; :func:`sign_test` — whether there is one at all.
* :func:`holm` — the same for many questions at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Z = 1.959964
"""Standard normal quantile of a two-sided 95 % interval."""


def wilson(successes: int, trials: int, z: float = Z) -> tuple[float, float]:
    """Wilson's score interval of a proportion, by default 95 % (Wilson 1927)."""
    center = (successes + z * z / 2) / (trials + z * z)
    half = z / (trials + z * z) * math.sqrt(successes * (trials - successes) / trials + z * z / 4)
    return max(0.0, center - half), min(1.0, center + half)


def paired_difference(won: int, lost: int, trials: int, z: float = Z) -> tuple[float, float]:
    """Tango's score interval of the difference of two proportions on the same samples, by default 95 %.

    The difference itself is ``(won - lost) / trials``. Every difference is in the interval that a score test doesn't reject, with
    the share of disagreements at its most likely value under that difference; it needs no continuity correction, and holds where
    nothing, or everything, was lost.

    Args:
        won: samples that only the second has right.
        lost: samples that only the first has right.
        trials: all samples.

    Source: Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample design",
    Statistics in Medicine 17 (1998), equations 10 and 12.
    """
    observed = won - lost

    def score(difference: float) -> float:
        linear = (2 * trials - observed) * difference - won - lost
        lost_share = (math.sqrt(max(linear * linear + 8 * trials * lost * difference * (1 - difference), 0.0)) - linear) / (
            4 * trials
        )
        variance = trials * (2 * lost_share + difference * (1 - difference))
        excess = observed - trials * difference
        return excess / math.sqrt(variance) if variance > 1e-15 else math.copysign(math.inf, excess) if excess else 0.0

    estimate = observed / trials
    return _root(lambda d: score(d) - z, -1.0, estimate), _root(lambda d: score(d) + z, estimate, 1.0)


def sign_test(lost: int, won: int) -> float:
    """Two-sided exact probability of a split at least as uneven by chance (McNemar 1947)."""
    total = lost + won
    tail: float = sum(math.comb(total, k) for k in range(min(lost, won) + 1)) / 2**total
    return min(1.0, 2 * tail)


def holm(values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which of several p-values stand, so that with ``level`` probability at most any of them is by chance (Holm 1979)."""
    standing = [False] * len(values)
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        if values[index] > level / (len(values) - rank):
            break
        standing[index] = True
    return standing


def _root(falling: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function crosses zero, by bisection; the end of the range where it doesn't."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return (low + high) / 2
