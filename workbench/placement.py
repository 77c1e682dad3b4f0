"""Layers of one model on devices of their own, all driven by one process: model parallelism by hand.

A plan gives layers, named by shell patterns, a device each.

* :func:`layout` says which layer then lies where: a function of names alone.
* :func:`place` moves a model's layers there, and hooks into it: what a layer is given comes to its weights. Names stay.
* :func:`return_output` has the model's output come back to where its inputs were.
* :class:`ParallelModel` is all of this for loops of your own.
* :func:`moved` and :func:`to_device` are the copies.

Copies between two accelerators are ordered on their streams, and the host waits for none. One to main memory is waited for: what
computes there reads it at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from workbench.errors import ConfigError, DeviceError, nearest


class ParallelModel(nn.Module):
    """A model whose layers lie on several devices, for loops of your own; ``train`` does the same with ``mesh.devices``.

    The model given is moved, not copied: that it need not fit on one device is the point. Names in :meth:`state_dict` are its
    own, so its checkpoints open without this class, and the other way round. Make optimizers afterwards.

    >>> parallel = ParallelModel(net, {"layer1": "cuda:0", "layer3": "cuda:1"})
    >>> loss = criterion(parallel(x), y.to(parallel.output))

    Args:
        model: to be moved; what precedes the first layer named stays where the model's first weight is.
        devices: by layer, as :func:`layout` takes them; layers not named go with those before them.
        output: where a call gives its output; by default on the device of the model's first weight, where inputs are best given.

    Raises:
        ConfigError: a pattern that names no layer, or layers on two devices that share a weight.
        DeviceError: a device that isn't there.
    """

    def __init__(
        self, model: nn.Module, devices: Mapping[str, str | torch.device], output: str | torch.device | None = None
    ) -> None:
        super().__init__()
        plan = {pattern: find_device(device) for pattern, device in devices.items()}
        given = None if output is None else find_device(output)
        self.devices = place(model, plan, home_of(model))
        """The device of each layer, by name."""
        self.output = given or home_of(model)
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives, on :attr:`output`."""
        return moved(self.model(*args, **kwargs), self.output)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load what the model's own ``state_dict`` gave, on whatever devices."""
        return self.model.load_state_dict(*args, **kwargs)


def find_device(name: str | torch.device) -> torch.device:
    """A device of this machine.

    Raises:
        DeviceError: it isn't there.
    """
    there = ["cpu"]
    if (accelerator := torch.accelerator.current_accelerator()) is not None:
        there += [f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())]
    if str(name) not in there:
        raise DeviceError(f"devices names {str(name)!r}, and this process has {', '.join(there)}.", "Name one of these.")
    return torch.device(name)


def home_of(model: nn.Module) -> torch.device:
    """Where a model's first weight is."""
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def layout(names: Sequence[str], plan: Mapping[str, torch.device], home: torch.device) -> dict[str, torch.device]:
    """The device of each layer.

    A pattern takes the layers that it matches and all within them; where several take one, the last does. A layer that none takes
    goes with the one before it, and the first ones stay at ``home``: name those at which another device begins, or all.

    Args:
        names: of all modules, in the order in which the model lists them, as ``named_modules`` gives them.
        plan: devices by shell pattern, e.g. ``{"blocks.?": cuda0, "blocks.1?": cuda1}``.

    Raises:
        ConfigError: a pattern that matches nothing, or of which later ones leave nothing.
    """
    taken = _taken(names, plan)
    found: dict[str, torch.device] = {}
    device = home
    for name in names:
        device = found[name] = plan[taken[name]] if name in taken else device
    return found


def place(model: nn.Module, plan: Mapping[str, torch.device], home: torch.device) -> dict[str, torch.device]:
    """Move a model's layers, in place, and have what they are given follow them.

    A layer without weights that ``plan`` doesn't name computes where its input is.

    Args:
        plan, home: as :func:`layout` takes them.

    Returns:
        The device of each layer, by name.

    Raises:
        ConfigError: as :func:`layout`; or layers on two devices share a weight.
    """
    release(model)
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    found = layout(names, plan, home)
    _check_shared(model, found)
    taken = _taken(names, plan)
    examples: dict[torch.device, _Weight] = {}
    for name, module in model.named_modules():
        device = found[name]
        module._apply(lambda tensor, device=device: tensor.to(device), recurse=False)
        if (own := _first_weight(module, recurse=False)) is not None:
            examples.setdefault(device, own)
    handles = []
    for name, module in model.named_modules():
        weight: _Weight | torch.device | None = _first_weight(module)
        if weight is None and name in taken:
            weight = examples.get(found[name]) or found[name]
        handles.append(module.register_forward_pre_hook(_Arrival(weight), with_kwargs=True))
    model.__dict__[_HANDLES] = handles
    return found


