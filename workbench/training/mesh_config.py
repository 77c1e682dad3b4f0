"""How ranks share the work: the dimensions of the mesh."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from workbench.config import Config, hint
from workbench.errors import ConfigError
from workbench.registry import Registry

Size = Literal["all"] | Annotated[int, Field(ge=1)]

PLANS = Registry("plan of tensor parallelism", {"auto": "workbench.training.tensor_parallel:automatic_plan"})
"""From a model to the styles of its layers by name; see :mod:`workbench.training.tensor_parallel`."""


class MeshConfig(Config):
    """``replicate × shard × tensor × pipeline`` ranks: any product that gives their number."""

    replicate: Size = Field(
        "all",
        description="Copies of the model, each trained on its part of the batch (DDP); all: one for each rank left.",
    )
    shard: Size = Field(
        1,
        description="Ranks over which each copy's weights, gradients and optimizer state are spread (FSDP2): a rank's memory "
        "falls by that factor, and weights travel at each use; all: the ranks left.",
    )
    tensor: Size = Field(
        1,
        description="Ranks that compute each layer together, attention by its heads and MLPs by their width, on the same "
        "samples: two sums over them a block, so within one machine; all: the ranks left.",
    )
    pipeline: Size = Field(
        1,
        description="Stages of consecutive blocks, one after another on ranks of their own; the accumulate micro-steps of a step "
        "flow through them (1F1B), so accumulate should be several times this; all: the ranks left.",
    )
    plan: str = Field(
        "auto",
        description="How mesh.tensor divides the layers: auto for timm's and transformers' models, or module:function, from a "
        "model to {layer: columns | rows | heads}.",
        json_schema_extra=hint(choices="plans", advanced=True),
    )
    devices: dict[str, str] = Field(
        {},
        description="By layer, as a shell pattern of names, the device on which one process computes it: cpu, cuda:0 … E.g. "
        "{blocks.6: cuda:1}: layers not named go with the one before them, the first ones stay on the run's device; of several "
        "patterns the last counts. {} for all on the run's device.",
        json_schema_extra=hint(advanced=True),
    )

    @field_validator("plan")
    @classmethod
    def _plan_is_known(cls, plan: str) -> str:
        return PLANS.check(plan)

    @field_validator("devices")
    @classmethod
    def _devices_are_named(cls, devices: dict[str, str]) -> dict[str, str]:
        for layer, device in devices.items():
            if not re.fullmatch(r"cpu|[a-z]+:\d+", device):
                raise ValueError(f"{layer!r} has {device!r}; a device is cpu, or a kind and a number, e.g. cuda:1")
        return devices

    def arranged(self, ranks: int) -> dict[str, int]:
        """Ranks along each dimension, the slowest first: neighbours exchange most.

        Raises:
            ConfigError: the product doesn't give ``ranks``; or layers are placed by hand, and ranks would share them.
        """
        wanted = {name: getattr(self, name) for name in ("pipeline", "replicate", "shard", "tensor")}
        fixed = math.prod(size for size in wanted.values() if size != "all")
        # Copies are what is left once the model is divided.
        rest = [name for name, size in wanted.items() if size == "all"]
        taker = next((name for name in reversed(rest) if name != "replicate"), "replicate")
        sizes = {name: size if size != "all" else max(1, ranks // fixed) if name == taker else 1 for name, size in wanted.items()}
        if math.prod(sizes.values()) != ranks:
            product = " × ".join(f"{name}={size}" for name, size in sizes.items() if size > 1 or name == "replicate")
            raise ConfigError(
                f"mesh: {product} takes {math.prod(sizes.values())} ranks, and there are {ranks}.",
                f"Launch with nproc={math.prod(sizes.values())}, or set one of them to 'all'.",
            )
        if self.devices and (divided := [name for name in ("shard", "tensor", "pipeline") if sizes[name] > 1]):
            raise ConfigError(
                f"mesh.devices places whole layers, and mesh.{divided[0]}={sizes[divided[0]]} divides them over ranks.",
                "Take one of the two.",
            )
        if ranks > 1 and (taken := [device for device in self.devices.values() if device != "cpu"]):
            raise ConfigError(
                f"mesh.devices names {taken[0]!r}, and each of {ranks} ranks has a GPU: they would take one another's.",
                "Launch with nproc=1: one process drives all devices; or take mesh.pipeline, a rank a stage.",
            )
        return sizes
