"""CPUs whose INT8 kernels saturate: without VNNI, two products of 8 bits are added in 16, and 255 × 127 × 2 does not fit."""

from __future__ import annotations

import platform

import torch

SATURATES = (
    "This CPU has no VNNI instructions: its INT8 kernels add pairs of products in 16 bits, and large ones saturate. Compare the "
    "INT8 model with the original here, or set activation_bit=7 (static), with which they fit; with VNNI 8 bits are exact."
)


def saturates() -> bool:
    """Whether PyTorch's INT8 products may saturate on this machine's CPU."""
    return platform.machine().lower() in ("x86_64", "amd64") and not torch.cpu._is_vnni_supported()
