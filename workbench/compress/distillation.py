"""Distillation as a verb: a student learns from a teacher given as a module.

What is compared, and how, is in :mod:`workbench.training.distillation`; any run distils whose config names a teacher.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.training import TrainConfig, TrainResult, sources, train
from workbench.training.distillation_config import DistillConfig

if TYPE_CHECKING:
    from torch import nn


def distill(
    student: nn.Module,
    teacher: nn.Module | str | os.PathLike[str],
    config: TrainConfig,
    *,
    data: Any = None,
    root: str | os.PathLike[str] | None = None,
) -> TrainResult:
    """Train a copy of ``student`` to do what ``teacher`` does; both stay as they are.

    Args:
        student: e.g. the teacher pruned, or prepared for quantization.
        teacher: a module, or the folder of a saved model or a finished run.
        config: of the training. Its ``distill`` says what is compared; without one, the softened outputs.
        data: in place of the config's, as for :func:`workbench.train`.
        root: parent of the run folder; by default ``WORKBENCH_RUNS``.

    Returns:
        As of :func:`workbench.train`; ``result.model`` is the student trained.

    Raises:
        WorkbenchError: in words; the run folder says the same.
    """
    from torch import nn

    config = TrainConfig.checked(config)
    settings = config.distill or DistillConfig()
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(teacher, nn.Module):
            (Path(folder) / "source").mkdir()
            sources.keep_model(teacher, Path(folder))
            name = Path(folder) / sources.model_name(teacher)
        else:
            name = Path(teacher)
        settings = settings.override({"teacher": str(name.resolve())})
        return train(config.override({"distill": settings.model_dump()}), model=student, data=data, root=root)