def return_output(model: nn.Module, home: torch.device) -> None:
    """Have a placed model's output come back to the device of its first input; to ``home`` where no input is a tensor."""
    hooks = _Return(home)
    model.__dict__[_HANDLES] += [
        model.register_forward_pre_hook(hooks.arriving, with_kwargs=True, prepend=True),
        model.register_forward_hook(hooks.leaving),
    ]


def release(model: nn.Module) -> None:
    """Take the hooks off a placed model; its layers stay where they are."""
    for handle in model.__dict__.pop(_HANDLES, ()):
        handle.remove()


def moved(value: Any, device: torch.device) -> Any:
    """``value`` with all tensors within on ``device``; what is there already stays itself."""

    def move(leaf: Any) -> Any:
        return to_device(leaf, device) if _moves(leaf) else leaf

    return tree_map(move, value, is_leaf=_moves)


def to_device(value: Any, device: torch.device) -> Any:
    """A tensor, or what holds some, there; without the host's waiting for it unless that is main memory."""
    # There, a copy that isn't waited for would be read before it is complete.
    return value.to(device, non_blocking=device.type != "cpu")


_HANDLES = "_placement_handles"


class _Weight:
    """A weight by the module that holds it: asked for where it is now, as a model may be moved, copied or stored."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        self.owner, self.name = owner, name

    @property
    def device(self) -> torch.device | None:
        tensor: Tensor | None = self.owner._parameters.get(self.name)
        if tensor is None:
            tensor = self.owner._buffers.get(self.name)
        return None if tensor is None else tensor.device


class _Arrival:
    """Before a layer computes, what it is given comes to the device of ``weight``; without one, to that of its first tensor."""

    def __init__(self, weight: _Weight | torch.device | None) -> None:
        self.weight = weight

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        device = self.weight.device if isinstance(self.weight, _Weight) else self.weight
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and device in (None, args[0].device):
            return None  # nearly always, so at little cost
        if device is None:
            device = _device_of(args, kwargs)
        return None if device is None else moved((args, kwargs), device)


class _Return:
    """Around a whole model: notes where its inputs are, and sends the output there."""

    def __init__(self, home: torch.device) -> None:
        self.home = self.device = home

    def arriving(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.device = _device_of(args, kwargs) or self.home

    def leaving(self, module: nn.Module, args: Any, output: Any) -> Any:
        return moved(output, self.device)


def _taken(names: Sequence[str], plan: Mapping[str, torch.device]) -> dict[str, str]:
    """The pattern that takes each layer, of those that one takes."""
    taken: dict[str, str] = {}
    for pattern in plan:
        matching = {name for name in names if fnmatchcase(name, pattern)}
        if not matching:
            close = nearest(pattern, names) or [name for name in names if name and "." not in name]
            raise ConfigError(
                f"devices names the layer {pattern!r}, which the model doesn't have.",
                f"It has {', '.join(close[:8])}{' …' if len(close) > 8 else ''}.",
            )
        taken |= {name: pattern for name in names if not matching.isdisjoint(_with_parents(name))}
    for pattern in plan:
        if pattern not in taken.values():
            raise ConfigError(
                f"devices: of the layers {pattern!r}, later patterns take every one.", "Put it after them, or leave it out."
            )
    return taken


def _with_parents(name: str) -> list[str]:
    parts = name.split(".") if name else []
    return ["", *(".".join(parts[: count + 1]) for count in range(len(parts)))]


def _check_shared(model: nn.Module, devices: Mapping[str, torch.device]) -> None:
    first: dict[int, tuple[str, str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for own, tensor in _weights(module):
            other, its = first.setdefault(id(tensor), (name, own))
            if devices[other] != devices[name]:
                raise ConfigError(
                    f"The layers {other!r} and {name!r} share a weight, {its!r}, and devices puts them on {devices[other]} and "
                    f"{devices[name]}.",
                    f"Name both with one device, e.g. {{{other!r}: {devices[other]}, {name!r}: {devices[other]}}}.",
                )


def _weights(module: nn.Module) -> list[tuple[str, Tensor]]:
    """A module's own parameters and buffers."""
    return [(name, tensor) for name, tensor in (*module._parameters.items(), *module._buffers.items()) if tensor is not None]


def _first_weight(module: nn.Module, *, recurse: bool = True) -> _Weight | None:
    owners = module.modules() if recurse else [module]
    return next((_Weight(owner, name) for owner in owners for name, _ in _weights(owner)), None)


def _device_of(args: Any, kwargs: Any) -> torch.device | None:
    """That of the first tensor."""
    return next((leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)


def _moves(value: Any) -> bool:
    """Whether it knows how to move itself: a tensor, a packed sequence, a graph; never a layer, which stays where it is."""
    return hasattr(value, "to") and not isinstance(value, nn.Module)
