"""How ranks reach one another: what the machine says of its links, and what they prove to carry.

:func:`find_topology` is asked once, by every rank; :func:`parse_matrix` reads ``nvidia-smi topo -m``.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PCIE = {
    "PIX": "PCIe, one switch",
    "PXB": "PCIe, several switches",
    "PHB": "PCIe through the CPU",
    "NODE": "PCIe through one socket's bridges",
    "SYS": "PCIe across sockets",
}
"""nvidia-smi's words for the way between two devices that have no NVLink, from the nearest to the farthest."""

SIZE = 16 * 2**20
"""Bytes of the all-reduce by which links are timed."""


@dataclass(frozen=True)
class Place:
    """Where a rank computes.

    Attributes:
        gpu: number of its device as nvidia-smi counts; None for a CPU, or where that cannot be told.
        network: Gb/s of the host's fastest interface that could be asked; None where none could.
    """

    host: str
    gpu: int | None = None
    network: float | None = None


@dataclass(frozen=True)
class Topology:
    """How this rank reaches the next one, the last the first.

    Attributes:
        link: in words.
        hosts: how many there are.
        network: Gb/s of the slowest host's interface; None on one host, or where it could not be asked.
        bandwidth: bytes per second that each rank's link carried in an all-reduce (NCCL's bus bandwidth); None alone.
    """

    link: str = ""
    hosts: int = 1
    network: float | None = None
    bandwidth: float | None = None


def find_topology(device: torch.device) -> Topology:
    """What can be found out; every rank asks at the same point, and exchanges a few small messages and :data:`SIZE` bytes.

    Alone, or without a process group, there are no links.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Topology()
    gpu = physical_index(device)
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, asdict(Place(socket.gethostname(), gpu, network_speed())))
    places = [Place(**values) for values in box]
    mine, after = places[dist.get_rank()], places[(dist.get_rank() + 1) % len(places)]
    hosts = len({place.host for place in places})
    known = [place.network for place in places if place.network is not None]
    network = min(known) if hosts > 1 and known else None
    return Topology(_link(mine, after, device), hosts, network, _bandwidth(device))


def _link(mine: Place, other: Place, device: torch.device) -> str:
    if mine.host != other.host:
        speeds = [place.network for place in (mine, other) if place.network is not None]
        return f"network, {min(speeds):g} Gb/s" if speeds else "network"
    if device.type != "cuda":
        return "memory of one host"
    found = parse_matrix(_matrix()).get((mine.gpu, other.gpu)) if mine.gpu is not None and other.gpu is not None else None
    if found is not None:
        return f"NVLink, {found[2:]} links" if found.startswith("NV") else PCIE.get(found, found)
    count = torch.cuda.device_count()
    peers = [index for index in range(count) if index != device.index]
    if peers and all(torch.cuda.can_device_access_peer(device, index) for index in peers):
        return "one host, devices reach each other's memory"
    return "one host, through main memory"


def physical_index(device: torch.device) -> int | None:
    """The device's number as nvidia-smi counts; None for a CPU, or where ``CUDA_VISIBLE_DEVICES`` holds other than numbers."""
    if device.type != "cuda":
        return None
    index = device.index or 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return index
    names = [name.strip() for name in visible.split(",")]
    return int(names[index]) if index < len(names) and names[index].isdigit() else None


def _matrix() -> str:
    command = shutil.which("nvidia-smi")
    if command is None:
        return ""
    try:
        return subprocess.run([command, "topo", "-m"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def parse_matrix(text: str) -> dict[tuple[int, int], str]:
    """``nvidia-smi topo -m`` -> by pair of GPUs: NV18 for 18 NVLinks, or a key of :data:`PCIE`."""
    rows = [line.split("\t") for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]
    rows = [[cell.strip() for cell in row] for row in rows]
    header = next((row for row in rows if "GPU0" in row[1:]), None)
    if header is None:
        return {}
    columns = {place: int(name[3:]) for place, name in enumerate(header) if re.fullmatch(r"GPU\d+", name)}
    found = {}
    for row in rows:
        if row is header or not re.fullmatch(r"GPU\d+", row[0]):
            continue
        for place, other in columns.items():
            if place < len(row) and row[place] not in ("", "X"):
                found[int(row[0][3:]), other] = row[place]
    return found


def network_speed(root: Path = Path("/sys/class")) -> float | None:
    """Gb/s of the host's fastest network interface that is up; of the one that NCCL or gloo is told to take, where it is.

    None where none tells its speed: virtual interfaces don't.
    """
    named = os.environ.get("NCCL_SOCKET_IFNAME") or os.environ.get("GLOO_SOCKET_IFNAME") or ""
    speeds = []
    for interface in sorted((root / "net").glob("*")):
        if named and not interface.name.startswith(named.lstrip("^=")):
            continue
        try:
            up = (interface / "operstate").read_text().strip() == "up"
            megabits = int((interface / "speed").read_text())
        except (OSError, ValueError):
            continue
        if up and megabits > 0:
            speeds.append(megabits / 1000)
    if not named:
        for rate in sorted((root / "infiniband").glob("*/ports/*/rate")):
            try:
                speeds.append(float(rate.read_text().split()[0]))
            except (OSError, ValueError, IndexError):
                continue
    return max(speeds, default=None)


def _bandwidth(device: torch.device) -> float:
    """Bytes per second of a rank's link in an all-reduce: what travels is 2 (n - 1) / n of the buffer."""
    buffer, ranks = torch.zeros(SIZE // 4, device=device), dist.get_world_size()
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        dist.all_reduce(buffer)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return SIZE * 2 * (ranks - 1) / ranks / statistics.median(seconds[1:])
