"""What a run changes of the process that it trains in, and gives back: a notebook's kernel is not ours."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from workbench.distributed import World
from workbench.training.checkpoint import random_state, set_random_state
from workbench.training.config import TrainConfig
from workbench.training.control import Control


@contextmanager
def flags(config: TrainConfig, world: World) -> Iterator[None]:
    """PyTorch's switches as the config wants them; they and the random generators are given back as they were."""
    generators = random_state(*world.devices)
    benchmark, deterministic = torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not config.deterministic
    try:
        yield
    finally:
        set_random_state(generators, *world.devices)
        torch.backends.cudnn.benchmark = benchmark
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32


@contextmanager
def interruptible(control: Control) -> Iterator[None]:
    """The first Ctrl-C stops the run in order, after the present step; a second one interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, before)
        control.post("stop")

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
