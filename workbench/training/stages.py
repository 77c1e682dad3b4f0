"""A model's blocks divided into stages, one a rank, without another model being written.

Every rank runs the model's own forward, on the same inputs. The blocks of other stages are passed over: what such a block would
return is stood in for by zeros that take no memory, and so are its weights. The block before a rank's first returns what the
stage before sent; the block after its last ends the pass. So masks and whatever else is made from the inputs alone is there in
every stage, and names in checkpoints and readings are the model's.

* :func:`divided` finds where a model can be cut, by one pass that is watched, and takes what is a rank's.
* :class:`Stage` is that rank's part; :mod:`workbench.training.pipeline` runs stages one after another.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from workbench.errors import ModelError
from workbench.training.blocks import blocks_of

_SHARD = "Take mesh.shard instead, which divides any model."


class _Reached(Exception):
    """No error: the last block of a stage has computed."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class Stage:
    """What one rank computes of a model.

    Attributes:
        blocks: this stage's.
        first, last: whether it takes the inputs, and gives the outputs.
    """

    def __init__(self, model: nn.Module, seen: _Seen, starts: Sequence[int], number: int) -> None:
        self._model, self.first, self.last = model, number == 0, number == len(starts) - 1
        begin, end = starts[number], starts[number + 1] if not self.last else len(seen.blocks)
        self.blocks = [entry.block for entry in seen.blocks[begin:end]]
        stage_of = {place: sum(place >= start for start in starts[1:]) for place in range(-1, len(seen.blocks))}
        self._foreign = _foreign_tensors(model, seen, stage_of, number)
        self._foreign_layers = {name for name, places in seen.layers.items() if number not in {stage_of[p] for p in places}}
        self._received: Tensor | None = None
        self._enters = None if self.first else seen.blocks[begin].hidden
        for index, entry in enumerate(seen.blocks):
            if index == begin - 1:
                entry.block.forward = self._receiving(entry.in_tuple)
            elif index < begin:
                entry.block.forward = _standing_in(entry)
            elif index == end:
                entry.block.forward = _ending
        for name in self._foreign:
            _make_phantom(model, name)

    def owns(self, name: str) -> bool:
        """Whether a tensor of the model's state is this stage's."""
        return name not in self._foreign

    def computes(self, layer: str) -> bool:
        """Whether a layer is this stage's."""
        return layer not in self._foreign_layers

    def __call__(self, call: Callable[[], Tensor], received: Tensor | None) -> Tensor:
        """What ``call``, a pass of the model, gives in this stage: the model's output in the last, else the hidden state.

        Args:
            received: the hidden state that the stage before gave.
        """
        self._received = received
        try:
            return call()
        except _Reached as reached:
            return reached.hidden
        finally:
            self._received = None

    def room(self, samples: int, device: torch.device) -> Tensor:
        """Memory for the hidden state that comes in for a batch."""
        assert self._enters is not None
        return torch.empty(samples, *self._enters.shape[1:], dtype=self._enters.dtype, device=device)

    def _receiving(self, in_tuple: bool) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return (self._received,) if in_tuple else self._received

        return forward


def divided(
    model: nn.Module, stages: int, number: int, example: Tensor, around: Callable[[], AbstractContextManager[Any]]
) -> Stage:
    """Stage ``number`` of ``stages``; the model is changed in place, and holds no more than that of it.

    Stages are even by the operations of their blocks.

    Args:
        example: a small batch of inputs on the model's device.
        around: what the forward pass runs in.

    Raises:
        ModelError: the model can't be cut into so many stages, or layers of different stages share weights.
    """
    seen = _watched(model, example, around)
    starts = even_starts([entry.operations for entry in seen.blocks], [entry.follows for entry in seen.blocks], stages)
    if starts is None:
        possible = 1 + sum(entry.follows for entry in seen.blocks[1:])
        raise ModelError(
            f"mesh.pipeline={stages}: {type(model).__name__} can be cut into {possible if seen.blocks else 1} stage(s), between "
            "blocks of one class that take nothing but what the one before gave.",
            _SHARD,
        )
    return Stage(model, seen, starts, number)


def even_starts(costs: Sequence[float], cuttable: Sequence[bool], stages: int) -> list[int] | None:
    """First blocks of the stages, the dearest of which is as cheap as can be; None if there are too few places to cut.

    Args:
        costs: of each block.
        cuttable: whether a stage may begin with it; the first one's begins there anyhow.
    """
    upto = [0.0, *itertools.accumulate(costs)]
    best: list[dict[int, tuple[float, list[int]]]] = [{0: (0.0, [])}]
    for _ in range(stages):
        found: dict[int, tuple[float, list[int]]] = {}
        for begin, (dearest, starts) in best[-1].items():
            for end in range(begin + 1, len(costs) + 1):
                if end < len(costs) and not cuttable[end]:
                    continue
                cost = max(dearest, upto[end] - upto[begin])
                if end not in found or cost < found[end][0]:
                    found[end] = (cost, [*starts, begin])
        best.append(found)
    return best[stages].get(len(costs), (0.0, None))[1]


