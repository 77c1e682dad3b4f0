"""Micro-batches flowing through the stages of a model: one forward, one backward (1F1B).

A stage begins with as many forward passes as there are stages after it, then alternates, so that it keeps the activations of so
many micro-batches and no more (Narayanan et al. 2021, arXiv:2104.04473, section 2.2). Of ``m`` micro-batches over ``p`` stages,
(p - 1) / (m + p - 1) of the time stages wait for the first and the last.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Line:
    """The neighbours of a stage.

    Args:
        group: the ranks of the stages, in order.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.place, self.length = group, group.rank(), group.size()

    def exchange(self, *, before: Sequence[tuple[Any, Tensor]] = (), after: Sequence[tuple[Any, Tensor]] = ()) -> None:
        """Send to and receive from the stages before and after, all at once; the host does not wait for a GPU."""
        ops = [
            dist.P2POp(operation, tensor, dist.get_global_rank(self.group, self.place + step), self.group)
            for step, wanted in ((-1, before), (1, after))
            for operation, tensor in wanted
        ]
        if ops:
            for work in dist.batch_isend_irecv(ops):
                work.wait()


def one_forward_one_backward(
    line: Line,
    count: int,
    room: Callable[[int], Tensor],
    forward: Callable[[int, Tensor | None], Tensor],
    backward: Callable[[int, Tensor, Tensor | None], None],
) -> None:
    """All forward and backward passes of a step in this stage.

    Args:
        count: micro-batches.
        room: memory for the hidden state of a micro-batch that comes in.
        forward: from a micro-batch's number and what the stage before gave (None in the first) to what this one gives.
        backward: from the number, that, and the gradient of it (None in the last stage).
    """
    first, last = line.place == 0, line.place == line.length - 1
    flying: deque[tuple[int, Tensor | None, Tensor]] = deque()
    ahead = min(line.length - line.place - 1, count)

    def arriving(number: int) -> Tensor | None:
        return None if first or number >= count else room(number).requires_grad_()

    def received(hidden: Tensor | None) -> list[tuple[Any, Tensor]]:
        return [] if hidden is None else [(dist.irecv, hidden.detach())]

    def run_forward(number: int, hidden: Tensor | None) -> Tensor:
        given = forward(number, hidden)
        flying.append((number, hidden, given))
        return given.detach().contiguous()

    def run_backward(gradient: Tensor | None) -> list[tuple[Any, Tensor]]:
        number, hidden, given = flying.popleft()
        backward(number, given, gradient)
        if hidden is None:
            return []
        assert hidden.grad is not None
        return [(dist.isend, hidden.grad)]

    for number in range(ahead):
        hidden = arriving(number)
        line.exchange(before=received(hidden))
        line.exchange(after=[(dist.isend, run_forward(number, hidden))])
    hidden = arriving(ahead)
    line.exchange(before=received(hidden))
    for number in range(ahead, count):
        given = run_forward(number, hidden)
        gradient = None if last else torch.empty_like(flying[0][2])
        if gradient is not None:
            line.exchange(after=[(dist.isend, given), (dist.irecv, gradient)])
        sent = run_backward(gradient)
        hidden = arriving(number + 1)
        line.exchange(before=[*sent, *received(hidden)])
    while flying:
        gradient = torch.empty_like(flying[0][2])
        line.exchange(after=[(dist.irecv, gradient)])
        line.exchange(before=run_backward(gradient))


def through(line: Line, room: Callable[[], Tensor], forward: Callable[[Tensor | None], Tensor]) -> Tensor | None:
    """One forward pass through all stages: the last one's output there, None in the others."""
    hidden = None if line.place == 0 else room()
    if hidden is not None:
        line.exchange(before=[(dist.irecv, hidden)])
    given = forward(hidden)
    if line.place == line.length - 1:
        return given
    line.exchange(after=[(dist.isend, given.contiguous())])
    return None
