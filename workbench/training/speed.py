"""Precision and compilation chosen by short measurements, where the run is long enough to pay for them.

Steps are real ones, undone afterwards (:class:`~workbench.training.trial.Trial`), on every rank at once; what is decided holds
for all, as fast as the slowest. Before anything is measured, :mod:`~workbench.training.decisions` decides by rule.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.distributed as dist

from workbench.distributed import World
from workbench.training.compilation import compile_whole
from workbench.training.decisions import Decisions
from workbench.training.trial import Setting, Trial

MEASURED_FROM = 500
"""Steps of a run from which on anything is measured for it."""
PAYS = 60.0
"""Seconds that a run must be expected to take before precisions are measured for it."""
COMPILES = 240.0
"""Seconds that it must be expected to take before it is compiled, which takes about a minute."""
WORTH = 1.3
"""How many times as fast less exact arithmetic, or compiled steps, must be to be taken."""


def measured_precision(trial: Trial, rule: str, steps: int, accumulate: int, world: World, decided: Decisions) -> str:
    """The most exact precision within :data:`WORTH` of the fastest; ``rule``'s for a short run.

    FP8 is one of them if the trial has a choice of layers for it.

    Args:
        trial: of a batch in fp32.
        steps: of the run.
    """
    setting = Setting(rule, parts=accumulate)
    usual = _seconds(trial, setting, world)
    if not usual * steps > PAYS:
        reason = f"{decided.made['precision']['reason']}; a run of about {usual * steps:.0f} s doesn't pay for measuring others"
        decided.revise("precision", rule, reason)
        return rule
    others: tuple[str, ...] = ("fp32", "bf16") if trial.device.type == "cpu" else ("fp32", "tf32", "bf16")
    others += ("fp8",) if trial.choice is not None and trial.choice.layers else ()
    times = {name: usual if name == rule else _seconds(trial, replace(setting, precision=name), world) for name in others}
    fastest = min(times.values())
    chosen = next(name for name, seconds in times.items() if seconds <= WORTH * fastest)
    told = ", ".join(f"{name} {1000 * seconds:.3g} ms" for name, seconds in times.items())
    decided.revise("precision", chosen, f"a step takes {told}: the most exact within {WORTH} × the fastest")
    return chosen


def measured_compile(
    trial: Trial, mode: str, precision: str, steps: int, accumulate: int, world: World, decided: Decisions
) -> str:
    """``mode`` if a run is long enough for it and its steps are :data:`WORTH` times as fast, else ``off``.

    The objective is compiled afterwards if so, and need not be compiled again.

    Args:
        steps: of the run.
    """
    setting = Setting(precision, parts=accumulate)
    eager = _seconds(trial, setting, world)
    if not eager * steps > COMPILES:
        decided.revise("compile", "off", f"a run of about {eager * steps:.0f} s doesn't pay for a minute of compiling")
        return "off"
    compile_whole(trial.objective, mode)
    compiled = _seconds(trial, replace(setting, compiled=True), world)
    told = f"a step takes {1000 * eager:.3g} ms, compiled ({mode}) {1000 * compiled:.3g} ms"
    if compiled * WORTH <= eager:
        decided.revise("compile", mode, told)
        return mode
    trial.objective._compiled_call_impl = None
    decided.revise("compile", "off", f"{told}: not {WORTH} × as fast")
    return "off"


def measured_fp8(trial: Trial, mode: str, precision: str, steps: int, accumulate: int, world: World, decided: Decisions) -> str:
    """``fp8`` if a run of compiled steps is long enough for another compilation, and they are :data:`WORTH` times as fast.

    Eager steps round tensors to FP8 one operation at a time, which takes more than it gives: they decide nothing here. If it is
    ``fp8``, the objective is compiled afterwards.

    Args:
        trial: with a choice of layers.
        mode: of torch.compile.
        precision: what it is otherwise.
        steps: of the run.
    """
    setting = Setting(precision, parts=accumulate, compiled=True)
    usual = _compiled(trial, setting, mode, world)
    reason = decided.made["precision"]["reason"]
    if not usual * steps > COMPILES:
        short = f"a run of about {usual * steps:.0f} s, compiled, doesn't pay for compiling in FP8 too"
        decided.revise("precision", precision, f"{reason}; {short}")
        return precision
    eighth = _compiled(trial, replace(setting, precision="fp8"), mode, world)
    told = f"a compiled step takes {1000 * usual:.3g} ms in {precision}, {1000 * eighth:.3g} ms in fp8"
    if eighth * WORTH <= usual:
        decided.revise("precision", "fp8", told)
        return "fp8"
    trial.objective._compiled_call_impl = None
    decided.revise("precision", precision, f"{reason}; {told}: not {WORTH} × as fast")
    return precision


def _compiled(trial: Trial, setting: Setting, mode: str, world: World) -> float:
    compile_whole(trial.objective, mode)
    return _seconds(trial, setting, world)


def _seconds(trial: Trial, setting: Setting, world: World) -> float:
    """Of a step, on the slowest rank; infinite where it doesn't fit."""
    with trial.unchanged():
        cost = trial.measure(len(trial.batch[0]), setting, timed=True)
    seconds = torch.tensor(math.inf if cost is None else cost.seconds, dtype=torch.float64, device=world.device)
    if world.size > 1:
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)
