"""For every test: a runs folder of its own, few threads, no deadline, and no process left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before anything imports torch: small models on few cores, and the same number of threads in every process of a test.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Where there is no AVX-512, oneDNN's kernel for the weights' gradient of a strided 1×1 convolution with fewer than eight input
# channels, stored channels-last, gives wrong numbers and writes past its buffer (jit_1x1:avx2, seen with PyTorch 2.14.1). Small
# ResNets have such layers. Its AVX kernels are right.
if os.path.exists("/proc/cpuinfo") and "avx512f" not in Path("/proc/cpuinfo").read_text():
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX")

import hypothesis
import psutil
import pytest

if TYPE_CHECKING:
    from tests.forked import Nursery

# How long an example takes says more of the machine's other work than of the code.
hypothesis.settings.register_profile("any pace", deadline=None)
hypothesis.settings.load_profile("any pace")

# A shell starts background jobs with Ctrl-C ignored, and children inherit that; tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long go first: begun last, one would keep a worker busy long after the others are done."""
    long = {item.path for item in items if item.path.parent.name == "training" or item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(autouse=True)
def _runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_RUNS", str(tmp_path / "runs"))


@pytest.fixture(autouse=True)
def _no_worker_outlives_its_test() -> Iterator[None]:
    yield
    workers = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any("workbench.worker" in part for part in process.cmdline()):
                process.kill()
                workers.append(process)
    psutil.wait_procs(workers, timeout=10)
    if "workbench.launcher" in sys.modules:
        for child in sys.modules["workbench.launcher"]._children.values():
            child.poll()


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    from tests.forked import Nursery

    made = Nursery()
    yield made
    made.close()


@pytest.fixture(scope="module")
def forked(nursery: Nursery) -> Iterator[None]:
    """Whatever the tests of this module launch is forked from a process that has imported the engine."""
    from workbench import launcher

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "subprocess", nursery)
        yield


@pytest.fixture(autouse=True)
def _no_fork_outlives_its_test(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "nursery" in request.fixturenames:
        request.getfixturevalue("nursery").clear()
