"""A torchrun command for each host, to be typed there."""

from __future__ import annotations

import shlex
import socket
from typing import Annotated, Self

from pydantic import Field, model_validator

from workbench.cluster.config import Cluster, Line
from workbench.config import hint
from workbench.run import Run

Address = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._:-]*[A-Za-z0-9])?$", max_length=253)]


class Torchrun(Cluster):
    """Machines with a shell, a common folder and nothing to schedule them."""

    addresses: tuple[Address, ...] = Field(
        (), description="Names or addresses of the hosts; they meet at the first. None: they meet at this machine."
    )
    min_hosts: int | None = Field(
        None, ge=1, description="Fewest hosts to go on with when others are lost for good; by default all must come back."
    )
    directory: Line | None = Field(None, description="Working folder on every host; by default where the command is typed.")
    setup: tuple[Line, ...] = Field(
        (),
        description="Shell lines to run first, e.g. 'source .venv/bin/activate'.",
        json_schema_extra=hint(advanced=True),
    )

    @model_validator(mode="after")
    def _hosts_agree(self) -> Self:
        if self.addresses and len(self.addresses) != self.hosts:
            raise ValueError(f"hosts={self.hosts} but there are {len(self.addresses)} addresses")
        if self.min_hosts is not None and self.min_hosts > self.hosts:
            raise ValueError(f"min_hosts={self.min_hosts} must be at most hosts={self.hosts}")
        return self

    def script(self, run: Run) -> str:
        """One command a host, each under a comment that names it."""
        names = self.addresses or (socket.gethostname(), *(f"host {number}" for number in range(2, self.hosts + 1)))
        nodes = f"{self.min_hosts}:{self.hosts}" if self.min_hosts is not None else str(self.hosts)
        place = [] if self.directory is None else [f"cd {shlex.quote(self.directory)}"]
        command = self.command(run, nodes, shlex.quote(run.id), f"{names[0]}:{self.port}")
        body = " && \\\n".join([*place, *self.setup, *self.exports(), command])
        return "\n".join(f"# on {name}\n{body}\n" for name in names)
