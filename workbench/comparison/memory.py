"""Peak memory of a form, by PyTorch's own allocators.

The resident set of a process says little on a CPU: imports and compiling leave hundreds of megabytes behind. The allocator knows
every tensor, so the same definition holds on CPU and GPU: the model's tensors, what compiling keeps beside them (packed copies of
the weights), and the most that one call holds on top.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.comparison.forms import Form, tensor_bytes


def peak_bytes(form: Form, x: Tensor) -> int:
    """Bytes of ``form`` while it runs on ``x`` (N, ...), without ``x`` itself; its first call there is this one."""
    measure = _on_cuda if x.is_cuda else _on_cpu
    kept, _ = measure(lambda: form.call(x))
    _, most = measure(lambda: form.call(x))
    return tensor_bytes(form.model) + max(0, kept) + most


def _on_cpu(call: Callable[[], Any]) -> tuple[int, int]:
    """(bytes still held after a call, most held during it), of what it allocated."""
    from torch._C._profiler import _EventType
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it writes of its starts and stops to the terminal
    with _errors_only(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
        gc.collect()  # what compiling left in circles isn't kept
    changes: list[tuple[int, int]] = []
    waiting = list(profiler.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag == _EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    held = most = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        held += change
        most = max(most, held)
    return held, most


def _on_cuda(call: Callable[[], Any]) -> tuple[int, int]:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before


@contextmanager
def _errors_only() -> Iterator[None]:
    """Keep to itself what PyTorch's C++ side warns of: that blocks from before the profile are freed in it."""
    try:
        level = ctypes.c_int.in_dll(ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so")), "FLAGS_caffe2_log_level")
    except (OSError, ValueError):  # another platform names it otherwise
        yield
        return
    before, level.value = level.value, 2
    try:
        yield
    finally:
        level.value = before
