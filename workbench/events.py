"""What a run can say: the closed set of events in a run folder's journal.

Each event is one JSON line. ``attempt`` counts the starts of a run (1, 2 …): after a restart from step *n*, whatever an
earlier attempt said of steps after *n* no longer counts. Losses of a window of steps travel in one :class:`Steps`.
"""

from __future__ import annotations

import time
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter


class _Event(BaseModel):
    # Not-a-number as text: as null, the line of an evaluation that gave it would not be read back.
    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="strings")

    durable: ClassVar[bool] = False

    time: float = Field(default_factory=time.time, description="Wall clock, seconds since the epoch.")
    attempt: int = Field(0, description="Which start of the run, from 1; filled in by the journal.")
    step: int = Field(0, description="Optimizer steps completed when this was said.")


class AttemptStarted(_Event):
    """A trainer took over the folder, at ``step``."""

    durable = True

    type: Literal["attempt_started"] = "attempt_started"
    total_steps: int
    steps_per_epoch: int
    world_size: int
    device: str
    parameters: int = Field(description="Trainable parameters of the model.")


class Steps(_Event):
    """The optimizer steps ``first`` … ``step``, one entry a step in each list."""

    type: Literal["steps"] = "steps"
    first: int
    loss: list[float | None] = Field(description="Mean loss of the step's samples, all ranks; null where not finite.")
    lr: list[float]
    epoch: int = Field(description="Epoch of these steps, from 1.")
    samples_per_s: float | None = Field(description="Samples per second over the window, all ranks.")


class Evaluated(_Event):
    """Metrics on held-out data after ``step``."""

    type: Literal["evaluated"] = "evaluated"
    epoch: int
    metrics: dict[str, float]


class ReadingsTimed(_Event):
    """What the probes' readings were found to cost, and how often they come from ``step`` on."""

    type: Literal["readings_timed"] = "readings_timed"
    cost: float = Field(
        ge=0, allow_inf_nan=False, description="Time that a reading adds to its step, as a share of a step without."
    )
    counted: int = Field(description="Readings that this is the median of.")
    every: int = Field(description="Steps from one reading to the next.")
    overhead: float = Field(ge=0, le=1, description="Share of the training time that readings take: cost / (every + cost).")


class CheckpointSaved(_Event):
    """A checkpoint of ``step`` is complete on disk."""

    type: Literal["checkpoint_saved"] = "checkpoint_saved"
    path: str


class CommandApplied(_Event):
    """A command from the folder took effect after ``step`` on every rank."""

    durable = True

    type: Literal["command_applied"] = "command_applied"
    id: str
    name: Literal["stop", "pause", "resume", "save", "set", "snapshot"]
    settings: dict[str, Annotated[float | str, Field(union_mode="left_to_right")]] = Field(
        default_factory=dict, description="For 'set': the new values by name."
    )


class Finding(_Event):
    """Something worth knowing, in words, with what to do about it."""

    type: Literal["finding"] = "finding"
    name: str = Field(description="Short name of the finding, e.g. 'vanishing_gradients'.")
    severity: Literal["info", "warning", "error"]
    message: str
    layer: str | None = None
    remedy: dict[str, Any] = Field(default_factory=dict, description="Config overrides that would cure it.")
    alternatives: tuple[dict[str, Any], ...] = Field((), description="Further remedies, should the first not do, the best first.")

    @property
    def remedies(self) -> tuple[dict[str, Any], ...]:
        """Every remedy, the best first."""
        return (self.remedy, *self.alternatives) if self.remedy else self.alternatives


class Paused(_Event):
    """Training waits, at a step boundary."""

    type: Literal["paused"] = "paused"


class Resumed(_Event):
    """Training goes on after a pause."""

    type: Literal["resumed"] = "resumed"


class Finished(_Event):
    """The last step is done and the model is saved."""

    durable = True

    type: Literal["finished"] = "finished"
    metrics: dict[str, float]


class Stopped(_Event):
    """Stopped on request; a checkpoint of ``step`` was saved."""

    durable = True

    type: Literal["stopped"] = "stopped"


class Failed(_Event):
    """An error ended the attempt."""

    durable = True

    type: Literal["failed"] = "failed"
    error: str = Field(description="Class of the error.")
    message: str
    traceback: str = ""


Event = Annotated[
    AttemptStarted
    | Steps
    | Evaluated
    | ReadingsTimed
    | CheckpointSaved
    | CommandApplied
    | Finding
    | Paused
    | Resumed
    | Finished
    | Stopped
    | Failed,
    Field(discriminator="type"),
]

EVENT: TypeAdapter[Event] = TypeAdapter(Event)
