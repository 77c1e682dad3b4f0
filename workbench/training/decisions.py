"""What ``auto`` becomes: decided once per run, written to ``resolved.yaml`` with the reason, reused when the run goes on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from workbench.data.splits import Arrays, Splits
from workbench.errors import DeviceError
from workbench.storage import write_atomic
from workbench.training import fp8
from workbench.training.config import TrainConfig

LIGHT = ("memory", "communication")
"""Probes whose reading costs next to nothing: they keep to their interval."""
MOST = 200
"""Readings over a run that tell enough of it: cheaper ones would only fill the disk."""


@dataclass
class Decisions:
    """Values by dotted setting, each with its reason."""

    made: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._before = frozenset(self.made)

    def asked(self, name: str, wanted: Any) -> bool:
        """Whether a setting is left to auto, and no earlier attempt decided it."""
        return bool(wanted == "auto" and name not in self._before)

    def decide(self, name: str, value: Any, reason: str) -> Any:
        """``value``, or what was decided before under this name."""
        return self.made.setdefault(name, {"value": value, "reason": reason})["value"]

    def revise(self, name: str, value: Any, reason: str) -> None:
        """What was decided no longer holds: ``value`` from now on."""
        self.made[name] = {"value": value, "reason": reason}

    def write(self, folder: Path) -> None:
        write_atomic(folder / "resolved.yaml", yaml.safe_dump(self.made, sort_keys=False))


def decide_precision(config: TrainConfig, device: torch.device, decisions: Decisions) -> str:
    """The precision of the run.

    Raises:
        DeviceError: this device cannot compute in the precision asked for.
    """
    wanted = config.precision
    if "fp8" in (wanted, decisions.made.get("precision", {}).get("value") if wanted == "auto" else None):
        fp8.check_device(device)
        return "fp8"
    if device.type == "cpu":
        if wanted == "tf32":
            raise DeviceError(
                "precision='tf32' needs an NVIDIA GPU of compute capability 8.0 or above.", "Take fp32 or bf16 on a CPU."
            )
        if wanted == "fp16":
            raise DeviceError("precision='fp16' trains on CUDA only: CPUs have no fast fp16 arithmetic.", "Take bf16 or fp32.")
        if wanted == "auto":
            return str(decisions.decide("precision", "fp32", "on a CPU fp32 is exact and never slower than emulated bf16"))
        return wanted
    if wanted == "bf16" and not torch.cuda.is_bf16_supported():
        raise DeviceError(f"{torch.cuda.get_device_name(device)} has no bf16 arithmetic.", "Take fp16 or fp32.")
    if wanted != "auto":
        return wanted
    if torch.cuda.is_bf16_supported():
        return str(decisions.decide("precision", "bf16", "this GPU has bf16 tensor cores, and bf16 needs no loss scaling"))
    return str(decisions.decide("precision", "fp16", "this GPU has no bf16"))


def decide_placement(config: TrainConfig, splits: Splits, device: torch.device, decisions: Decisions) -> str:
    """Where the samples wait: ``device`` or ``loader``."""
    if config.data.placement != "auto":
        return config.data.placement
    if not isinstance(splits.train, Arrays):
        return "loader"
    size = splits.train.nbytes
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        if size > free / 4:
            reason = f"the samples take {size / 2**30:.1f} GiB, over a quarter of the {free / 2**30:.1f} GiB free on the device"
            return str(decisions.decide("data.placement", "loader", reason))
    return str(decisions.decide("data.placement", "device", f"the samples take {size / 2**20:.1f} MiB"))


def decide_compile(
    config: TrainConfig, device: torch.device, total_steps: int, decisions: Decisions, *, captured: bool = True
) -> str:
    """The mode of torch.compile, or ``off``; ``captured``: whether steps can be."""
    if config.compile != "auto":
        return config.compile
    if device.type == "cuda" and total_steps >= 1000 and not captured:
        return str(
            decisions.decide("compile", "default", f"{total_steps} steps on a GPU pay for compiling; these can't be captured")
        )
    if device.type == "cuda" and total_steps >= 1000:
        reason = f"{total_steps} steps on a GPU pay for a minute of compilation; captured graphs free the host"
        return str(decisions.decide("compile", "reduce-overhead", reason))
    if total_steps >= 1000:
        return str(decisions.decide("compile", "default", f"{total_steps} steps may pay for a minute of compilation"))
    return str(decisions.decide("compile", "off", f"{total_steps} steps on {device.type} do not pay for compilation"))


def decide_every(
    name: str, every: int | str, device: torch.device, total_steps: int, steps_per_epoch: int, decisions: Decisions
) -> int:
    """Steps between two readings of a probe: at first, where it is left to auto; :mod:`~workbench.training.budget` goes on.

    Probes that read layers do so on steps that the others read too, so that there are steps with all of them to be timed.
    """
    if every != "auto":
        return int(every)
    setting = f"probes.{name}.every"
    spread = max(1, total_steps // MOST)
    often, rarely = (spread, 5) if device.type == "cpu" else (max(10, spread), 50)
    often = within_epochs(often, steps_per_epoch)
    if name in LIGHT:
        return int(decisions.decide(setting, often, "what is read costs next to nothing"))
    reason = f"until it is measured: on a {device.type.upper().replace('CUDA', 'GPU')} one reading in {rarely} steps or rarer"
    rarely = within_epochs(often * math.ceil(rarely / often), steps_per_epoch, often)
    return int(decisions.decide(setting, rarely, reason))


def within_epochs(every: int, steps_per_epoch: int, grain: int = 1) -> int:
    """``every``, or the next multiple of ``grain`` that is no multiple of an epoch.

    200 readings over 200 epochs would all be of an epoch's last step, with an evaluation between it and the next.
    """
    while every % steps_per_epoch == 0 and grain % steps_per_epoch:
        every += grain
    return every
