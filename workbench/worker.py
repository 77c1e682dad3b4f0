"""``python -m workbench.worker RUN [--attempt N]``: one rank of a run; alone, under our supervisor, or under torchrun.

A rank that has a parent to watch over it ends itself as soon as that parent is gone: nobody would end it, or notice its end.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from workbench import launcher
from workbench.errors import DeviceError, MemoryExhausted, RunError, WorkbenchError
from workbench.run import FOLDERS, Run
from workbench.supervisor import PERMANENT, UNFIT

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl(2): the signal to get when the parent ends."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Run one rank of a workbench run.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--attempt", type=int, help="its number, where one was claimed for us")
    parser.add_argument("--given", type=Path, help="the run as it was prepared: rank 0 copies it when RUN isn't there yet")
    arguments = parser.parse_args()
    if "LOCAL_RANK" in os.environ:
        _end_with(int(os.environ.get("WORKBENCH_SUPERVISOR", os.getppid())))
    from workbench import logs
    from workbench.training.session import execute

    logs.configure()
    if arguments.given is not None:
        _settle(arguments.given, arguments.run)
    run = Run.open(arguments.run)
    attempt = arguments.attempt
    if attempt is None:
        attempt = _claim(run.path)
    try:
        execute(run, attempt)
    except WorkbenchError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        _leave(UNFIT if isinstance(error, DeviceError) and not isinstance(error, MemoryExhausted) else PERMANENT)
    except BaseException:
        traceback.print_exc()
        _leave(1)
    return 0


def _claim(folder: Path) -> int:
    """The attempt's number when nobody claimed one for us: rank 0 does, its peers wait for it."""
    from workbench.distributed import init_distributed

    world = init_distributed(device=Run(folder).config.device)
    agent = launcher.Process.of(os.getppid()) if "LOCAL_RANK" in os.environ else None  # torchrun's
    if not world.main:
        return _told(0)
    before = launcher.Attempt.latest(folder)
    number = launcher.claim(folder, world.size, supervisor=agent)
    if before is not None and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        said = "".join(f" One of them said: {event.message}" for event in Run(folder).failures(before.number)[:1])
        words = f"A rank or its host was lost; what torchrun printed on the hosts says which.{said}"
        launcher.release(folder, before.number, before.failure or words)
    return _told(number) if world.size > 1 else number


def _told(number: int) -> int:
    """Rank 0's number, on every rank."""
    import torch.distributed as dist

    box = [number]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _settle(given: Path, folder: Path, patience: float = 300.0) -> None:
    """Make the run folder of what was given, on rank 0; wait for it on the others.

    Raises:
        RunError: it does not appear within ``patience`` seconds.
    """
    deadline = time.monotonic() + patience
    while not (folder / "config.yaml").exists():
        if os.environ.get("RANK", "0") == "0":
            shutil.rmtree(unfinished := folder.with_name(f"{folder.name}.tmp"), ignore_errors=True)
            # Kubernetes mounts each file as a link into a hidden folder.
            shutil.copytree(given, unfinished, ignore=shutil.ignore_patterns("..*"))
            for name in FOLDERS:
                (unfinished / name).mkdir(exist_ok=True)
            unfinished.chmod(0o700)
            unfinished.rename(folder)
        elif time.monotonic() > deadline:
            raise RunError(
                f"The run folder {folder} did not appear in {patience:g} s.", "Do all hosts see the same folder there?"
            )
        else:
            time.sleep(0.2)


def _end_with(parent: int) -> None:
    """End when the process ``parent`` does, without a word: its end is no error of ours."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # all ranks at once: none takes another's end for an error

    def watch() -> None:  # on other systems; and for a parent that was gone before we asked to be told
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="workbench-parent", daemon=True).start()


def _leave(status: int) -> None:
    """End at once: after a failure peers may never join the collectives that an orderly exit would wait for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
