"""The one configuration of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from workbench.config import Config, hint
from workbench.data.config import DataConfig
from workbench.losses import LossConfig
from workbench.models.config import ModelConfig
from workbench.optim_config import ClipConfig, OptimConfig, ScheduleConfig
from workbench.probes.config import ProbesConfig
from workbench.regularizers import PENALTIES
from workbench.training.balance_config import BalanceConfig
from workbench.training.communication_config import CommunicationConfig
from workbench.training.distillation_config import DistillConfig
from workbench.training.memory_config import MemoryConfig
from workbench.training.mesh_config import MeshConfig


class CheckpointConfig(Config):
    """When the run's state is saved. It is always saved on request and when a run is stopped."""

    every_epochs: int = Field(1, ge=0, description="Epochs between checkpoints; 0 for none by epoch.")
    every_steps: int = Field(0, ge=0, description="Optimizer steps between checkpoints; 0 for none by step.")
    keep: int = Field(2, ge=1, description="Checkpoints kept, the newest.")


class TrainConfig(Config):
    """Everything that decides a training run. Two runs of one config on one device are equal bit for bit.

    Example:
        >>> TrainConfig(data={"name": "digits"}, model={"name": "resnet20"}, epochs=3, optim={"name": "sgd", "lr": 0.1})
    """

    kind: ClassVar[str] = "train"

    data: DataConfig = Field(DataConfig(), description="The data and its batches.")
    model: ModelConfig = Field(ModelConfig(), description="The model.")
    loss: LossConfig = Field(LossConfig(), description="The loss.")
    optim: OptimConfig = Field(OptimConfig(), description="The optimizer.")
    schedule: ScheduleConfig = Field(ScheduleConfig(), description="Learning rate over the run.")
    clip: ClipConfig = Field(ClipConfig(), description="Gradient clipping.")

    ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Decay per optimizer step of a running average of the weights, which is evaluated and kept in their place, "
        "e.g. 0.999; 0 for none.",
        json_schema_extra=hint(advanced=True),
    )

    distill: DistillConfig | None = Field(None, description="A teacher to learn from.", json_schema_extra=hint(advanced=True))
    penalties: dict[str, Annotated[float, Field(ge=0)]] = Field(
        {},
        description="Penalties on the weights and their factors, added to the loss, e.g. {slimming: 1e-4} before pruning.",
        json_schema_extra=hint(choices="penalties", advanced=True),
    )

    epochs: int = Field(3, ge=1, le=100_000, description="Passes over the training samples.")
    max_steps: int | None = Field(
        None,
        ge=1,
        description="End after so many optimizer steps, though epochs are left.",
        json_schema_extra=hint(advanced=True),
    )
    precision: Literal["auto", "fp32", "tf32", "fp16", "bf16", "fp8"] = Field(
        "auto",
        description="Arithmetic of matrix products and convolutions; weights stay fp32. fp8: large linear layers', the rest "
        "bf16, to be compiled. auto: bf16 where an accelerator has it; long runs measure what is faster.",
    )
    compile: Literal["auto", "off", "default", "reduce-overhead", "max-autotune"] = Field(
        "off",
        description="torch.compile the model: off, or a mode; auto: captured graphs on an accelerator, for long runs.",
    )
    channels_last: bool = Field(
        True,
        description="Store images and convolution weights channels-last, as tensor cores and CPUs prefer.",
        json_schema_extra=hint(advanced=True),
    )
    accumulate: int = Field(1, ge=1, description="Micro-steps per optimizer step: each takes its share of data.batch_size.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to train; auto: CUDA if there is any.")
    mesh: MeshConfig = Field(MeshConfig(), description="How ranks share the work.", json_schema_extra=hint(advanced=True))
    balance: BalanceConfig = Field(
        BalanceConfig(), description="How ranks of unequal speed share a batch.", json_schema_extra=hint(advanced=True)
    )
    memory: MemoryConfig = Field(
        MemoryConfig(), description="How a step's memory is kept down.", json_schema_extra=hint(advanced=True)
    )
    communication: CommunicationConfig = Field(
        CommunicationConfig(), description="How copies exchange their gradients.", json_schema_extra=hint(advanced=True)
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Of weights, order, augmentation and dropout.")
    deterministic: bool = Field(
        False,
        description="Only algorithms that repeat bit for bit (slower on CUDA; CPUs repeat anyway).",
        json_schema_extra=hint(advanced=True),
    )

    probes: ProbesConfig = Field(ProbesConfig(), description="What the Inspector reads.", json_schema_extra=hint(advanced=True))
    checkpoint: CheckpointConfig = Field(
        CheckpointConfig(), description="When the state is saved.", json_schema_extra=hint(advanced=True)
    )
    log_every: int = Field(
        10,
        ge=1,
        description="Optimizer steps per line of the journal; it holds the loss of every one.",
        json_schema_extra=hint(advanced=True),
    )
    eval_every: int = Field(
        1, ge=0, description="Epochs between evaluations; 0 only at the end.", json_schema_extra=hint(advanced=True)
    )
    label: str = Field("", max_length=60, description="Name for people; by default model and data.")

    @field_validator("compile", mode="before")
    @classmethod
    def _yes_or_no(cls, value: Any) -> Any:
        return {True: "default", False: "off"}.get(value, value) if isinstance(value, bool) else value

    @field_validator("penalties")
    @classmethod
    def _penalties_are_known(cls, penalties: dict[str, float]) -> dict[str, float]:
        for name in penalties:
            PENALTIES.check(name)
        return penalties

    @property
    def title(self) -> str:
        """The label, or model and data."""
        return self.label or "-".join(Path(part.name.rpartition(":")[2]).stem for part in (self.model, self.data))
