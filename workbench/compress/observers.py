"""Activation ranges: what calibration saw of a value, the rules that choose a range from it, and the scale that follows.

* :class:`Seen` — extremes of each batch and a histogram of all of them.
* :func:`minmax`, :func:`moving_average`, :func:`percentile`, :func:`least_squares`, :func:`least_divergence` — the rules of
  :data:`~workbench.compress.quantization_config.OBSERVERS`, each from (seen, config) to (lowest, highest).
* :func:`scale_and_zero_point` of a range, :func:`weight_scale` of a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.compress.quantization_config import QuantConfig

BINS = 2048
"""Bins of a histogram: 8 to each of 256 levels."""

MOMENTUM = 0.1
"""Weight of the newest batch in a moving average over calibration batches, which are few."""

SMALLEST = 2.0**-24
"""Smallest scale: a value that is always zero still gets one."""

_SMOOTHED = 1e-4
_SHARES = torch.linspace(0.02, 1, 99, dtype=torch.float64)  # of the full range, tried by the rules that search


@dataclass(frozen=True)
class Seen:
    """What calibration saw of one value.

    Attributes:
        lows, highs: extremes of each batch [batches], float64.
        counts: of all values, in :data:`BINS` equal bins from the lowest to the highest, float64.
    """

    lows: Tensor
    highs: Tensor
    counts: Tensor

    @property
    def low(self) -> float:
        return float(self.lows.min())

    @property
    def high(self) -> float:
        return float(self.highs.max())

    @property
    def centres(self) -> Tensor:
        """Middle of each bin [BINS], float64."""
        edges = torch.linspace(self.low, self.high, len(self.counts) + 1, dtype=torch.float64)
        return (edges[:-1] + edges[1:]) / 2


def scale_and_zero_point(low: Tensor, high: Tensor, config: QuantConfig) -> tuple[Tensor, Tensor]:
    """Scale and zero point of unsigned activations of ``config.activation_bit`` bits; zero itself is always exact.

    Args:
        low, high: of the range, scalars or any equal shape.

    Source: Jacob et al. 2018, equations 1 and 13, for affine ranges.
    """
    levels = 2**config.activation_bit - 1
    low, high = low.clamp(max=0), high.clamp(min=0)
    if config.quant_scheme == "symmetric":
        signed = low < 0
        scale = torch.where(signed, torch.maximum(-low, high) * 2 / levels, high / levels).clamp(min=SMALLEST)
        return scale, torch.where(signed, (levels + 1) // 2, 0)
    scale = ((high - low) / levels).clamp(min=SMALLEST)
    return scale, torch.round(-low / scale).clamp(0, levels)


def quantized(x: Tensor, low: Tensor, high: Tensor, config: QuantConfig) -> Tensor:
    """``x`` rounded to the levels of a range, and clipped to it; ranges and values broadcast."""
    scale, zero = scale_and_zero_point(low, high, config)
    return (torch.clamp(torch.round(x / scale) + zero, 0, 2**config.activation_bit - 1) - zero) * scale


def weight_scale(weight: Tensor, per_channel: bool) -> Tensor:
    """Symmetric scale [channels] of a weight [channels, ...]: its largest magnitude is level 127, and none is clipped."""
    largest = weight.abs().flatten(1).amax(1)
    if not per_channel:
        largest = largest.amax().expand_as(largest)
    return (largest / 127).clamp(min=SMALLEST)


# -- rules ------------------------------------------------------------------------------------------------------------


def minmax(seen: Seen, config: QuantConfig) -> tuple[float, float]:
    """Lowest and highest value of all."""
    return seen.low, seen.high


def moving_average(seen: Seen, config: QuantConfig) -> tuple[float, float]:
    """Exponential moving averages of each batch's extremes."""
    low, high = seen.lows[0], seen.highs[0]
    for next_low, next_high in zip(seen.lows[1:], seen.highs[1:], strict=True):
        low, high = low + MOMENTUM * (next_low - low), high + MOMENTUM * (next_high - high)
    return float(low), float(high)


