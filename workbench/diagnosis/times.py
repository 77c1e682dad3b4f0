"""Rules on where a step's time goes: a slow rank, the network, the wire, samples, the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.diagnosis.base import Remedy, Tables, finding, finite, last_step, recent, rule
from workbench.events import Finding

if TYPE_CHECKING:
    import pandas as pd

SLOW_NETWORK = 10.0
"""Gb/s below which a network between hosts holds training back."""


@rule
def slow_rank(tables: Tables) -> list[Finding]:
    """The other ranks wait for one that takes longer over its own work."""
    typical = _by_rank(tables.communication)
    if len(typical) < 2:
        return []
    busy = typical["busy"].sort_values()
    slow, own = int(busy.index[-1]), float(busy.iloc[-1])
    others, idle = float(busy.iloc[:-1].median()), float(typical["exposed"].drop(slow).median())
    step = own + float(typical["exposed"][slow])
    if own < 1.2 * others or idle < 0.1 * step:
        return []
    waits = float(typical["waited"][slow]) > 0.5 * (own - others)
    why = ", mostly waiting for samples" if waits else ""
    message = (
        f"Rank {slow} takes {1000 * own:.3g} ms over its part of a step{why}, the others {1000 * others:.3g} ms: "
        f"they wait {100 * idle / step:.0f} % of the time."
    )
    remedies = _samples(tables) if waits else [{"balance.shares": "speed"}]
    return finding(tables, "slow_rank", "warning", last_step(tables.communication), message, *remedies)


@rule
def slow_network(tables: Tables) -> list[Finding]:
    """Every rank waits for gradients, and between their hosts lies a slow network."""
    share, seconds, payload, network = _on_the_wire(tables.communication)
    if share < 0.05 or not network < SLOW_NETWORK:
        return []
    message = (
        f"A network of {network:.3g} Gb/s links the hosts: all ranks wait for {payload / 1e6:.3g} MB of gradients a step, "
        f"{1000 * seconds:.3g} ms or {100 * share:.0f} % of it."
    )
    remedies: tuple[Remedy, ...] = ({"communication.compress": "powersgd"}, {"communication.compress": "bf16"})
    return finding(tables, "slow_network", "warning", last_step(tables.communication), message, *remedies)


@rule
def exposed_communication(tables: Tables) -> list[Finding]:
    """Every rank waits for gradients on the wire, the one that computes longest too; unless a slow network is why."""
    share, seconds, payload, network = _on_the_wire(tables.communication)
    if share < 0.15 or network < SLOW_NETWORK:
        return []
    what = f"{payload / 1e6:.3g} MB of gradients" if payload else "gradients on the wire"
    message = f"All ranks wait for {what} for {1000 * seconds:.3g} ms of each step, {100 * share:.0f} % of it."
    remedies: tuple[Remedy, ...] = (
        {"communication.compress": "bf16", "communication.bucket": "auto"},
        {"communication.compress": "powersgd"},
        tables.multiplied("data.batch_size", 4, 128),
    )
    return finding(tables, "exposed_communication", "warning", last_step(tables.communication), message, *remedies)


@rule
def starved_step(tables: Tables) -> list[Finding]:
    """Every rank spends much of its steps waiting for samples."""
    typical = _by_rank(tables.communication)
    if typical.empty:
        return []
    share = float((typical["waited"] / (typical["busy"] + typical["exposed"])).min())
    if share < 0.2:
        return []
    message = f"Steps wait for samples {100 * share:.0f} % of the time."
    return finding(tables, "starved_step", "warning", last_step(tables.communication), message, *_samples(tables))


@rule
def host_bound(tables: Tables) -> list[Finding]:
    """The accelerator has done all that it was given before the host gives it more: it waits for launches.

    Reads the column ``idle``: of the moments of a step at which the host looked, the share at which nothing was left to do.
    """
    communication = tables.communication
    if "idle" not in communication or recent(communication)["step"].nunique() < 3:
        return []
    rows = recent(communication)
    known = rows[finite(rows["idle"])]
    share = float(known["idle"].mean()) if len(known) else 0.0
    waited = float((known["waited"] / (known["busy"] + known["exposed"])).median()) if len(known) else 0.0
    if share < 0.75 or waited > 0.2:  # one that waits for samples is idle for that
        return []
    message = f"The device is idle between launches: at {100 * share:.0f} % of the looks nothing was left for it to do."
    remedies: tuple[Remedy, ...] = ({"compile": "reduce-overhead"}, tables.multiplied("data.batch_size", 4, 128))
    return finding(tables, "host_bound", "warning", last_step(communication), message, *remedies)


def _samples(tables: Tables) -> list[Remedy]:
    """More processes that fetch them, or all in the device's memory: first where the config keeps them elsewhere."""
    workers = max(8, 2 * int(tables.settings.get("data.workers", 2)))
    remedies: list[Remedy] = [{"data.workers": workers}, {"data.placement": "device"}]
    return remedies if tables.settings.get("data.placement", "auto") == "auto" else remedies[::-1]


def _by_rank(communication: pd.DataFrame) -> pd.DataFrame:
    """Medians over recent readings, one row a rank; empty before there are three to go by."""
    known = communication[finite(communication["busy"])] if "busy" in communication else communication
    if known.empty or known["step"].nunique() < 3:
        return known.iloc[:0]
    return recent(known).groupby("rank")[["busy", "waited", "exposed", "payload", "network"]].median()


def _on_the_wire(communication: pd.DataFrame) -> tuple[float, float, float, float]:
    """What the rank that waits least waits, as a share of a step and in seconds; bytes it gives; Gb/s of the network or NaN."""
    typical = _by_rank(communication)
    if len(typical) < 2:
        return 0.0, 0.0, 0.0, float("nan")
    last = typical.sort_values("exposed").iloc[0]
    exposed = float(last["exposed"])
    return exposed / (float(last["busy"]) + exposed), exposed, float(typical["payload"].max()), float(typical["network"].min())
