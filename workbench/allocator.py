"""What PyTorch's own allocators hold: while a call runs, and of a model.

The resident set of a process says little on a CPU: imports and compiling leave hundreds of megabytes behind. The allocator knows
every tensor, so one definition holds on CPU and GPU.
"""

from __future__ import annotations

import ctypes
import gc
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Held(NamedTuple):
    """Bytes that a call allocated: ``kept`` after it, ``most`` at once during it."""

    kept: int
    most: int


def held_by(call: Callable[[], Any], device: torch.device, *, clean: bool = True) -> Held:
    """What ``call`` allocates on ``device``, over what was there before.

    Args:
        clean: on a CPU, what is left in circles (by compiling, say) does not count as kept.
    """
    return _on_cuda(call) if device.type == "cuda" else _on_cpu(call, clean)


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of the storages behind a model's parameters and buffers, each once."""
    tensors = [tensor.data for tensor in model.state_dict().values() if isinstance(tensor, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for tensor in tensors for storage in storages(tensor)}.values())


def storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """The storages behind a tensor: of this rank's part of one that is spread over ranks; several behind a quantized one."""
    if hasattr(tensor, "__tensor_flatten__"):
        parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        for part in parts:
            if isinstance(part, Tensor):  # else what the parts are spread over
                yield from storages(part)
    else:
        yield tensor.untyped_storage()


def room(device: torch.device) -> int:
    """Bytes that this process may still allocate on ``device``, what its allocator has cached included."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        used = torch.cuda.memory_allocated(device)
        share = int(total * torch.cuda.get_per_process_memory_fraction(device))
        return min(free + torch.cuda.memory_reserved(device), share) - used
    import psutil

    found = [psutil.virtual_memory().available]
    process = psutil.Process()
    with suppress(ImportError):  # not on Windows
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            found.append(limit - process.memory_info().vms + _free_in_heap())
    with suppress(OSError, ValueError):  # a container's limit; the word "max" where there is none
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        found.append(limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return max(0, min(found))


def ran_out(error: BaseException) -> bool:
    """Whether this error says that memory is exhausted, a device's or the process's."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def forget(error: BaseException) -> None:
    """Let go of what the frames of an error hold, and of what the allocator has cached, so that there is room again."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
    give_back()


def give_back() -> None:
    """Collect what is held only in circles, and return what allocators have cached, for other processes."""
    gc.collect()
    trim()


def trim() -> None:
    """Return what allocators have cached: kept in pieces, it is in the way of larger blocks."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _on_cpu(call: Callable[[], Any], clean: bool) -> Held:
    from torch._C._profiler import _EventType
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it writes of its starts and stops to the terminal
    with _errors_only(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
        if clean:
            gc.collect()
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
    return Held(held, most)


def _on_cuda(call: Callable[[], Any]) -> Held:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return Held(torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before)


def _free_in_heap() -> int:
    """Bytes that the C library keeps for this process to use again (glibc 2.33 and later)."""

    class Info(ctypes.Structure):
        _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
        _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]

    try:
        read = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):
        return 0
    read.restype = Info
    return int(read().fordblks)


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
