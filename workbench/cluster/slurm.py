"""A batch script for Slurm: ``sbatch FILE``."""

from __future__ import annotations

import shlex
from typing import Annotated

from pydantic import Field

from workbench.cluster.config import Cluster, Line, Name
from workbench.config import hint
from workbench.run import Run

List = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([A-Za-z0-9._,-]*[A-Za-z0-9])?)?$", max_length=200)]


class Slurm(Cluster):
    """Hosts that Slurm allots."""

    partition: List = Field("", description="Partitions, separated by commas; by default the cluster's.")
    account: List = Field("", description="Account to charge; by default yours.")
    qos: List = Field("", description="Quality of service.", json_schema_extra=hint(advanced=True))
    hours: float = Field(24.0, gt=0, le=24 * 365, description="Time limit, hours.")
    cpus: int = Field(8, ge=1, le=1024, description="CPU cores a process, its loaders included.")
    memory_gib: int | None = Field(None, ge=1, description="Main memory a host, GiB; by default all of it.")
    gpu: Name | None = Field(None, description="Type of the GPUs, as the cluster names it, e.g. h100; by default any.")
    requeue: bool = Field(
        True,
        description="At the time limit: stop after a checkpoint and queue again, to go on from there; after a lost host too.",
    )
    minutes_to_stop: int = Field(
        5, ge=1, le=120, description="Minutes before the time limit at which to stop.", json_schema_extra=hint(advanced=True)
    )
    directory: Line | None = Field(None, description="Working folder; by default where sbatch is called.")
    setup: tuple[Line, ...] = Field(
        (), description="Shell lines to run first, e.g. 'module load cuda' or 'source .venv/bin/activate'."
    )

    def script(self, run: Run) -> str:
        """The script; one task a host, in which torchrun starts the ranks."""
        endpoint, identifier = f'"$head:{self.port}"', '"$SLURM_JOB_ID.$SLURM_RESTART_COUNT"'
        torchrun = self.command(run, '"$SLURM_JOB_NUM_NODES"', identifier, endpoint)
        folder = shlex.quote(self.folder(run))
        limit = f"""
# Before the time limit: stop after the present step, which saves a checkpoint, and queue again.
trap 'workbench stop {folder} && wait "$ranks" && scontrol requeue "$SLURM_JOB_ID"' USR1
"""
        return "\n".join(
            [
                "#!/bin/bash",
                *(
                    f"#SBATCH --{name}" + (f"={shlex.quote(value)}" if value else "")
                    for name, value in self._options(run).items()
                ),
                "set -eo pipefail",
                "",
                *self.setup,
                *self.exports(),
                "export SLURM_RESTART_COUNT=${SLURM_RESTART_COUNT:-0}",
                'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
                *([limit] if self.requeue else [""]),
                f"srun --kill-on-bad-exit=1 {torchrun} &",
                "ranks=$!",
                'wait "$ranks"',
                "",
            ]
        )

    def _options(self, run: Run) -> dict[str, str]:
        """Options of sbatch, by their long names; empty for those without a value."""
        gpus = f"{self.gpu}:{self.nproc}" if self.gpu else str(self.nproc)
        options = {
            "job-name": run.id,
            "nodes": str(self.hosts),
            "ntasks-per-node": "1",
            "cpus-per-task": str(self.cpus * self.nproc),
            "gpus-per-node": "" if run.config.device == "cpu" else gpus,
            "mem": "0" if self.memory_gib is None else f"{self.memory_gib}G",
            "time": _limit(self.hours),
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "chdir": self.directory or "",
            "output": f"{self.folder(run)}/logs/slurm-%j.log",
            "open-mode": "append",
        }
        flags = {"requeue": "", "signal": f"B:USR1@{60 * self.minutes_to_stop}"} if self.requeue else {"no-requeue": ""}
        return {name: value for name, value in options.items() if value} | flags


def _limit(hours: float) -> str:
    """Hours as ``days-hours:minutes:seconds``."""
    minutes = max(1, round(hours * 60))
    return f"{minutes // 1440}-{minutes // 60 % 24:02}:{minutes % 60:02}:00"
