"""Training on several machines, from the panel: a line of controls, and the code that writes what starts the run there."""

from __future__ import annotations

from collections.abc import Mapping

from widgets.markup import Html, select, tag
from workbench.cluster.config import CLUSTERS


def controls(hosts: Html) -> Html:
    """The line below Start: how many machines, and the kind of cluster to write a script for."""
    kinds = [("", "script for …"), *((name, name) for name in CLUSTERS)]
    return tag(
        "div",
        hosts,
        tag("span", cls="grow"),
        select(kinds, "", "elsewhere", "Write what starts this run by"),
        cls="row wb-launch",
    )


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
