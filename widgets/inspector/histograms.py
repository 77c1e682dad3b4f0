"""Distributions of layers' outputs, as the probes count them: by sign and half octaves of magnitude.

* :func:`edges` — of the bins; :func:`shown_bins` — which of them to draw; :func:`levels` — counts as bytes for a page.
* :class:`Distributions` — every layer's histogram at one step, ready to draw.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TOP = 16
"""Exponent of the largest edge of ``workbench.probes.EDGES``."""


@dataclass(frozen=True)
class Distributions:
    """Histograms of all layers at one step.

    Attributes:
        step, at: of the reading, and its column in the history.
        counts: [layers, bins], values near zero folded into one bin.
        edges: of the bins, one more than bins.
    """

    step: int
    at: int
    counts: np.ndarray
    edges: list[float]

    @property
    def levels(self) -> np.ndarray:
        """Counts as shares of each layer's fullest bin; the root lifts the tails."""
        return np.sqrt(self.counts / np.maximum(self.counts.max(axis=1, keepdims=True), 1))


def distributions(counts: np.ndarray, step: int, at: int) -> Distributions:
    """``counts`` [layers, bins] without the bins that hold next to nothing, those about zero as one."""
    low, inner, outer, high = shown_bins(counts)
    middle = counts[:, inner:outer].sum(axis=1, keepdims=True)
    folded = np.hstack([counts[:, low:inner], middle, counts[:, outer:high]])
    known = edges(counts.shape[1])
    return Distributions(step, at, folded, [*known[low : inner + 1], *known[outer : high + 1]])


def levels(counts: np.ndarray) -> np.ndarray:
    """uint8 of the shape of ``counts`` [..., bins]: the root of each count's share of the fullest bin, of 255.

    A byte a cell is as fine as the eye sees; squared, and times the fullest bin, it is the count again to within a two-hundredth
    of that bin.
    """
    fullest = np.maximum(counts.max(axis=-1, keepdims=True), 1)
    return np.round(255 * np.sqrt(counts / fullest)).astype(np.uint8)


def shown_bins(counts: np.ndarray) -> tuple[int, int, int, int]:
    """Which bins to draw of ``counts`` [layers, bins]: (low, inner, outer, high).

    Bins inner … outer - 1, about zero, are drawn as one: of no layer do they hold over a twentieth of the values that are not
    zero. Outside low … high - 1 no layer has a five-hundredth of its values.
    """
    bins = counts.shape[1]
    middle = bins // 2
    total = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    present = np.flatnonzero((counts / total > 0.002).any(axis=0))
    low, high = (int(present[0]), int(present[-1]) + 1) if len(present) else (middle - 4, middle + 5)
    sizes = counts[:, middle + 1 :] + counts[:, middle - 1 :: -1]  # by distance from zero
    share = np.cumsum(sizes, axis=1) / np.maximum(sizes.sum(axis=1, keepdims=True), 1)
    folded = int((share.max(axis=0) <= 0.05).sum())
    folded = min(folded, bins // 2 - 4)
    inner, outer = middle - folded, middle + 1 + folded
    return min(low, inner - 1), inner, outer, max(high, outer + 1)


def edges(bins: int) -> list[float]:
    """Finite edges of the histogram's bins: those of ``workbench.probes.EDGES``, the outermost one bin beyond their neighbours.

    Written out here, since that package imports torch, which would cost the kernel seconds; a test holds them equal. How many
    bins there are tells where they begin: half octaves, up to 2^16.
    """
    sizes = (bins + 1) // 2
    magnitudes = [2.0 ** (TOP + (k - sizes + 2) / 2) for k in range(sizes)]
    return [*(-m for m in reversed(magnitudes)), *magnitudes]
