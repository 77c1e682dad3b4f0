"""What a run's failure is told as."""

from __future__ import annotations

import re
from pathlib import Path

from workbench.allocator import ran_out
from workbench.errors import DeviceError, MemoryExhausted, RunError
from workbench.training.advice import Advice
from workbench.training.config import TrainConfig
from workbench.training.fitting import GIB


def in_words(
    error: BaseException, config: TrainConfig, advice: Advice | None = None, snapshot: Path | None = None
) -> BaseException:
    """An error that says what to do, where we know; otherwise the error itself."""
    text = str(error)
    if ran_out(error):
        asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", text)
        what = f"Out of memory with data.batch_size={config.data.batch_size}{f', asking for {asked[1]}' if asked else ''}."
        if advice is not None:
            what += f" A step takes about {advice.needed / GIB:.3g} GiB, and there are {advice.available / GIB:.3g} for it."
        if snapshot is not None:
            what += f" What held the memory then is in snapshots/{snapshot.name}: memory.snapshot_page(run) draws it."
        if advice is not None and advice.remedies:
            fitting = "; ".join(map(str, advice.remedies))
            return MemoryExhausted(what, f"Set one of these, each proved by a step to fit: {fitting}.")
        untested = [f"accumulate={config.accumulate * 2}", f"data.batch_size={max(1, config.data.batch_size // 2)}"]
        untested[1:1] = ["precision=bf16"] if config.precision in ("fp32", "tf32") else []
        untested[1:1] = ["memory.recompute=1"] if not config.memory.recompute else []
        return MemoryExhausted(what, f"Try {', or '.join(untested)}; none of it could be tested.")
    if isinstance(error, RuntimeError) and "does not have a deterministic implementation" in text:
        return DeviceError(
            f"deterministic=true, but {text.split()[0]} has no algorithm here that repeats bit for bit.",
            "Replace the layer that calls it (adaptive pooling: by AvgPool2d or a mean), or set deterministic=false.",
        )
    if isinstance(error, KeyboardInterrupt):
        return RunError("Interrupted.", "resume() goes on from the last checkpoint.")
    return error
