"""``python -m workbench.worker RUN [--attempt N]``: one rank of a run, alone or under torchrun."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path

from workbench import launcher
from workbench.errors import WorkbenchError
from workbench.run import Run


def main() -> int:
    parser = argparse.ArgumentParser(description="Run one rank of a workbench run.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--attempt", type=int)
    arguments = parser.parse_args()
    from workbench import logs
    from workbench.training.session import execute

    logs.configure()
    run = Run.open(arguments.run)
    attempt = arguments.attempt
    if attempt is None:
        attempt = _claim(run.path)
    try:
        execute(run, attempt)
    except WorkbenchError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        _leave(1)
    except BaseException:
        traceback.print_exc()
        _leave(1)
    return 0


def _claim(folder: Path) -> int:
    """The attempt's number when nobody claimed one for us: rank 0 does, its peers wait for it."""
    from workbench.distributed import init_distributed

    world = init_distributed(device=Run(folder).config.device)
    if world.size == 1:
        return launcher.claim(folder, 1)
    import torch.distributed as dist

    box = [launcher.claim(folder, world.size) if world.main else 0]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _leave(status: int) -> None:
    """End at once: after a failure peers may never join the collectives that an orderly exit would wait for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
