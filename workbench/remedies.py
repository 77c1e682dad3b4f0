"""Applying a finding's advice: :func:`apply` changes the running job where that can be, else starts a new run; :class:`Applied`.

What a running job takes between two steps is :data:`workbench.commands.LIVE`: peak rate, weight decay, clipping. Anything else
needs a new run. It goes on from the old one's last checkpoint, with weights, optimizer, random states and step, where the changes
leave all of that as it is (:data:`KEEP`) and the fault is none that spoils weights (:data:`SPOILS`); else it starts from scratch.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from workbench import launcher
from workbench.commands import LIVE
from workbench.diagnosis import config_now
from workbench.errors import RunError
from workbench.events import Finding
from workbench.registry import find_source
from workbench.run import TERMINAL, Run
from workbench.training import TrainConfig, prepare
from workbench.training.sources import as_kept, write_remedy

KEEP = ("clip.", "schedule.", "communication.", "balance.", "memory.", "probes.", "checkpoint.")
"""Beginnings of settings that can change while weights, optimizer state and the order of samples go on; and settings:"""
KEEP_TOO = ("optim.lr", "precision", "compile", "data.placement", "data.workers", "log_every", "eval_every")

SPOILS = frozenset(
    {"non_finite_loss", "non_finite_gradients", "non_finite_activations", "diverging_loss", "exploding_gradients"}
    | {"dead_activations", "saturated_activations", "overfitting", "rate_too_high", "noisy_loss"}
)
"""Findings after which the weights are not worth going on from."""


@dataclass(frozen=True)
class Applied:
    """What :func:`apply` did.

    Attributes:
        run: that has the changes now: the one given, or a new one.
        how: ``live``: set in the running job; ``checkpoint``: a new run goes on from the last checkpoint; ``scratch``: a new run.
        changes: the config overrides.
        words: the same in a sentence.
    """

    run: Run
    how: Literal["live", "checkpoint", "scratch"]
    changes: Mapping[str, Any]
    words: str

    def __str__(self) -> str:
        return self.words


def apply(run: Run, finding: Finding | Mapping[str, Any]) -> Applied:
    """Apply a remedy to a run, by one click or one call; returns at once.

    A run in training takes what it can take after its present step; its journal says when (``CommandApplied``). Otherwise a new
    run starts, in as many processes as the old one had, and says where it comes from; the old one is left as it is.

    Args:
        finding: its first remedy is applied; or config overrides, e.g. one of ``finding.alternatives``.

    Raises:
        RunError: the finding has no remedy, or the new run cannot be started.
        ConfigError: an override is not a setting of the run's config.

    Example:
        >>> for finding in findings_of(run):
        ...     print(apply(run, finding))
    """
    name, changes = (finding.name, finding.remedy) if isinstance(finding, Finding) else ("", dict(finding))
    if not changes:
        raise RunError(f"No setting cures {name or 'that'}.", "Its message says what to look for.")
    config = cast(TrainConfig, config_now(run).override(changes))
    told = " ".join(f"{key}={value}" for key, value in changes.items())
    status = run.status
    if status in ("starting", "running", "paused", "hung") and all(key in LIVE for key in changes):
        run.set(**{LIVE[key]: value for key, value in changes.items()})
        return Applied(run, "live", changes, f"Set {told} in the running {run.id}, from its next step on.")
    checkpoint = run.checkpoints[-1] if run.checkpoints and status != "finished" else None
    goes_on = checkpoint is not None and name not in SPOILS and all(_keeps(key) for key in changes)
    new = _prepared(run, config)
    if goes_on and checkpoint is not None:
        shutil.copytree(checkpoint, new.path / "checkpoints" / checkpoint.name)
        how: Literal["checkpoint", "scratch"] = "checkpoint"
        start = f"from step {checkpoint.name.removeprefix('step-')} of {run.id}, with its weights and optimizer state"
    else:
        how, start = "scratch", "from scratch"
    running = "" if status in TERMINAL else f" {run.id} goes on as it is; stop it where they share a device."
    write_remedy(new.path, run.id, f"This run cures {name or 'a finding'} of {run.id} by {told}; it began {start}.")
    attempt = launcher.Attempt.latest(run.path)
    launcher.spawn(new.path, attempt.nproc if attempt is not None else 1)
    return Applied(new, how, changes, f"Started {new.id} with {told}, {start}.{running}")


def _keeps(setting: str) -> bool:
    return setting in KEEP_TOO or setting.startswith(KEEP)


def _prepared(run: Run, config: TrainConfig) -> Run:
    """A new folder beside the run's, made from the files that the run keeps."""
    found = {f"{part}.name": find_source(getattr(config, part).name, run.path) for part in ("model", "data")}
    found["mesh.plan"] = find_source(config.mesh.plan, run.path)
    if config.distill is not None:
        found["distill.teacher"] = find_source(config.distill.teacher, run.path)
    return prepare(as_kept(config, run.path).override(found), root=run.path.parent)
