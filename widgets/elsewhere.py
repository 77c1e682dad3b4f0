"""Training on several machines, from the panel: a line of controls, and the code that writes what starts the run there."""

from __future__ import annotations

from collections.abc import Mapping

from widgets.markup import Html, button, tag
from workbench.cluster.config import CLUSTERS


def controls(hosts: Html, off: bool) -> Html:
    """The line below Start: how many machines, and a button for each kind of cluster."""
    kinds = [
        button(name, "elsewhere", value=name, off=off, title=f"Write what starts this run by {name}; nothing is started")
        for name in CLUSTERS
    ]
    return tag("div", hosts, tag("span", cls="grow"), tag("span", "elsewhere by", cls="quiet small"), *kinds, cls="row wb-launch")


def code(config: str, kind: str, counts: Mapping[str, str]) -> str:
    """Python that writes it.

    Args:
        config: code of the config.
        kind: name of the cluster's kind.
        counts: its settings that the panel asks for, as code.
    """
    cluster = CLUSTERS.factory(kind)
    settings = ", ".join(f"{name}={value}" for name, value in counts.items())
    return (
        "from workbench import TrainConfig, launch_script\n"
        f"from {cluster.__module__} import {cluster.__name__}\n\n"
        f"config = {config}\n"
        f"script = launch_script(config, {cluster.__name__}({settings}))\n"
    )
