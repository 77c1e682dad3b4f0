"""What a heat map of gradients can show: one :class:`Quantity` for each, computed from the columns that a table has.

``QUANTITIES`` is the list, in the order of the chooser; :func:`quantities_of` gives those that a table has columns for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

FP16_ZERO = 24
"""Bins of a gradient's histogram before 2^-25, half of the smallest magnitude of fp16: what is below is rounded to 0. Bin 0 ends
at 2^-48, bin k at 2^(k-48)."""


@dataclass(frozen=True)
class Quantity:
    """A number by parameter and step.

    Attributes:
        name: of the quantity, in requests and code.
        label: in the page's chooser.
        needs: columns of the readings' table.
        of: from the table to float64 [rows]; infinite where an element is not finite.
        log: drawn on a logarithmic scale; else a share, from 0 to 1.
        block: how parameters of a block are drawn as one: their joint norm, the largest, or the mean.
        meaning: one line for the page.
    """

    name: str
    label: str
    needs: tuple[str, ...]
    of: Callable[[pa.Table], np.ndarray]
    log: bool
    block: Literal["norm", "max", "mean"]
    meaning: str


def _column(name: str) -> Callable[[pa.Table], np.ndarray]:
    def read(table: pa.Table) -> np.ndarray:
        broken = np.asarray(table["nonfinite"], dtype="f8") > 0
        return np.where(broken, np.inf, np.asarray(table[name], dtype="f8"))

    return read


def _underflow(table: pa.Table) -> np.ndarray:
    """Share of elements that fp16 would make 0: nearer to zero than 2^-25, and not 0 already."""
    counts = np.asarray(table["histogram"].combine_chunks().flatten(), dtype="f8").reshape(table.num_rows, -1)
    total = counts.sum(axis=1)
    zeros = np.minimum(counts[:, 0], np.asarray(table["zeros"], dtype="f8") * total)
    return np.divide(counts[:, :FP16_ZERO].sum(axis=1) - zeros, total, out=np.full(len(total), np.nan), where=total > 0)


QUANTITIES: tuple[Quantity, ...] = (
    Quantity("norm", "Norm", ("norm", "nonfinite"), _column("norm"), True, "norm", "L2 norm of the gradient"),
    Quantity(
        *("update_ratio", "Update ratio", ("update_ratio", "nonfinite"), _column("update_ratio"), True, "max"),
        "the step's change of a weight, as a share of its norm; about 1/1000 is usual",
    ),
    Quantity("max", "Largest", ("max", "nonfinite"), _column("max"), True, "max", "largest magnitude in the gradient"),
    Quantity(
        *("zeros", "Zeros", ("zeros",), lambda table: np.asarray(table["zeros"], dtype="f8"), False, "mean"),
        "share of elements whose gradient is 0",
    ),
    Quantity(
        *("underflow", "fp16 underflow", ("histogram", "zeros"), _underflow, False, "mean"),
        "share of elements that would become 0 in fp16 without loss scaling: not 0, and below 2⁻²⁵",
    ),
)


def quantities_of(columns: Sequence[str]) -> list[Quantity]:
    """The quantities that a table with these columns has."""
    return [quantity for quantity in QUANTITIES if set(quantity.needs) <= set(columns)]
