"""What pruning one layer costs: accuracy by layer and ratio, each group of coupled layers cut alone.

* :func:`sensitivity` — the sweep; :class:`Sensitivity` — its table, its plot, and the settings that follow from it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from workbench.compress.cost import count_macs
from workbench.compress.coupling import Cuts, cut
from workbench.compress.criteria import batches_of
from workbench.compress.plan import Plan
from workbench.compress.pruning_config import PruneConfig
from workbench.errors import ConfigError, DataError, ModelError
from workbench.models.structure import check_module, count_parameters

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True)
class Sensitivity:
    """Accuracy by layer and ratio.

    Attributes:
        frame: one row a group of coupled layers and ratio: ``layer`` (the group's first), ``layers`` (how many go with it),
            ``ratio`` (of its channels, as cut), ``accuracy``, ``drop`` (from the whole model's), ``parameters`` and ``macs`` (the
            shares of the model's that go).
        accuracy: of the whole model on the same samples.
        samples: how many.
    """

    frame: pd.DataFrame
    accuracy: float
    samples: int

    def figure(self) -> go.Figure:
        """The drop by layer (in the order of the model) and ratio, as a heat map in points of accuracy."""
        import plotly.graph_objects as go

        table = self.frame.pivot_table(index="layer", columns="asked", values="drop", sort=False)
        return go.Figure(
            go.Heatmap(
                z=100 * table.to_numpy(),
                x=[f"{ratio:.0%}" for ratio in table.columns],
                y=table.index.tolist(),
                colorscale="Blues",
                zmin=0,
                colorbar={"title": {"text": "points lost"}},
                hovertemplate="%{y}, %{x} of its channels: %{z:.1f} points lost<extra></extra>",
            ),
            {
                "title": {"text": f"Accuracy lost by pruning one layer (of {self.accuracy:.1%}, {self.samples} samples)"},
                "xaxis": {"title": {"text": "channels removed"}, "type": "category"},
                "yaxis": {"autorange": "reversed", "automargin": True},
            },
        )

    def suggestion(self, drop: float = 0.01) -> dict[str, Any]:
        """Settings of :class:`PruneConfig` that follow: ``PruneConfig(ratio=0.3, **sensitivity.suggestion())``.

        Args:
            drop: of accuracy that one layer may cost, e.g. 0.01 for a point.

        Returns:
            ``ignored``: layers that cost more at every ratio tried. ``ratios``: the largest ratio within the drop for layers that
            bear some of the ratios, but not all. Those that bear all are left to the ranking.

        Raises:
            ConfigError: a drop that is no fraction.
        """
        if not 0 <= drop < 1:
            raise ConfigError(f"drop={drop} must lie between 0 and 1.", "Pass a fraction: 0.01 is a point of accuracy.")
        ignored, ratios = [], {}
        for layer, rows in self.frame.groupby("layer", sort=False):
            rows = rows.sort_values("ratio")
            borne = rows[(rows["drop"] <= drop).cummin()]
            if borne.empty:
                ignored.append(str(layer))
            elif len(borne) < len(rows):
                ratios[str(layer)] = float(borne["asked"].iloc[-1])
        return {"ignored": ignored, "ratios": ratios}


def sensitivity(
    model: nn.Module,
    data: Any,
    ratios: Sequence[float] = (0.25, 0.5, 0.75),
    config: PruneConfig | None = None,
    example: Any = None,
    *,
    samples: int = 512,
    path: str | os.PathLike[str] | None = None,
) -> Sensitivity:
    """Prune each group of coupled layers alone, by each ratio, and see what accuracy is left without training.

    Args:
        model: a classifier; it stays as it is.
        data: batches (x, y) of inputs and class indices, of samples that nothing is reported on.
        ratios: shares of a group's channels to remove, in (0, 1).
        config: of which ``criterion``, ``ignored``, ``round_to`` and ``attention`` count.
        example: as for :func:`workbench.compress.prune`; by default, the data's.
        samples: evaluated, the first of the data.
        path: a file that keeps each row as it is found, and from which an interrupted sweep of the same model goes on.

    Raises:
        ConfigError: a ratio out of range, or a file of another model or sweep.
        DataError: data that isn't batches of inputs and class indices.
        ModelError: nothing can be pruned.
    """
    import pandas as pd

    check_module(model)
    config = PruneConfig.checked(config)
    asked = sorted(set(ratios))
    if not asked or not all(0 < ratio < 1 for ratio in asked):
        raise ConfigError(f"ratios={list(ratios)} must lie between 0 and 1.", "Pass e.g. (0.25, 0.5, 0.75).")
    batches = batches_of(data, samples, next(model.parameters()).device)
    if any(y.is_floating_point() or y.dim() != 1 for _, y in batches):
        raise DataError("The targets aren't class indices.", "Sweep a classifier, with one index a sample.")
    plan = Plan(model, config, batches[0][0] if example is None else example, batches)
    if not plan.groups:
        raise ModelError(f"None of the layers of {type(model).__name__} can be pruned.", "Ignore fewer layers.")
    kept = _Kept(None if path is None else Path(path), model, config, batches)
    whole = kept.row("", 0.0) or kept.add({"layer": "", "asked": 0.0, "accuracy": _accuracy(plan.source, batches)})
    parameters, macs = count_parameters(plan.source), count_macs(plan.source, plan.x)
    rows = []
    for index, group in enumerate(plan.groups):
        for ratio in asked:
            count = group.removable(round(ratio * len(group.units)))
            if not count:
                continue
            row = kept.row(group.layers[0], ratio)
            if row is None:
                units = plan.ranking.order[index][:count]
                cuts: Cuts = [(group.name, group.is_out, sorted(c for unit in units for c in group.units[unit]))]
                trial = cut(plan.source, plan.x, cuts, plan.heads).eval()
                row = kept.add(
                    {
                        "layer": group.layers[0],
                        "asked": ratio,
                        "layers": len(group.layers),
                        "ratio": count / len(group.units),
                        "accuracy": _accuracy(trial, batches),
                        "parameters": 1 - count_parameters(trial) / parameters,
                        "macs": 1 - count_macs(trial, plan.x) / macs,
                    }
                )
            rows.append({**row, "drop": whole["accuracy"] - row["accuracy"]})
    return Sensitivity(pd.DataFrame(rows), whole["accuracy"], sum(len(x) for x, _ in batches))


def _accuracy(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    with torch.inference_mode():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    return right / sum(len(x) for x, _ in batches)


class _Kept:
    """Rows found so far, one JSON line each in a file whose first line says of what; a torn last line is dropped."""

    def __init__(
        self, path: Path | None, model: nn.Module, config: PruneConfig, batches: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        self.path = path
        self.rows: dict[tuple[str, float], dict[str, Any]] = {}
        if path is None:
            return
        of = {"of": _digest([*model.state_dict().values(), *(part for batch in batches for part in batch)], config)}
        if path.is_dir():
            raise ConfigError(f"{str(path)!r} is a folder.", "Pass a file in it, e.g. sensitivity.jsonl.")
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        if not lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(of) + "\n", encoding="utf-8")
        elif json.loads(lines[0]) != of:
            raise ConfigError(f"{str(path)!r} is of another model, data or settings.", "Pass another file, or remove it.")
        else:
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        for line in lines[1:]:
            row = json.loads(line)
            self.rows[row["layer"], row["asked"]] = row

    def row(self, layer: str, ratio: float) -> dict[str, Any] | None:
        return self.rows.get((layer, ratio))

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        return row


def _digest(tensors: Sequence[Tensor], config: PruneConfig) -> str:
    digest = hashlib.sha256(config.to_yaml().encode())
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
