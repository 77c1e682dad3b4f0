"""Runs on several machines: what to type, submit or apply there, complete (``workbench launch --print``).

* :func:`launch_script` — a run, and the text that starts it: ``launch_script(config, Slurm(nproc=8, hosts=2))``.
* :data:`CLUSTERS` — the kinds by name, each a :class:`Cluster`: a config, and the text that it makes of a run.

On every host torchrun starts the same ``python -m workbench.worker``; hosts find each other by torchrun's c10d rendezvous, and
all see one run folder. When a rank or a host is lost, torchrun starts all again from the last checkpoint.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.cluster.config import CLUSTERS, Cluster
from workbench.cluster.kubernetes import Kubernetes
from workbench.cluster.slurm import Slurm
from workbench.cluster.torchrun import Torchrun
from workbench.errors import ConfigError
from workbench.run import Replay
from workbench.training import TrainConfig, prepare

if TYPE_CHECKING:
    from torch import nn

__all__ = ["CLUSTERS", "Cluster", "Kubernetes", "Script", "Slurm", "Torchrun", "launch_script"]


@dataclass(frozen=True)
class Script:
    """What starts a run elsewhere.

    Attributes:
        text: a shell command a host, a batch script, or manifests.
        folder: the run folder, as the hosts see it.
    """

    text: str
    folder: str

    def __str__(self) -> str:
        return self.text


def launch_script(
    config: TrainConfig,
    cluster: Cluster,
    *,
    model: nn.Module | None = None,
    data: Any = None,
    root: str | os.PathLike[str] | None = None,
    replay: Replay | None = None,
) -> Script:
    """Prepare a run, and write what starts it on other machines; nothing is started here.

    Args:
        config: what to train.
        cluster: where and how, e.g. ``Slurm(nproc=8, hosts=2, partition="gpu")``.
        model, data, replay: as for :func:`workbench.launch`; they travel with the run.
        root: parent of the run folder, which all hosts must see under this very path; by default ``WORKBENCH_RUNS``. On
            Kubernetes the folder is made on the volume instead.

    Raises:
        ConfigError: ``config.mesh`` or the batch is of another number of processes.
        RunError: the run folder cannot be made, or is too large to travel.

    Example:
        >>> print(launch_script(TrainConfig(), Slurm(nproc=8, hosts=2, partition="gpu")))
    """
    ranks = cluster.hosts * cluster.nproc
    if config.data.batch_size % (ranks * config.accumulate):
        raise ConfigError(
            f"data.batch_size={config.data.batch_size} does not divide into {ranks} ranks × accumulate={config.accumulate}.",
            f"Take a multiple of {ranks * config.accumulate}.",
        )
    with ExitStack() as stack:
        if cluster.carries:
            root = stack.enter_context(tempfile.TemporaryDirectory())
        run = prepare(config, model=model, data=data, root=root, replay=replay, nproc=ranks)
        return Script(cluster.script(run), cluster.folder(run))
