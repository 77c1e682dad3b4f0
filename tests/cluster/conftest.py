"""What the tests of scripts share with those of training."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def until() -> Callable[..., Any]:
    """Wait for a condition; fail after some seconds."""

    def wait(condition: Callable[[], Any], seconds: float) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, "it never came"
            time.sleep(0.05)
        return found

    return wait


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
