"""Where a rank stands in the mesh, and its groups along each dimension."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from workbench.distributed import World

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Mesh:
    """The ranks of a run as a grid.

    Args:
        sizes: ranks along each dimension, the slowest first, as :meth:`MeshConfig.arranged` gives them.

    Attributes:
        place: this rank's coordinate along each dimension.
    """

    def __init__(self, sizes: Mapping[str, int], world: World) -> None:
        self.sizes, self.world = dict(sizes), world
        self.place: dict[str, int] = {}
        left = world.rank
        for name in reversed(self.sizes):
            left, self.place[name] = divmod(left, self.sizes[name])

    def __getitem__(self, name: str) -> int:
        return self.sizes[name]

    @property
    def copies(self) -> int:
        """Parts that the batch is divided into: over copies, whether whole or spread."""
        return self.sizes["replicate"] * self.sizes["shard"]

    @property
    def copy(self) -> int:
        """Which of these parts this rank takes."""
        return self.place["replicate"] * self.sizes["shard"] + self.place["shard"]

    @property
    def plain(self) -> bool:
        """Whether ranks hold whole copies, and nothing else."""
        return self.sizes["replicate"] == math.prod(self.sizes.values())

    @cached_property
    def devices(self) -> DeviceMesh:
        """The grid, without the dimensions along which there is one rank; every rank asks for it at the same point."""
        from torch.distributed.device_mesh import init_device_mesh

        # Copies of a divided model are spread over one rank each: FSDP2 knows of the division, DDP doesn't.
        divided = not self.plain and self.sizes["replicate"] > 1
        kept = {name: size for name, size in self.sizes.items() if size > 1 or (divided and name == "shard")}
        return init_device_mesh(self.world.device.type, tuple(kept.values()), mesh_dim_names=tuple(kept))

    def along(self, *names: str) -> DeviceMesh:
        """This rank's part of the grid along the dimensions named, of those that :attr:`devices` has."""
        known = self.devices.mesh_dim_names or ()
        return self.devices[tuple(name for name in names if name in known)]
