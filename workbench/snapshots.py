"""Memory snapshots: every allocation of some steps, and how the allocator's segments lie, as compact JSON.

PyTorch's own snapshot (``torch.cuda.memory._snapshot``) is pickle, which is opened with trust only, and repeats its stack traces
with each entry. :func:`convert` keeps what a page draws, once:

* ``frames`` [file, line, function], ``stacks``: lists of frames, the innermost first;
* ``allocations``: columns ``size`` (bytes asked for), ``start`` and ``end`` (number of the event; 0 before the history, -1 still
  there at its end), ``holder``, ``stack``;
* ``marks``: [event, step, phase] at which a phase of a step began;
* ``segments``: [bytes, stream, ``small`` or ``large``, of a pool of its own (captured graphs), blocks], each block [bytes, bytes
  asked for, state, holder, stack], in the order of addresses; ``totals`` sums them up.

:func:`read_snapshot` reads such a file and runs nothing of it.
"""

from __future__ import annotations

import bisect
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workbench import storage
from workbench.errors import RunError

VERSION = 1
DEPTH = 10
"""Frames kept of a stack, the innermost ones."""

HOLDERS = (
    *("parameters", "optimizer", "buffers", "average", "exchange", "teacher", "data"),
    *("gradients", "activations", "temporary", "other"),
)
"""Who holds an allocation; ``temporary`` is gone before the phase ends in which it was made."""

STATES = ("allocated", "waiting", "free")
"""Of a block; ``waiting`` to be free until another stream is done with it."""

_STATES = {"active_allocated": 0, "active_awaiting_free": 1, "active_pending_free": 1, "inactive": 2}
_OMITTED = ("CapturedTraceback", "gather_with_cpp", "unwind::", "PyEval_", "PyObject_", "_PyEval", "_PyFunction")
_CATEGORIES = {
    "parameter": "parameters",
    "optimizer_state": "optimizer",
    "input": "data",
    "gradient": "gradients",
    "activation": "activations",
    "autograd_detail": "activations",
    "temporary": "temporary",
}
"""The memory profiler's words, which its snapshots carry."""


@dataclass(frozen=True)
class Known:
    """What a trainer knew at a moment: who held which addresses.

    Attributes:
        time: microseconds since the epoch.
        holders: by address of a storage, one of :data:`HOLDERS`.
    """

    time: int
    holders: Mapping[int, str]


@dataclass(frozen=True)
class Mark:
    """The beginning of a phase, ``forward``, ``backward``, ``update`` or ``between`` steps, in microseconds since the epoch."""

    time: int
    step: int
    phase: str


@dataclass
class _Stacks:
    """Frames and stacks, each once."""

    frames: dict[tuple[str, int, str], int] = field(default_factory=dict)
    stacks: dict[tuple[int, ...], int] = field(default_factory=dict)

    def number(self, frames: Iterable[Mapping[str, Any]]) -> int:
        kept = [f for f in frames if not any(word in f["name"] for word in _OMITTED)][:DEPTH]
        keys = [(_short(f["filename"]), int(f["line"]), str(f["name"])) for f in kept]
        return self.stacks.setdefault(tuple(self.frames.setdefault(k, len(self.frames)) for k in keys), len(self.stacks))


@dataclass
class _Allocation:
    address: int
    size: int
    start: int
    stack: int
    born: int | None
    end: int = -1
    died: int | None = None
    category: str = ""


