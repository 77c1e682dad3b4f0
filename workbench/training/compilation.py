"""How an objective, or its parts, are compiled.

The compiler itself is imported when something is compiled, not before: that takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from workbench.training.objective import Objective

if TYPE_CHECKING:
    from workbench.training.reduction import Averaging


def compile_whole(objective: Objective, mode: str, averaging: Averaging | None = None) -> None:
    """Compile ``objective`` as a whole.

    Args:
        mode: of torch.compile.
        averaging: what to write into the graph of both passes, which then has to be one.
    """
    import torch._inductor

    from workbench.training.graph_passes import Passes

    settings: dict[str, Any] = {} if mode == "default" else torch._inductor.list_mode_options(mode)
    settings["joint_custom_post_pass"] = Passes(averaging)
    if averaging is not None:
        # Else Inductor moves what uses the means, and with it the wait for them, to where they set out: that frees memory.
        settings["reorder_for_peak_memory"] = False
    torch.compiler.reset()  # what a kernel compiled before must not decide how this run is compiled, nor use up the limit
    objective.compile(fullgraph=averaging is not None, options=settings)


def compile_parts(parts: Iterable[nn.Module], mode: str) -> None:
    """Compile each of ``parts`` for itself."""
    torch.compiler.reset()
    for part in parts:
        part.compile(mode=None if mode == "default" else mode)