# -- one pass that is watched --------------------------------------------------------------------------------------------


@dataclass
class _Entry:
    """A block as it was called."""

    block: nn.Module
    hidden: Tensor
    """What it was given: shape and type, no data."""
    follows: bool
    """Whether that is what the block before gave, and all that it was given that training changes."""
    operations: float = 0.0
    given: Tensor = field(default_factory=lambda: torch.empty(0))
    """What it gave, likewise."""
    in_tuple: bool = False


@dataclass
class _Seen:
    """Blocks in the order of their calls, and after which of them (-1: before the first) tensors and layers were used."""

    blocks: list[_Entry] = field(default_factory=list)
    tensors: dict[str, set[int]] = field(default_factory=dict)
    layers: dict[str, set[int]] = field(default_factory=dict)

    @property
    def place(self) -> int:
        return len(self.blocks) - 1


class _Watching(TorchFunctionMode):
    """Notes which of the model's tensors each operation takes."""

    def __init__(self, names: Mapping[int, str], seen: _Seen) -> None:
        super().__init__()
        self._names, self._seen = names, seen

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if id(leaf) in self._names:
                self._seen.tensors.setdefault(self._names[id(leaf)], set()).add(self._seen.place)
        return function(*args, **(kwargs or {}))


def _watched(model: nn.Module, example: Tensor, around: Callable[[], AbstractContextManager[Any]]) -> _Seen:
    seen = _Seen()
    names = {id(tensor): name for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers())}
    counter = FlopCounterMode(display=False)
    blocks = blocks_of(model)
    gave: list[Any] = [None]
    before = [0.0]

    def count() -> None:
        total = float(counter.get_total_flops())
        if seen.blocks:
            seen.blocks[-1].operations += total - before[0]
        before[0] = total

    def entered(block: nn.Module, args: Any, kwargs: Any) -> None:
        if any(entry.block is block for entry in seen.blocks):
            raise ModelError(f"A block of {type(model).__name__} is called twice in a pass, so that no rank can hold it.", _SHARD)
        hidden = args[0] if args and isinstance(args[0], Tensor) else torch.empty(0)
        others = [leaf for leaf in tree_leaves((args[1:], kwargs)) if isinstance(leaf, Tensor)]
        follows = hidden is gave[0] and not any(other.requires_grad for other in others)
        if seen.blocks:
            count()
        seen.blocks.append(_Entry(block, torch.empty_like(hidden, device="meta"), follows))

    def left(block: nn.Module, args: Any, output: Any) -> None:
        seen.blocks[-1].in_tuple = isinstance(output, tuple)
        gave[0] = output[0] if isinstance(output, tuple) and len(output) == 1 else output
        if isinstance(gave[0], Tensor):
            seen.blocks[-1].given = torch.empty_like(gave[0], device="meta")

    def called(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any) -> None:
            seen.layers.setdefault(name, set()).add(seen.place)

        return note

    handles = [block.register_forward_pre_hook(entered, with_kwargs=True, prepend=True) for block in blocks]
    handles += [block.register_forward_hook(left) for block in blocks]
    handles += [m.register_forward_pre_hook(called(name)) for name, m in model.named_modules() if not any(m.children())]
    training = model.training
    model.eval()
    try:
        with torch.enable_grad(), counter, _Watching(names, seen), around():
            model(example)
        count()
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return seen


# -- what is not this stage's --------------------------------------------------------------------------------------------


def _foreign_tensors(model: nn.Module, seen: _Seen, stage_of: Mapping[int, int], number: int) -> set[str]:
    foreign = set()
    layers = {f"{layer}.": places for layer, places in seen.layers.items()}
    for name in dict(itertools.chain(model.named_parameters(), model.named_buffers())):
        layer = name.rpartition(".")[0] + "."
        stages = {stage_of[place] for place in seen.tensors.get(name) or layers.get(layer) or {-1}}
        if len(stages) > 1:
            raise ModelError(
                f"mesh.pipeline={len(set(stage_of.values()))}: {name!r} is used in the stages {sorted(stages)}, and lies in one.",
                _SHARD,
            )
        if number not in stages:
            foreign.add(name)
    return foreign


def _make_phantom(model: nn.Module, name: str) -> None:
    """Zeros of the same shape without memory, where it is a parameter; buffers stay, they are small."""
    owner_name, _, own = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    old = owner._parameters.get(own)
    if old is not None:
        zeros = torch.zeros((), dtype=old.dtype, device=old.device).expand(old.shape)
        owner.register_parameter(own, nn.Parameter(zeros, requires_grad=False))


def _standing_in(entry: _Entry) -> Callable[..., Any]:
    """What a block of an earlier stage gives: something of that shape."""

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        shape = (len(hidden), *entry.given.shape[1:])
        zeros = torch.zeros((), dtype=entry.given.dtype, device=hidden.device).expand(shape)
        return (zeros,) if entry.in_tuple else zeros

    return forward


def _ending(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    raise _Reached(hidden)