def convert(
    raw: Mapping[str, Any],
    device: int = 0,
    *,
    known: Sequence[Known] = (),
    marks: Sequence[Mark] = (),
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """PyTorch's snapshot of one device as what is written to disk (see the module).

    An allocation's holder is who held its address at a moment when it was there (``known``), which is exact; else it follows from
    the phases in which it was made and freed: what a forward pass leaves are activations, what is made between steps and stays is
    the batch. Without times in the trace (that of PyTorch's memory profiler has none) marks count for nothing.

    Args:
        raw: of ``torch.cuda.memory._snapshot()``.
        device: index.
        facts: what else to keep, e.g. the step and the rank.
    """
    stacks = _Stacks()
    traces = raw.get("device_traces", [])
    entries = traces[device] if device < len(traces) else []
    allocations, times, refused = _history(entries, stacks)
    segments = [segment for segment in raw["segments"] if segment.get("device", device) == device]
    by_address = {allocation.address: allocation for allocation in allocations if allocation.end == -1}
    blocks = [_blocks(segment) for segment in segments]
    for address, block in (pair for found in blocks for pair in found):
        if block["state"] == "active_allocated" and address not in by_address:  # from before the history
            size = block.get("requested_size", block["size"])
            older = _Allocation(address, size, 0, stacks.number(block.get("frames", ())), None)
            allocations.append(older)
            by_address[address] = older
    phases = _Phases(marks if any(times) else ())
    holders = {id(a): HOLDERS.index(_holder(a, known, phases)) for a in allocations}
    drawn = []
    for segment, found in zip(segments, blocks, strict=True):
        rows = []
        for address, block in found:
            state = _STATES.get(block["state"], 2)
            held = by_address.get(address) if state == 0 else None
            size, asked = block["size"], block.get("requested_size", block["size"]) if state < 2 else 0
            rows.append([size, asked, state, holders[id(held)] if held else -1, held.stack if held else -1])
        private = tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0)
        drawn.append([segment["total_size"], segment.get("stream", 0), segment.get("segment_type", "large"), private, rows])
    allocations.sort(key=lambda allocation: allocation.start)
    return {
        "version": VERSION,
        **(facts or {}),
        "holders": HOLDERS,
        "frames": list(stacks.frames),
        "stacks": list(stacks.stacks),
        "events": len(times),
        "marks": [[bisect.bisect_left(times, mark.time) + 1, mark.step, mark.phase] for mark in phases.marks],
        "refused": refused,
        "allocations": {
            "size": [a.size for a in allocations],
            "start": [a.start for a in allocations],
            "end": [a.end for a in allocations],
            "holder": [holders[id(a)] for a in allocations],
            "stack": [a.stack for a in allocations],
        },
        "segments": drawn,
        "totals": totals(drawn),
    }


def totals(segments: Sequence[Sequence[Any]]) -> dict[str, int]:
    """Bytes reserved, allocated, of these added by rounding up, free in whole segments and in pieces, of the largest free block.

    What is free in pieces lies in a segment of which something else is in use: only what fits between can be placed there.
    """
    blocks = [(block, len(segment[4]) > 1) for segment in segments for block in segment[4]]
    free = [(block[0], split) for block, split in blocks if STATES[block[2]] == "free"]
    taken = [block for block, _ in blocks if STATES[block[2]] == "allocated"]
    return {
        "reserved": sum(segment[0] for segment in segments),
        "allocated": sum(block[0] for block in taken),
        "rounding": sum(block[0] - block[1] for block in taken),
        "free_whole": sum(size for size, split in free if not split),
        "free_pieces": sum(size for size, split in free if split),
        "largest_free": max((size for size, _ in free), default=0),
    }


def write_snapshot(folder: Path, name: str, raw: Any, converted: Mapping[str, Any]) -> Path:
    """Write ``NAME.json``, and beside it PyTorch's own ``NAME.pickle`` for its tools; returns the first."""
    import pickle

    folder.mkdir(exist_ok=True)
    storage.write_atomic(folder / f"{name}.pickle", lambda file: pickle.dump(raw, file), durable=False)
    storage.write_atomic(folder / f"{name}.json", json.dumps(converted, separators=(",", ":")))
    return folder / f"{name}.json"


