"""Structured pruning: whole channels go, the model stays dense, smaller and ordinary.

* :func:`prune` — a new, smaller model; :class:`ChannelPruner` is the same as a class.
* :mod:`~workbench.compress.plan` — the steps: :mod:`~workbench.compress.coupling` finds which channels go together,
  :mod:`~workbench.compress.criteria` which matter least, :mod:`~workbench.compress.search` how many go.
* a record of what stayed, layer by layer, in ``model.structure``; :mod:`~workbench.compress.surgery` rebuilds by it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from workbench.compress.plan import Plan
from workbench.compress.pruning_config import PruneConfig


class ChannelPruner:
    """Prune a model: ``ChannelPruner(model, pruning_ratio=0.3).compress()``; the given model stays as it is.

    Args:
        pruning_ratio: fraction of the parameters to remove.
        example: one input (1, ...) or a batch; without it, inferred from the first layer.
        data: batches (x, y), for a criterion that looks at data.
        settings: further fields of :class:`PruneConfig`.
    """

    def __init__(
        self, model: nn.Module, pruning_ratio: float = 0.3, example: Any = None, data: Any = None, **settings: Any
    ) -> None:
        self.model, self.example, self.data = model, example, data
        self.config = PruneConfig(ratio=pruning_ratio, **settings)

    def compress(self) -> nn.Module:
        return prune(self.model, self.config, self.example, self.data)


def prune(model: nn.Module, config: PruneConfig | None = None, example: Any = None, data: Any = None) -> nn.Module:
    """A copy of ``model`` with its least important channels removed; the given model stays as it is.

    Fine-tune it afterwards: the weights that stay are unchanged, so accuracy drops first.

    Args:
        config: by default 30 % of the parameters, ranked by L1 norm.
        example: an input (N, ...) or a batch (x, y), of which one sample is used; without it, inferred from the first layer.
        data: batches (x, y), or one, for the criteria that look at data; the first ``config.samples`` samples are used.

    Returns:
        The pruned model, in the given one's mode. ``pruned.structure.transforms[-1]`` tells parameters and MACs (and latency, if
        that was the target) before and after; what was ``removed``; per changed layer the channels of the original that stayed
        (``out``, ``in``); which layers stayed ``whole``, and why; and in ``remarks`` what else is worth knowing.

    Raises:
        ModelError: the model can't be traced or pruned, or so much can't be removed.
        ConfigError: a named layer that isn't there, or a criterion that looks at data without any.
        DataError: an example that the model doesn't take, or data that isn't batches (x, y).
    """
    plan = Plan(model, PruneConfig.checked(config), example, data)
    cuts, found = plan.search()
    return plan.apply(cuts, found)
