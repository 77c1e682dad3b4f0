"""Data cards: one YAML file a data set, under ``datasets/``: source, licence, schema, loader.

A card is added by adding a file; nothing else changes. ``WORKBENCH_DATA`` names the folder where data lies that is not
shipped; by default ``~/.cache/workbench/data``.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field

from workbench.config import Config, load_yaml
from workbench.errors import unknown


class Card(Config):
    """Facts about a data set."""

    name: str
    title: str = Field(description="Name for people.")
    task: str = Field("classification", description="What is predicted.")
    source: str = Field(description="Where it comes from: a citation or an address.")
    licence: str = Field(description="Its licence, or what its publisher says of use.")
    loader: str = Field(description="'module:function' that returns its splits.")
    classes: tuple[str, ...] = Field((), description="Names of the classes, in label order.")
    samples: dict[str, int] = Field({}, description="Samples by split.")
    shape: tuple[int, ...] = Field((), description="Shape of one sample, channels first.")
    mean: tuple[float, ...] = Field((), description="Mean by channel, of values scaled to 0…1.")
    std: tuple[float, ...] = Field((), description="Standard deviation by channel, of values scaled to 0…1.")
    augment: tuple[str, ...] = Field((), description="Augmentations that suit it.")
    files: dict[str, dict[str, Any]] = Field(
        {}, description="Files it is read from, by path below the data folder, with their checksums."
    )


def cards_folder() -> Path:
    """``datasets/`` beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parent
    checkout = package.parent.parent / "datasets"
    return checkout if checkout.is_dir() else package / "cards"


@cache
def card_names() -> tuple[str, ...]:
    """Names of all cards."""
    return tuple(sorted(path.stem for path in cards_folder().glob("*.yaml")))


@cache
def read_card(name: str) -> Card:
    """The card of a data set.

    Raises:
        ConfigError: there is no card of that name, or it does not validate.
    """
    path = cards_folder() / f"{name}.yaml"
    if not path.is_file():
        raise unknown("data set", name, card_names())
    return Card(name=name, **load_yaml(path.read_text(encoding="utf-8"), str(path)))


def data_folder() -> Path:
    """Where data lies that is not shipped: ``WORKBENCH_DATA``, by default ``~/.cache/workbench/data``."""
    return Path(os.environ.get("WORKBENCH_DATA") or "~/.cache/workbench/data").expanduser().resolve()
