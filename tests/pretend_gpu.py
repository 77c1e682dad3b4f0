"""A small caching allocator that keeps the records that PyTorch's keeps, and a model that trains in it: for tests without a GPU.

Blocks are rounded up to 512 bytes; up to 1 MB they come from segments of 2 MB, others from segments of 20 MB or their own size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from workbench.snapshots import Known, Mark

MB = 2**20


class Allocator:
    """``snapshot()`` has the form of ``torch.cuda.memory._snapshot()``."""

    def __init__(self) -> None:
        self.segments: list[dict[str, Any]] = []
        self.trace: list[dict[str, Any]] = []
        self.now = 1_000_000
        self.recording = True

    def allocate(self, size: int, *frames: tuple[str, int, str]) -> int:
        rounded = -(-size // 512) * 512
        kind = "small" if rounded <= MB else "large"
        block = self._place(rounded, kind)
        stack = [{"filename": file, "line": line, "name": name} for file, line, name in frames]
        block.update(state="active_allocated", requested_size=size, frames=stack if self.recording else [])
        self._note("alloc", block["address"], size, stack)
        return int(block["address"])

    def free(self, address: int) -> None:
        segment, block = next((s, b) for s in self.segments for b in s["blocks"] if b["address"] == address)
        self._note("free_requested", address, block["requested_size"], [])
        self._note("free_completed", address, block["requested_size"], [])
        block.update(state="inactive", frames=[], requested_size=0)
        merged: list[dict[str, Any]] = []
        for part in segment["blocks"]:
            if merged and part["state"] == merged[-1]["state"] == "inactive":
                merged[-1]["size"] += part["size"]
            else:
                merged.append(part)
        segment["blocks"] = merged

    def snapshot(self) -> dict[str, Any]:
        return {"segments": self.segments, "device_traces": [self.trace]}

    @property
    def allocated(self) -> int:
        return sum(b["size"] for s in self.segments for b in s["blocks"] if b["state"] == "active_allocated")

    def tick(self) -> int:
        self.now += 10
        return self.now

    def _note(self, action: str, address: int, size: int, frames: list[Any]) -> None:
        self.tick()
        if self.recording:
            self.trace.append(
                {"action": action, "addr": address, "size": size, "stream": 0, "frames": frames, "time_us": self.now}
            )

    def _place(self, size: int, kind: str) -> dict[str, Any]:
        free = [(s, b) for s in self.segments if s["segment_type"] == kind for b in s["blocks"] if b["state"] == "inactive"]
        fitting = sorted(((s, b) for s, b in free if b["size"] >= size), key=lambda pair: pair[1]["size"])
        if fitting:
            segment, block = fitting[0]
        else:
            whole = 2 * MB if kind == "small" else max(20 * MB, -(-size // (2 * MB)) * 2 * MB)
            start = max((s["address"] + s["total_size"] for s in self.segments), default=0x7F0000000000) + 64 * MB
            block = {"address": start, "size": whole, "requested_size": 0, "state": "inactive", "frames": []}
            segment = {"device": 0, "address": start, "total_size": whole, "stream": 0, "segment_type": kind}
            segment |= {"segment_pool_id": (0, 0), "blocks": [block]}
            self.segments.append(segment)
        if block["size"] > size:
            rest = {"address": block["address"] + size, "size": block["size"] - size, "requested_size": 0}
            segment["blocks"].insert(segment["blocks"].index(block) + 1, {**rest, "state": "inactive", "frames": []})
            block["size"] = size
        return block


class Training:
    """Steps of a convolutional network of ``depth`` layers on a pretend GPU, with what a trainer notes of them."""

    def __init__(self, depth: int = 12, recording_from: int = 1) -> None:
        self.gpu, self.depth, self.recording_from = Allocator(), depth, recording_from
        self.gpu.recording = False
        self.weights = [self.gpu.allocate(size) for size in self.sizes]
        self.state: list[int] = []
        self.known: list[Known] = []
        self.marks: list[Mark] = []

    @property
    def sizes(self) -> list[int]:
        """Bytes of the weights."""
        return [9 * (64 << min(3, i // 3)) ** 2 * 4 for i in range(self.depth)]

    def activation(self, layer: int) -> int:
        return 32 * (64 << min(3, layer // 3)) * (56 >> min(3, layer // 3)) ** 2 * 4

    def layer(self, i: int, name: str) -> Iterator[tuple[str, int, str]]:
        yield "/venv/lib/python3.11/site-packages/torch/nn/modules/conv.py", 553, "_conv_forward"
        yield "/home/me/nets/resnet.py", 41 + 2 * (name == "relu"), f"forward_{name}"
        yield "/home/me/nets/resnet.py", 80 + i, "forward"
        yield "/home/me/workbench/training/objective.py", 41, "forward"

    def step(self, number: int) -> None:
        gpu = self.gpu
        gpu.recording = number >= self.recording_from
        batch = gpu.allocate(32 * 3 * 224 * 224 * 4, ("/home/me/workbench/data/batches.py", 254, "_normalize"))
        self.mark(number, "forward")
        saved = []
        for i in range(self.depth):
            workspace = gpu.allocate(3 * MB + 1000 * i, *self.layer(i, "conv"))
            saved.append(gpu.allocate(self.activation(i), *self.layer(i, "conv")))
            gpu.free(workspace)
            if i % 2:
                saved.append(gpu.allocate(self.activation(i) // 4, *self.layer(i, "relu")))
        self.mark(number, "backward")
        gradients = []
        for i in reversed(range(self.depth)):
            flowing = gpu.allocate(self.activation(i))
            gradients.append(gpu.allocate(self.sizes[i]))
            if i % 2:
                gpu.free(saved.pop())
            gpu.free(saved.pop())
            gpu.free(flowing)
        self.know(gradients)
        self.mark(number, "update")
        if not self.state:
            where = "/venv/lib/python3.11/site-packages/torch/optim/adamw.py", 180, "_init_group"
            self.state = [gpu.allocate(size, where) for size in self.sizes for _ in range(2)]
        scratch = gpu.allocate(
            self.sizes[-1], ("/venv/lib/python3.11/site-packages/torch/optim/adamw.py", 520, "_multi_tensor_adamw")
        )
        gpu.free(scratch)
        for address in (*gradients, batch):
            gpu.free(address)
        self.know([])
        self.mark(number + 1, "between")

    def know(self, gradients: list[int]) -> None:
        holders = dict.fromkeys(self.weights, "parameters") | dict.fromkeys(self.state, "optimizer")
        self.known.append(Known(self.gpu.tick(), holders | dict.fromkeys(gradients, "gradients")))

    def mark(self, step: int, phase: str) -> None:
        if self.gpu.recording:
            self.marks.append(Mark(self.gpu.tick(), step, phase))
