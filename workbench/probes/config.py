"""What to read of a model while it trains, and how often."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from workbench.config import Config, hint
from workbench.registry import Registry

PROBES = Registry(
    "probe",
    {
        "gradients": "workbench.probes.gradients:GradientProbe",
        "activations": "workbench.probes.activations:ActivationProbe",
        "memory": "workbench.probes.memory:MemoryProbe",
        "communication": "workbench.probes.communication:CommunicationProbe",
    },
)
"""Probe classes: called with a :class:`ProbeConfig`."""


class ProbeConfig(Config):
    """One probe."""

    every: Literal["auto"] | Annotated[int, Field(ge=0)] = Field(
        "auto", description="Read once in so many optimizer steps; 0 never; auto: as often as probes.overhead allows."
    )
    layers: str = Field(
        "*", description="Names of the layers to read, as a shell pattern, e.g. 'stages.2.*'; several separated by commas."
    )
    kinds: str = Field(
        "*",
        description="Classes of the layers whose outputs to read, as a shell pattern, e.g. 'Conv2d, Linear, *ReLU'.",
        json_schema_extra=hint(advanced=True),
    )


class ActivationProbeConfig(ProbeConfig):
    """The activation probe."""

    moments: Literal["exact", "sampled"] = Field(
        "exact",
        description="exact: means, deviations, extremes of every element; sampled: of the 16,384 elements (4,096 on a CPU) that "
        "histograms are of, at a fraction of the cost.",
        json_schema_extra=hint(advanced=True),
    )


class MemoryProbeConfig(ProbeConfig):
    """The memory probe."""

    snapshot_steps: int = Field(
        0,
        ge=0,
        le=50,
        description="Steps at the start of which, on a GPU, every allocation is recorded and written as a memory snapshot; "
        "0 none. Run.memory_snapshot() asks a running run for one.",
        json_schema_extra=hint(advanced=True),
    )


class ProbesConfig(Config):
    """The Inspector's sources."""

    gradients: ProbeConfig = Field(ProbeConfig(), description="Gradient and weight norms by parameter.")
    activations: ActivationProbeConfig = Field(ActivationProbeConfig(), description="Distribution of each layer's output.")
    memory: MemoryProbeConfig = Field(MemoryProbeConfig(), description="Memory of each rank, and what holds it.")
    communication: ProbeConfig = Field(ProbeConfig(), description="Each rank's work, and its waits for samples and other ranks.")
    overhead: float = Field(
        0.01,
        gt=0,
        le=1,
        description="Share of the training time that readings with every=auto may take, as measured while training; a run is "
        "read about 20 times all the same (see resolved.yaml).",
        json_schema_extra=hint(log=True, advanced=True),
    )
    more: dict[str, ProbeConfig] = Field(
        {}, description="Further registered probes by name.", json_schema_extra=hint(advanced=True)
    )

    def by_name(self) -> dict[str, ProbeConfig]:
        own = ("gradients", "activations", "memory", "communication")
        return {**{name: getattr(self, name) for name in own}, **self.more}
