"""What waits in main memory: activations between the two passes, the optimizer's state between updates.

Copies run beside the computation, on streams of their own, and the host waits for none of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

SMALLEST = 2**20
"""Bytes under which a tensor stays where it is: its copy would cost more time than it saves memory."""

LEAVING = 2
"""Tensors on their way out at a time; the computation waits for the oldest before there are more."""

AHEAD = 2
"""Tensors that are fetched before the backward pass asks for them."""


@dataclass(eq=False)
class _Away:
    """A tensor in main memory, and where it is on its way back."""

    host: Tensor
    device: torch.device
    sent: torch.cuda.Event | None = None
    back: Tensor | None = None
    arrived: torch.cuda.Event | None = None
    used: bool = False


class ActivationOffload:
    """Tensors that the forward pass saves for the backward pass wait in main memory (Rhu et al. 2016, arXiv:1602.08124).

    Parameters and small tensors stay. A tensor that several operations save travels once. In the backward pass, tensors are
    fetched in the opposite order, some ahead of their use.

    Args:
        smallest: bytes under which a tensor stays.

    Example:
        >>> offload = ActivationOffload()
        >>> with offload.forward():
        ...     loss = model(x).sum()
        >>> loss.backward()
    """

    def __init__(self, smallest: int = SMALLEST) -> None:
        self.smallest = smallest
        self.moved = 0
        """Bytes sent in the last forward pass."""
        self._order: list[_Away] = []
        self._places: dict[int, int] = {}
        self._known: dict[tuple[Any, ...], tuple[StorageWeakRef, _Away]] = {}
        self._leaving: deque[tuple[Tensor, _Away]] = deque()
        self._streams: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Stream]] = {}

    def forward(self) -> AbstractContextManager[Any]:
        """Around a forward pass."""
        self.moved = 0
        self._order.clear()
        self._places.clear()
        self._known.clear()
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor | _Away:
        if tensor.nbytes < self.smallest or not _is_activation(tensor):
            return tensor.detach()
        storage = tensor.untyped_storage()
        key = (storage._cdata, tensor.storage_offset(), tensor.size(), tensor.stride(), tensor.dtype, tensor._version)
        reference, away = self._known.get(key, (None, None))
        if away is None or reference is None or reference.expired():  # an address may have been given to another
            away = self._send(tensor)
            self._known[key] = StorageWeakRef(storage), away
            self._places[id(away)] = len(self._order)
            self._order.append(away)
        return away

    def _send(self, tensor: Tensor) -> _Away:
        tensor = tensor.detach()
        self.moved += tensor.nbytes
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        away = _Away(host, tensor.device)
        if not tensor.is_cuda:
            host.copy_(tensor)
            return away
        out, _ = self._streams_of(tensor.device)
        out.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(out):
            host.copy_(tensor, non_blocking=True)
        away.sent = out.record_event()
        self._leaving.append((tensor, away))
        while len(self._leaving) > LEAVING:
            self._let_go()
        return away

    def _let_go(self) -> None:
        """The oldest leaving tensor's memory may be used again by what the device computes after its copy."""
        tensor, away = self._leaving.popleft()
        assert away.sent is not None
        torch.cuda.current_stream(tensor.device).wait_event(away.sent)

    def _unpack(self, packed: Tensor | _Away) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        while self._leaving:
            self._let_go()
        place = self._places.get(id(packed))
        self._fetch(packed)
        for away in self._order[max(0, place - AHEAD) : place] if place is not None else ():
            if not away.used:
                self._fetch(away)
        found, packed.back, packed.used = packed.back, None, True
        assert found is not None
        if packed.arrived is not None:
            torch.cuda.current_stream(packed.device).wait_event(packed.arrived)
        return found

    def _fetch(self, away: _Away) -> None:
        if away.back is not None:
            return
        away.back = torch.empty_like(away.host, device=away.device, pin_memory=False)
        if away.device.type != "cuda":
            away.back.copy_(away.host)
            return
        _, home = self._streams_of(away.device)
        home.wait_stream(torch.cuda.current_stream(away.device))  # what used this memory before is done with it
        with torch.cuda.stream(home):
            away.back.copy_(away.host, non_blocking=True)
        away.arrived = home.record_event()

    def _streams_of(self, device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device), torch.cuda.Stream(device)
        return self._streams[device]


def offload_state(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Keep an optimizer's state in pinned main memory between updates; returns what undoes it.

    An update fetches it when activations are gone, so that the two are never there together (compare Rajbhandari et al. 2021,
    arXiv:2104.07857, who update on the host).
    """

    def fetch(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, state in optimizer.state.items():
            for value in state.values():
                if isinstance(value, Tensor) and value.device != parameter.device and value.ndim:
                    value.data = value.data.to(parameter.device, non_blocking=True)

    def send(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor) and value.is_cuda and value.nbytes >= SMALLEST:
                    value.data = torch.empty_like(value.data, device="cpu", pin_memory=True).copy_(value.data, non_blocking=True)

    def settle(optimizer: torch.optim.Optimizer) -> None:
        for device in {parameter.device for parameter in optimizer.state if parameter.is_cuda}:
            torch.cuda.synchronize(device)  # what a checkpoint reads has arrived

    handles = [
        optimizer.register_step_pre_hook(fetch),
        optimizer.register_step_post_hook(send),
        optimizer.register_state_dict_pre_hook(settle),
    ]

    def undo() -> None:
        for handle in handles:
            handle.remove()
        fetch(optimizer, (), {})

    return undo


def _is_activation(tensor: Tensor) -> bool:
    """Whether sending it away gives memory back: parameters and views of them stay, and what repeats a smaller storage."""
    if type(tensor) is not Tensor or tensor.layout != torch.strided:
        return False
    base = tensor._base if tensor._is_view() else None
    return not isinstance(base, nn.Parameter) and tensor.untyped_storage().nbytes() >= tensor.nbytes
