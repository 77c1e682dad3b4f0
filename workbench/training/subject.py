"""What a rank trains: a model on its devices and its batches, in a place of the mesh."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from workbench.data.batches import Batches, Target
from workbench.data.order import Shard, derive_seed
from workbench.data.splits import Splits, load_splits
from workbench.distributed import World
from workbench.models import build_model
from workbench.models.structure import lay_out
from workbench.training.balance import first_shares
from workbench.training.checks import check_mesh, check_model
from workbench.training.config import TrainConfig
from workbench.training.decisions import Decisions, decide_placement, decide_precision
from workbench.training.mesh import Mesh
from workbench.training.padding import settle_padding
from workbench.training.placement import check_precision, place_layers
from workbench.training.precision import Precision


@dataclass
class Subject:
    """What a rank trains.

    Attributes:
        model: whole, until it is divided over the mesh.
        precision: as settled so far.
        total_steps: optimizer steps of the run.
    """

    model: nn.Module
    batches: Batches
    mesh: Mesh
    precision: Precision
    total_steps: int

    @property
    def world(self) -> World:
        return self.mesh.world

    @property
    def whole(self) -> bool:
        """Whether this rank holds all of the model, on one device."""
        return self.mesh.plain and not self.world.others


def load_subject(config: TrainConfig, folder: Path, world: World, decided: Decisions, data: Any = None) -> Subject:
    """Data and model, placed as the config says and checked against one another.

    Args:
        folder: of the run, which relative names are looked up in.
        data: splits or torch datasets in place of the config's data.

    Raises:
        WorkbenchError: they aren't there, or do not go together with one another, the mesh or the device.
    """
    splits = load_splits(config.data, data, root=folder)
    precision = Precision(decide_precision(config, world.device, decided), *world.devices)
    torch.manual_seed(derive_seed(config.seed))
    model = build_model(fit_to_data(config, splits), root=folder)
    mesh = Mesh(config.mesh.arranged(world.size), world)
    check_mesh(config, mesh, precision)
    check_precision(precision.name, world)
    images = len(splits.sample_shape) == 3
    splits = settle_padding(config.data, model, splits, world.device, precision.dtype, decided)
    place_layers(model, config, world, decided)
    # Parts of a model are rows of contiguous weights.
    channels_last = config.channels_last and images and mesh.plain and lay_out(model, world.device)
    batches = _batches(config, splits, mesh, Target(world.device, precision.dtype, channels_last), decided)
    check_model(model, batches, config, precision)
    total_steps = min(config.epochs * batches.steps_per_epoch, config.max_steps or 10**12)
    return Subject(model, batches, mesh, precision, total_steps)


def _batches(config: TrainConfig, splits: Splits, mesh: Mesh, target: Target, decided: Decisions) -> Batches:
    shares = first_shares(config, mesh.sizes, mesh.world, config.compile, decided)
    shard = Shard(mesh.copy, mesh.copies, config.accumulate, shares)
    placement = decide_placement(config, splits, target.device, decided)
    return Batches(splits, config.data.override({"placement": placement}), shard, target, config.seed)


def fit_to_data(config: TrainConfig, splits: Splits) -> Any:
    """The model's config with classes and input channels filled in from the data."""
    values = config.model.model_dump()
    if values["num_classes"] is None:
        values["num_classes"] = splits.num_classes
    shape = splits.sample_shape
    if values["in_channels"] is None and len(shape) == 3:
        values["in_channels"] = shape[0]
    if values["in_channels"] is None and len(shape) == 2 and splits.first_input.is_floating_point():
        values["in_channels"] = shape[1]  # a series [L, F]
    return type(config.model)(**values)