def percentile(seen: Seen, config: QuantConfig) -> tuple[float, float]:
    """Values below and above which lie 100 − ``config.percentile`` percent, to within a bin."""
    below = seen.counts.cumsum(0) / seen.counts.sum()
    width = (seen.high - seen.low) / len(seen.counts)
    share = config.percentile / 100
    top = int((below < share - 1e-12).sum())
    bottom = int((below <= 1 - share + 1e-12).sum())
    return seen.low + bottom * width, min(seen.high, seen.low + (top + 1) * width)


def least_squares(seen: Seen, config: QuantConfig) -> tuple[float, float]:
    """The range of least expected squared error, clipping and rounding weighed against each other."""

    def error(low: Tensor, high: Tensor) -> Tensor:
        x = seen.centres
        return (seen.counts * (quantized(x, low[:, None], high[:, None], config) - x).square()).sum(1)

    return _search(seen, error)


def least_divergence(seen: Seen, config: QuantConfig) -> tuple[float, float]:
    """The range whose quantized distribution has the least Kullback–Leibler divergence from the clipped one.

    Source: Migacz, "8-bit inference with TensorRT" (GTC 2017), for ranges with two ends.
    """

    def divergence(low: Tensor, high: Tensor) -> Tensor:
        return torch.stack([_divergence(seen, float(a), float(b), config) for a, b in zip(low, high, strict=True)])

    return _search(seen, divergence)


def _search(seen: Seen, loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, float]:
    """The best range: shrunk at both ends alike, then each end by itself."""
    low, high = torch.tensor([seen.low, seen.high], dtype=torch.float64)
    share = _SHARES[loss(_SHARES * low, _SHARES * high).argmin()]
    low, high = share * low, share * high
    widened = torch.cat([_SHARES, 1 / _SHARES[share <= _SHARES]])
    for _ in range(2):
        ends = (widened * low).clamp(min=seen.low)
        low = ends[loss(ends, high.expand_as(ends)).argmin()]
        ends = (widened * high).clamp(max=seen.high)
        high = ends[loss(low.expand_as(ends), ends).argmin()]
    return float(low), float(high)


def _divergence(seen: Seen, low: float, high: float, config: QuantConfig) -> Tensor:
    x = seen.centres
    inside = (x >= low) & (x <= high)
    if int(inside.sum()) < 2**config.activation_bit // 2:  # fewer bins than levels: nothing would be lost, and all be clipped
        return torch.tensor(float("inf"), dtype=torch.float64)
    # Zeros are always exact: the many that a ReLU gives must not seem spread over their level.
    counts = torch.where(x.abs() <= (x[1] - x[0]).abs() / 2 * (1 + 1e-9), 0.0, seen.counts)
    if not counts.any():
        return torch.zeros((), dtype=torch.float64)
    kept = counts[inside]
    reference = kept.clone()
    reference[0] += counts[x < low].sum()
    reference[-1] += counts[x > high].sum()
    ends = torch.tensor([low, high], dtype=torch.float64)
    scale, zero = scale_and_zero_point(ends[0], ends[1], config)
    level = (torch.round(x[inside] / scale) + zero).clamp(0, 2**config.activation_bit - 1).long()
    filled = (kept > 0).double()
    sums, sizes = torch.zeros(2, 2**config.activation_bit, dtype=torch.float64).unbind()
    sums, sizes = sums.index_add(0, level, kept), sizes.index_add(0, level, filled)
    spread = (sums / sizes.clamp(min=1))[level] * filled
    p, q = reference / reference.sum(), spread / spread.sum().clamp(min=1e-300)
    used = p > 0
    # What is clipped lies where nothing may have been: a little is taken to lie there, as other calibrators do.
    q = torch.where(q > 0, q, _SMOOTHED)
    return (p[used] * (p[used] / q[used]).log()).sum()
