"""Latency on the device at hand: calls timed in turns, so that a busy moment hits all of them alike.

* :func:`latency_of` — milliseconds of each call, round by round.
* :func:`ratio_of` — how much faster or slower one is than another, by the median over rounds.
* :func:`floor_ratio_of` — the same by each one's fastest rounds, for deciding on a busy machine.
* :func:`timed_call` — a model as one of these calls: eager, compiled, or captured as a CUDA graph.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from workbench.compress.capture import Captured
from workbench.compress.compilation import compiled, has_compiler
from workbench.errors import ConfigError

_WARM_UP = 3
"""Calls before the first timed one: the first may compile, the others settle caches and clocks."""


def latency_of(calls: Mapping[str, Callable[[], Any]], rounds: int = 30, seconds: float = 2.0) -> dict[str, list[float]]:
    """Time ``calls`` in turns: once each a round, in an order that turns round by round, so that none always follows another.

    Work on CUDA devices is waited for before and after each call. Garbage isn't collected within a round.

    Args:
        calls: functions of no argument, by name.
        rounds: rounds at most.
        seconds: no round is begun after so long, except the first three. Warming up (three calls each) isn't counted.

    Returns:
        Milliseconds by name, one a round; all lists have the same length, and the same position means the same round.

    Raises:
        ConfigError: no round is asked for.
    """
    if rounds < 1:
        raise ConfigError(f"rounds={rounds} times nothing.", "Ask for at least one.")
    wait = _synchronizer()
    for call in calls.values():
        for _ in range(_WARM_UP):
            call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        for done in range(rounds):
            if done >= 3 and time.perf_counter() > end:
                break
            for name in order:
                wait()
                start = time.perf_counter_ns()
                calls[name]()
                wait()
                taken[name].append((time.perf_counter_ns() - start) / 1e6)
            order = order[1:] + order[:1]
    finally:
        if collects:
            gc.enable()
    return taken


def ratio_of(times: Sequence[float], baseline: Sequence[float]) -> float:
    """How long ``times`` take relative to ``baseline``: the median over rounds of their ratio in the same round.

    A slow spell of the machine slows both of a round, and a hiccup in one round moves a median little.
    """
    return statistics.median(one / other for one, other in zip(times, baseline, strict=True))


def floor_ratio_of(times: Sequence[float], baseline: Sequence[float]) -> float:
    """How long ``times`` take relative to ``baseline``, by the mean of the fastest quarter of each.

    Other work on the machine only adds time, so the fastest rounds are those that it disturbed least.
    """

    def floor(values: Sequence[float]) -> float:
        return statistics.fmean(sorted(values)[: max(1, len(values) // 4)])

    return floor(times) / floor(baseline)


Form = Literal["auto", "eager", "compiled"]


def timed_call(
    model: nn.Module, x: torch.Tensor, form: Form = "auto", dtype: torch.dtype = torch.float32
) -> tuple[Callable[[], Any], str]:
    """A call of ``model`` on ``x`` to time, and what it is: ``"eager"``, ``"compiled"`` or ``"captured"``.

    Args:
        model: on the device of ``x``, in evaluation mode.
        form: auto compiles on a CPU with a compiler, and captures the eager calls as a graph on CUDA.
        dtype: ``torch.bfloat16`` runs under autocast.
    """
    captures = x.is_cuda and form == "auto"
    if form == "compiled" or (form == "auto" and not captures and has_compiler()):
        fast = compiled(model, dtype)
        return lambda: fast(x), "compiled"
    lower = dtype != torch.float32

    def eager(given: torch.Tensor) -> Any:
        # Autocast's cache of weights would be freed between captured calls.
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=lower, cache_enabled=not captures):
            return model(given)

    if captures:
        captured = Captured(eager)
        return lambda: captured(x), "captured"
    return lambda: eager(x), "eager"


def _synchronizer() -> Callable[[], None]:
    return torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
