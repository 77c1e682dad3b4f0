"""The CUDA kernel behind :mod:`workbench.training.device_time`. Imported only where there is a CUDA device."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer


@triton.jit
def stamp(out):  # type: ignore[no-untyped-def]
    """Nanoseconds of the device's clock, which all of its streams share, into ``out`` [1]."""
    tl.store(out, globaltimer().to(tl.int64))
