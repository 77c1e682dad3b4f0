"""What is read of a machine's links."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from workbench.probes.topology import Topology, find_topology, network_speed, parse_matrix, physical_index

MATRIX = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tSYS\tPIX\t0-47\t0\t\tN/A
GPU1\tNV18\t X \tPHB\tSYS\t0-47\t0\t\tN/A
GPU2\tSYS\tPHB\t X \tSYS\t48-95\t1\t\tN/A
NIC0\tPIX\tSYS\tSYS\t X \t\t\t\t

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes (e.g., QPI/UPI)
"""


def test_the_matrix_of_links_is_read_by_pair() -> None:
    found = parse_matrix(MATRIX)
    assert found[0, 1] == found[1, 0] == "NV18" and found[0, 2] == "SYS" and found[2, 1] == "PHB"
    assert len(found) == 6
    assert parse_matrix("") == parse_matrix("NVIDIA-SMI has failed") == {}


def interface(root: Path, name: str, speed: str, state: str = "up") -> None:
    folder = root / "net" / name
    folder.mkdir(parents=True)
    (folder / "speed").write_text(f"{speed}\n")
    (folder / "operstate").write_text(f"{state}\n")


def test_the_fastest_interface_that_is_up_counts_or_the_one_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    assert network_speed(tmp_path) is None
    interface(tmp_path, "lo", "", "unknown")
    interface(tmp_path, "veth0", "-1")
    assert network_speed(tmp_path) is None
    interface(tmp_path, "eth0", "1000")
    interface(tmp_path, "eth1", "25000")
    interface(tmp_path, "eth2", "100000", "down")
    assert network_speed(tmp_path) == 25
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert network_speed(tmp_path) == 1
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    (tmp_path / "infiniband" / "mlx5_0" / "ports" / "1").mkdir(parents=True)
    (tmp_path / "infiniband" / "mlx5_0" / "ports" / "1" / "rate").write_text("400 Gb/sec (4X NDR)\n")
    assert network_speed(tmp_path) == 400


def test_devices_are_numbered_as_the_driver_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    device = torch.device("cuda", 1)
    assert physical_index(device) == 1 and physical_index(torch.device("cpu")) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    assert physical_index(device) == 5
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-0a,GPU-1b")
    assert physical_index(device) is None


def test_alone_there_are_no_links() -> None:
    assert find_topology(torch.device("cpu")) == Topology()
