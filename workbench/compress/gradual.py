"""Pruning in steps with training between: each step removes little, and training mends it before the next.

* :func:`prune_gradually` — the verb; :class:`GradualConfig` — how much by when.
* :class:`GradualResult` — the last model, and the run of each step.

Sparse training first is a run of its own: ``train(TrainConfig(penalties={"slimming": 1e-4}, …))``, then a
``criterion="bn_scale"`` here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from workbench.artefact import STRUCTURE, load_model, save_model
from workbench.compress.gradual_config import GradualConfig
from workbench.compress.plan import Plan
from workbench.compress.pruning_config import PruneConfig
from workbench.compress.sample import one_sample
from workbench.errors import ConfigError
from workbench.models.structure import check_module, structure_of
from workbench.run import Run
from workbench.storage import write_atomic
from workbench.training import TrainConfig, train

if TYPE_CHECKING:
    import pandas as pd

_SETTINGS = "gradual.json"


@dataclass(frozen=True)
class GradualResult:
    """What pruning in steps gave.

    Attributes:
        model: after the last step's training, in evaluation mode; its structure holds one record a step.
        runs: the training of each step, the first to the last.
    """

    model: nn.Module
    runs: list[Run]

    def frame(self) -> pd.DataFrame:
        """One row a step: what it removed in all (a fraction), parameters and MACs left, and the metrics after its training."""
        import pandas as pd

        records = [record for record in structure_of(self.model).transforms if record["kind"] == "prune"][-len(self.runs) :]
        first = records[0]["before"]["parameters"]
        rows = [
            {"step": step, "removed": 1 - record["after"]["parameters"] / first, **record["after"], **dict(run.metrics)}
            for step, (record, run) in enumerate(zip(records, self.runs, strict=True), 1)
        ]
        return pd.DataFrame(rows)


def prune_gradually(
    model: nn.Module,
    config: GradualConfig,
    tune: TrainConfig,
    example: Any = None,
    *,
    data: Any = None,
    batches: Any = None,
    folder: str | os.PathLike[str] | None = None,
) -> GradualResult:
    """Prune to ``config.ratio`` in ``config.steps`` steps, each followed by training; the given model stays as it is.

    Args:
        config: what to remove in all, and how fast.
        tune: the training after each step.
        example: as for :func:`workbench.compress.prune`.
        data: in place of ``tune.data``, as for :func:`workbench.train`.
        batches: (x, y) pairs for a criterion that looks at data.
        folder: where each step's model and run are kept. The same call with the same folder goes on after the last step that
            was finished; without a folder, runs lie below ``WORKBENCH_RUNS`` and nothing is resumed.

    Raises:
        ConfigError: the folder belongs to other settings or another model.
        WorkbenchError: as of :func:`workbench.compress.prune` and :func:`workbench.train`.
    """
    check_module(model)
    config = GradualConfig.checked(config)
    root = None if folder is None else Path(folder)
    if root is not None:
        _claim(root, model, config, tune)
    x = one_sample(model, example)
    current, runs = model, []
    for number, step in enumerate(_schedule(config), 1):
        place = None if root is None else root / f"step-{number}"
        if place is not None and (place / "model" / STRUCTURE).exists():
            current = _load(place / "model", model)
            runs.append(Run.open(place / json.loads((place / "run.json").read_text())["run"]))
            continue
        settings = {**config.model_dump(), "ratio": step.ratio, "ratios": step.ratios}
        settings = {name: settings[name] for name in PruneConfig.model_fields}
        plan = Plan(current, PruneConfig(**settings), x, batches, original=model)  # so that what steps miss doesn't add up
        current = plan.apply(*plan.search())
        result = train(tune, model=current, data=data, root=place)
        current = result.model.eval()
        runs.append(result.run)
        if place is not None:
            write_atomic(place / "run.json", json.dumps({"run": result.run.path.name}))
            save_model(current, place / "model", weights_only=True)  # last: its description says that the step is done
    return GradualResult(current, runs)


@dataclass(frozen=True)
class _Step:
    """The share of the original that is gone after a step, and what single layers lose in it."""

    ratio: float
    ratios: dict[str, float]


def _schedule(config: GradualConfig) -> Iterator[_Step]:
    done_before = 0.0
    for number in range(1, config.steps + 1):
        done = config.progress(number)
        yield _Step(
            config.ratio * done,
            {name: 1 - (1 - share * done) / (1 - share * done_before) for name, share in config.ratios.items()},
        )
        done_before = done


def _load(folder: Path, model: nn.Module) -> nn.Module:
    """A step's model; one that nothing says how to build is made from the module that was given."""
    if structure_of(model).model is not None:
        return load_model(folder)
    import copy

    return load_model(folder, model=copy.deepcopy(model))


def _claim(folder: Path, model: nn.Module, config: GradualConfig, tune: TrainConfig) -> None:
    """Note in ``folder`` what it is for, or check that it is for this."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    settings = {"prune": config.model_dump(mode="json"), "tune": tune.model_dump(mode="json"), "weights": digest.hexdigest()}
    file = folder / _SETTINGS
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(settings))
        return
    kept = json.loads(file.read_text(encoding="utf-8"))
    other = [name for name, value in settings.items() if kept.get(name) != value]
    if other:
        raise ConfigError(
            f"{str(folder)!r} was begun with other settings ({', '.join(other)}).", "Pass another folder, or the same settings."
        )
