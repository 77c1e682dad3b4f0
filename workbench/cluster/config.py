"""What every kind of cluster is told: hosts, processes, restarts; and the command that each host runs."""

from __future__ import annotations

import re
import shlex
from abc import abstractmethod
from typing import Annotated, ClassVar

from pydantic import Field, field_validator

from workbench.config import Config, hint
from workbench.registry import Registry
from workbench.run import Run

CLUSTERS = Registry(
    "cluster",
    {
        "torchrun": "workbench.cluster.torchrun:Torchrun",
        "slurm": "workbench.cluster.slurm:Slurm",
        "kubernetes": "workbench.cluster.kubernetes:Kubernetes",
    },
)
"""Classes of :class:`Cluster` by name."""

Line = Annotated[str, Field(pattern=r"^[^\r\n]+$")]
"""Text of a single line."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$", max_length=63)]
"""What schedulers take as a name."""


class Cluster(Config):
    """Machines that train one run together."""

    carries: ClassVar[bool] = False
    """Whether the run travels within the text, as its hosts don't see this machine's run folders."""

    nproc: int = Field(1, ge=1, le=1024, description="Processes a host, one an accelerator.")
    hosts: int = Field(1, ge=1, le=100_000, description="Machines.")
    restarts: int = Field(
        3, ge=0, le=1000, description="How often all ranks start again from the last checkpoint after one was lost."
    )
    port: int = Field(29400, ge=1024, le=65535, description="TCP port of the first host where hosts meet; free there.")
    environment: dict[str, Line] = Field({}, description="Environment variables of the ranks, e.g. {NCCL_SOCKET_IFNAME: eth0}.")
    threads: int = Field(
        4, ge=1, le=1024, description="CPU threads a process (OMP_NUM_THREADS).", json_schema_extra=hint(advanced=True)
    )

    @field_validator("environment")
    @classmethod
    def _are_variables(cls, environment: dict[str, str]) -> dict[str, str]:
        for name in environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"{name!r} is no name of an environment variable: take letters, digits and _")
        return environment

    @abstractmethod
    def script(self, run: Run) -> str:
        """What to type, submit or apply to start ``run``."""

    def folder(self, run: Run) -> str:
        """The run folder as the hosts see it."""
        return str(run.path)

    def variables(self) -> dict[str, str]:
        """The ranks' environment in full."""
        return {"OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1", **self.environment}

    def command(self, run: Run, nodes: str, identifier: str, endpoint: str) -> str:
        """The shell command of a host; arguments in double quotes may name shell variables.

        Args:
            nodes: number of hosts.
            identifier: of the rendezvous.
            endpoint: host and port of the rendezvous.
        """
        parts = [
            "torchrun",
            f"--nnodes={nodes}",
            f"--nproc-per-node={self.nproc}",
            f"--max-restarts={self.restarts}",
            "--rdzv-backend=c10d",
            f"--rdzv-id={identifier}",
            f"--rdzv-endpoint={endpoint}",
            f"-m workbench.worker {shlex.quote(self.folder(run))}",
        ]
        return " \\\n    ".join(parts)

    def exports(self) -> list[str]:
        """Shell lines that set the environment."""
        return [f"export {name}={shlex.quote(value)}" for name, value in self.variables().items()]
