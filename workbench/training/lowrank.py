"""Gradients as low-rank factors: PowerSGD (Vogels et al. 2019, arXiv:1905.13727), without waiting for the device.

PyTorch's own hook synchronizes the device in every step and forgets its errors when a run is resumed. This one takes the whole
gradient after the backward pass, in two all-reduces, equal shapes in one product; its state is tensors of fixed shape that a
checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Variable

LEAST = 2
"""A matrix is sent as factors where these hold fewer numbers than the matrix divided by this."""


@dataclass
class _Group:
    """Matrices of one shape: K of [N, M].

    Attributes:
        error: [K, N, M], what this rank has yet to tell its peers.
        factor: [K, M, R], of the step before, the start of the next power iteration.
        fresh: [K, M, R], where the one before is zero.
    """

    parameters: list[Tensor]
    error: Tensor
    factor: Tensor
    fresh: Tensor


class LowRank:
    """Averages gradients over ranks as products of two factors, after some exact steps.

    Args:
        parameters: all that get gradients, of one type and device.
        rank: of the products.
        start: steps that pass exactly.
    """

    def __init__(self, parameters: Sequence[Tensor], rank: int, start: int) -> None:
        self.start = start
        self.step = torch.zeros((), dtype=torch.int64)
        shapes: dict[tuple[int, int], list[Tensor]] = {}
        self._plain: list[Tensor] = []
        for parameter in parameters:
            rows = parameter.shape[0] if parameter.ndim else 1
            columns = parameter.numel() // max(1, rows)
            small = LEAST * min(rank, rows, columns) * (rows + columns) < parameter.numel()
            (shapes.setdefault((rows, columns), []) if small else self._plain).append(parameter)
        generator = torch.Generator().manual_seed(0)  # the same on every rank
        self._groups = []
        for (rows, columns), members in shapes.items():
            like: Any = {"dtype": members[0].dtype, "device": members[0].device}
            drawn = torch.randn(len(members), columns, min(rank, rows, columns), generator=generator).to(**like)
            error = torch.zeros(len(members), rows, columns, **like)
            self._groups.append(_Group(members, error, drawn.clone(), drawn))
        self._arrived: dict[int, Tensor] = {}

    @property
    def payload(self) -> int:
        """Numbers that a rank gives to its peers each step."""
        factors = sum(len(g.parameters) * sum(g.error.shape[1:]) * g.factor.shape[2] for g in self._groups)
        return factors + sum(parameter.numel() for parameter in self._plain)

    def state(self, rank: int) -> dict[str, Tensor]:
        """Its tensors by name, to be saved, and loaded in place; errors are each rank's own."""
        state = {"step": self.step}
        for index, group in enumerate(self._groups):
            state |= {f"factor-{index}": group.factor, f"rank-{rank}.error-{index}": group.error}
        return state

    def take(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """What a hook of DistributedDataParallel is to do: gradients are noted, and averaged after the backward pass."""
        self._arrived |= {id(p): g for p, g in zip(bucket.parameters(), bucket.gradients(), strict=True)}
        if bucket.is_last():
            Variable._execution_engine.queue_callback(self._average)
        buffer = bucket.buffer()
        future: Any = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else None)
        future.set_result(buffer)
        return future

    def _average(self) -> None:
        arrived, self._arrived = self._arrived, {}
        self.average(arrived)

    @torch.no_grad()
    def average(self, gradients: dict[int, Tensor]) -> None:
        """Average gradients, by the identity of their parameters, in place."""
        self.step += 1
        plain = [gradients[id(parameter)] for parameter in self._plain]
        if self.step <= self.start:
            plain += [gradients[id(parameter)] for group in self._groups for parameter in group.parameters]
            _write(plain, _mean(plain))
            return
        wholes = []
        for group in self._groups:
            shape = group.error.shape[1:]
            found = torch.stack([gradients[id(parameter)].reshape(shape) for parameter in group.parameters])
            wholes.append(found.add_(group.error))
        lefts = [whole @ group.factor for whole, group in zip(wholes, self._groups, strict=True)]
        told = _mean([*plain, *lefts])
        _write(plain, told[: len(plain)])
        lefts = [orthonormal(left) for left in told[len(plain) :]]
        rights = _mean([whole.mT @ left for whole, left in zip(wholes, lefts, strict=True)]) if wholes else []
        for group, whole, left, right in zip(self._groups, wholes, lefts, rights, strict=True):
            product = left @ right.mT
            _write([gradients[id(parameter)] for parameter in group.parameters], list(product))
            torch.sub(whole, product, out=group.error)
            # From nothing no power iteration leads anywhere, and a layer's gradient may be zero at first.
            group.factor.copy_(torch.where(right.abs().amax(1, keepdim=True) > 0, right, group.fresh))


def orthonormal(columns: Tensor) -> Tensor:
    """[K, N, R] -> the same spaces by columns of length 1 at right angles (modified Gram–Schmidt).

    A column that lies in the space of those before it, up to rounding, becomes zero.
    """
    columns = columns.clone()
    least = torch.linalg.vector_norm(columns, dim=1, keepdim=True) * torch.finfo(columns.dtype).eps ** 0.5
    for index in range(columns.shape[2]):
        column = columns[:, :, index : index + 1]
        length = torch.linalg.vector_norm(column, dim=1, keepdim=True)
        column.copy_(torch.where(length > least[:, :, index : index + 1], column / length, 0))
        if index + 1 < columns.shape[2]:
            rest = columns[:, :, index + 1 :]
            rest -= column @ (column.mT @ rest)
    return columns


def _mean(tensors: list[Tensor]) -> list[Tensor]:
    """The mean of each over ranks, by one all-reduce."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    flat /= dist.get_world_size()
    dist.all_reduce(flat)
    return [part.view(tensor.shape) for part, tensor in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]


def _write(targets: list[Tensor], values: list[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value.reshape(target.shape))
