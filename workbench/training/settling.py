"""Precision and compilation of a run: by rule at first, then by steps of the model itself, where the run pays for them.

They are asked after in turn, for each answer needs what the one before leaves: the precision of eager steps while the model is
whole (:func:`settle_precision`), then with probes and teacher in place whether to compile, and whether compiled steps gain by FP8
(:func:`settle_compile`). The rules are in :mod:`~workbench.training.decisions`, the measurements in
:mod:`~workbench.training.speed`.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from workbench.losses import make_loss
from workbench.training import fp8
from workbench.training.config import TrainConfig
from workbench.training.decisions import Decisions, decide_compile
from workbench.training.fitting import sample_batch
from workbench.training.objective import Objective
from workbench.training.precision import Precision, layers_for_fp8, settle_fp8
from workbench.training.speed import MEASURED_FROM, measured_compile, measured_fp8, measured_precision
from workbench.training.subject import Subject
from workbench.training.trial import Trial


def settle_precision(config: TrainConfig, subject: Subject, decided: Decisions) -> fp8.Choice | None:
    """Measure precisions if they are in question and steps are eager; layers multiply in FP8 from now on if that is the answer.

    Returns:
        The layers that FP8 makes faster, where it is the precision or may become it.

    Raises:
        ModelError: FP8 is asked for, and makes none faster.
    """
    model, batches, world = subject.model, subject.batches, subject.world
    asked = decided.asked("precision", config.precision) and _measurable(config, subject)
    choice = None
    if subject.precision.name == "fp8" or (asked and fp8.lacking(world.device) is None):
        choice = layers_for_fp8(model, batches, subject.precision)
    if asked and config.compile == "off":
        x, y = sample_batch(batches)
        x = x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        trial = Trial(Objective(model, make_loss(config.loss)), (x, y), config.optim, choice=choice)
        name = measured_precision(trial, subject.precision.name, subject.total_steps, config.accumulate, world, decided)
        subject.precision = Precision(name, world.device)
        batches.target = replace(batches.target, dtype=subject.precision.dtype)
    if subject.precision.name == "fp8":
        settle_fp8(model, subject.precision, choice, decided)
    return choice


def settle_compile(
    config: TrainConfig, subject: Subject, objective: Objective, choice: fp8.Choice | None, decided: Decisions
) -> str:
    """The mode of torch.compile, or ``off``; where compiled steps gain by FP8, that is the precision afterwards.

    Args:
        objective: of the subject's model, probes attached.
        choice: the layers that FP8 makes faster, if it is or may become the precision.
    """
    world, steps = subject.world, subject.total_steps
    captured = subject.whole and config.balance.shares != "speed"
    asked = decided.asked("compile", config.compile) and _measurable(config, subject)
    mode = decide_compile(config, world.device, steps, decided, captured=captured)
    if asked and mode != "off":
        trial = Trial(objective, sample_batch(subject.batches), config.optim)
        mode = measured_compile(trial, mode, subject.precision.name, steps, config.accumulate, world, decided)
    if choice is not None and choice.layers and subject.precision.name == "bf16" and mode != "off":
        trial = Trial(objective, sample_batch(subject.batches), config.optim, choice=choice)
        if measured_fp8(trial, mode, "bf16", steps, config.accumulate, world, decided) == "fp8":
            subject.precision = Precision("fp8", world.device)
            settle_fp8(subject.model, subject.precision, choice, decided)
    return mode


def _measurable(config: TrainConfig, subject: Subject) -> bool:
    """Whether a step can be measured here, and the run is long enough for it."""
    return subject.whole and subject.total_steps >= MEASURED_FROM and config.distill is None
