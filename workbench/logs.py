"""What the workbench logs, and how much: ``WORKBENCH_LOG_LEVEL``."""

from __future__ import annotations

import logging
import os

from workbench.errors import unknown

LEVELS = ("debug", "info", "warning", "error", "critical")


def configure(default: str = "warning") -> logging.Logger:
    """The logger ``workbench``, at the level that ``WORKBENCH_LOG_LEVEL`` names, writing to stderr.

    Raises:
        ConfigError: there is no such level.
    """
    name = (os.environ.get("WORKBENCH_LOG_LEVEL") or default).lower()
    if name not in LEVELS:
        raise unknown("log level (WORKBENCH_LOG_LEVEL)", name, LEVELS)
    logger = logging.getLogger("workbench")
    logger.setLevel(name.upper())
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
    return logger
