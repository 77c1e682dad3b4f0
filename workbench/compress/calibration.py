"""Ranges of what goes into a model's layers, from samples: :func:`inputs_seen`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from workbench.compress.observers import BINS, Seen


def inputs_seen(model: nn.Module, layers: Iterable[str], batches: list[Tensor]) -> dict[str, Seen]:
    """What each layer's first input was over the samples; a layer that none of them reached is left out.

    The samples pass twice: once for the extremes, once more for the histograms.

    Args:
        model: in evaluation mode, on the device where the samples are to go.
        layers: their names.
        batches: of inputs (N, ...), on any device.
    """
    watches = {name: _Watch() for name in layers}
    hooks = [model.get_submodule(name).register_forward_pre_hook(watch) for name, watch in watches.items()]
    device = next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))
    try:
        with torch.no_grad():
            for counting in (False, True):
                for watch in watches.values():
                    watch.counting = counting
                for batch in batches:
                    model(batch.to(device))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: watch.seen() for name, watch in watches.items() if watch.lows}


class _Watch:
    """A hook that keeps the extremes of a layer's input, or counts its values into a histogram."""

    def __init__(self) -> None:
        self.lows: list[Tensor] = []
        self.highs: list[Tensor] = []
        self.counting = False
        self._counts = torch.zeros(BINS, dtype=torch.float64)
        self._ends: tuple[float, float] | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().float()
        if not self.counting:
            low, high = torch.aminmax(x)
            self.lows.append(low)
            self.highs.append(high)
            return
        if self._ends is None:
            self._ends = float(torch.stack(self.lows).min()), float(torch.stack(self.highs).max())
        self._counts += torch.histc(x, BINS, min=self._ends[0], max=self._ends[1]).double().cpu()

    def seen(self) -> Seen:
        return Seen(torch.stack(self.lows).double().cpu(), torch.stack(self.highs).double().cpu(), self._counts)