def read_snapshot(path: str | os.PathLike[str], *, trust: bool = False) -> dict[str, Any]:
    """A snapshot's content from its ``.json``, or from a ``.pickle`` of PyTorch's.

    Args:
        trust: open a pickle, which can run code.

    Raises:
        RunError: there is no such file, it is no snapshot, of a later version, or a pickle that is not trusted.
    """
    file = Path(path)
    if file.suffix == ".pickle":
        if not trust:
            raise RunError(f"{file.name} is pickle, and opening one can run code.", "If you trust its author, say trust=True.")
        import pickle

        raw = pickle.loads(file.read_bytes())  # noqa: S301 - trusted by whoever asks
        return convert(raw, next((i for i, trace in enumerate(raw.get("device_traces", [])) if trace), 0))
    try:
        content = json.loads(file.read_bytes())
        version = content["version"]
    except FileNotFoundError:
        raise RunError(f"There is no snapshot {str(file)!r}.", "Run.snapshots lists those of a run.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file.name} is not a memory snapshot: {error}.") from error
    if version != VERSION:
        raise RunError(f"{file.name} is of version {version}; this workbench reads version {VERSION}.")
    return dict(content)


# -- who held what ----------------------------------------------------------------------------------------------------


def _history(entries: Iterable[Mapping[str, Any]], stacks: _Stacks) -> tuple[list[_Allocation], list[int], list[list[int]]]:
    """Allocations; the times of the events (an allocation or a release each); [event, bytes] that the allocator refused."""
    found: list[_Allocation] = []
    live: dict[int, _Allocation] = {}
    times: list[int] = []
    refused: list[list[int]] = []
    for entry in entries:
        action, time = entry["action"], entry.get("time_us")
        if action == "alloc":
            times.append(time or 0)
            made = _Allocation(entry["addr"], entry["size"], len(times), stacks.number(entry.get("frames", ())), time)
            made.category = entry.get("category", "")
            live[made.address] = made
            found.append(made)
        elif action in ("free_requested", "free_completed", "free"):
            freed = live.pop(entry["addr"], None)
            if freed is None:
                if action == "free_completed":  # its request came first, or before the history
                    continue
                freed = _Allocation(entry["addr"], entry["size"], 0, stacks.number(()), None)
                found.append(freed)
            times.append(time or 0)
            freed.end, freed.died = len(times), time
        elif action == "oom":
            refused.append([len(times), entry["size"]])
    return found, times, refused


def _blocks(segment: Mapping[str, Any]) -> list[tuple[int, Mapping[str, Any]]]:
    """(address, block); old snapshots give addresses of segments only."""
    found, address = [], segment["address"]
    for block in segment["blocks"]:
        found.append((block.get("address", address), block))
        address = found[-1][0] + block["size"]
    return found


def _short(filename: str) -> str:
    """A library's file from its package on, any other by its last two folders."""
    _, installed, within = filename.rpartition("site-packages/")
    return within if installed else "/".join(Path(filename).parts[-3:])


class _Phases:
    """In which phase a moment lies, and when that phase ended."""

    def __init__(self, marks: Sequence[Mark]) -> None:
        self.marks = sorted(marks, key=lambda mark: mark.time)
        self._times = [mark.time for mark in self.marks]

    def at(self, time: int | None) -> tuple[str, int | None]:
        """(phase, its end): no phase before the first mark, no end of the last."""
        place = bisect.bisect_right(self._times, time) if time is not None else 0
        return (self.marks[place - 1].phase if place else ""), (self._times[place] if place < len(self._times) else None)


def _holder(allocation: _Allocation, known: Sequence[Known], phases: _Phases) -> str:
    for census in known:
        there = (allocation.born is None or allocation.born <= census.time) and (
            allocation.died is None or census.time <= allocation.died
        )
        if there and (holder := census.holders.get(allocation.address)) is not None:
            return holder
    if allocation.category:
        return _CATEGORIES.get(allocation.category, "other")
    phase, end = phases.at(allocation.born)
    if allocation.died is not None and phase and (end is None or allocation.died <= end):
        return "temporary"
    return {"forward": "activations", "between": "data"}.get(phase, "other")
