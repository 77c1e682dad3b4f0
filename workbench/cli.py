"""The command line: ``workbench train | launch | runs | show | follow | stop | pause | resume | report | pipeline``.

* :data:`COMMANDS` — a function a subcommand; its docstring is the help text.
* :func:`main` — parses, calls, and turns errors into one line on stderr: exit code 2 for a setting or argument that is wrong,
  1 for a run that failed, 130 after an interrupt.

Importing this module imports neither torch nor pandas: each command imports what it needs.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.run import Run

Command = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parsed = _parser().parse_args(arguments)
    from workbench import logs
    from workbench.errors import ConfigError, WorkbenchError

    try:
        logger = logs.configure()
        logger.debug("%s", parsed)
        command: Command = parsed.command
        return command(parsed)
    except WorkbenchError as error:
        logging.getLogger("workbench").debug("the command failed", exc_info=True)
        print(f"workbench: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except BrokenPipeError:  # `workbench runs | head`
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        print("workbench: interrupted.", file=sys.stderr)
        return 130


# -- commands -----------------------------------------------------------------------------------------------------------


def train(arguments: argparse.Namespace) -> int:
    """Train, in processes of their own. Ctrl-C stops the run in order, after a checkpoint; a second one ends it at once."""
    from workbench.run import launch as start
    from workbench.training.config import TrainConfig

    config = TrainConfig.from_yaml(arguments.config) if arguments.config else TrainConfig()
    run = start(config.override(arguments.set), nproc=arguments.nproc, restarts=arguments.restarts)
    print(run.path)
    return 0 if arguments.detach else _follow(run)


def launch(arguments: argparse.Namespace) -> int:
    """Print what starts a run on several machines: torchrun commands, a batch script, or manifests. Nothing is started here."""
    from workbench.cluster import CLUSTERS, launch_script
    from workbench.training.config import TrainConfig

    config = TrainConfig.from_yaml(arguments.config) if arguments.config else TrainConfig()
    given = {name: getattr(arguments, name) for name in ("nproc", "hosts", "restarts") if getattr(arguments, name) is not None}
    cluster = CLUSTERS.factory(arguments.print)(**given).override(arguments.cluster)
    script = launch_script(config.override(arguments.set), cluster)
    print(script)
    print(f"The run folder: {script.folder}", file=sys.stderr)
    return 0


def runs(arguments: argparse.Namespace) -> int:
    """List the runs, newest first."""
    from workbench.run import Run, runs_folder
    from workbench.terminal import runs_table

    found = [run for run in Run.all() if all(_matches(run, text) for text in arguments.filter)]
    if not found:
        print(f"No runs{' of that kind' if arguments.filter else ''} under {runs_folder()}.")
        return 0
    runs_table(found[: arguments.limit or None])
    return 0


def show(arguments: argparse.Namespace) -> int:
    """What a run is, how it went and what was found."""
    from workbench.run import Run
    from workbench.terminal import show_run

    show_run(Run.open(arguments.run))
    return 0


def follow(arguments: argparse.Namespace) -> int:
    """Show a run's progress until it ends. Ctrl-C leaves the run alone."""
    from workbench.run import Run

    return _follow(Run.open(arguments.run), stops=False)


def stop(arguments: argparse.Namespace) -> int:
    """Save a checkpoint and end; resume goes on from it."""
    return _post(arguments.run, "stop")


def pause(arguments: argparse.Namespace) -> int:
    """Wait at the next step boundary, until resume."""
    return _post(arguments.run, "pause")


def snapshot(arguments: argparse.Namespace) -> int:
    """Have a run on a GPU record the allocations of its next steps. Its folder's snapshots/ and the Inspector then show them."""
    from workbench.run import Run

    Run.open(arguments.run).memory_snapshot(arguments.steps)
    return 0


def resume(arguments: argparse.Namespace) -> int:
    """Go on with a run that was paused, stopped, failed or lost."""
    from workbench.run import Run

    run = Run.open(arguments.run).resume(nproc=arguments.nproc, restarts=arguments.restarts)
    return _follow(run) if arguments.follow else 0


def report(arguments: argparse.Namespace) -> int:
    """Write a run's page: one HTML file that needs nothing else."""
    from workbench.report import write_report
    from workbench.run import Run

    print(write_report(Run.open(arguments.run), arguments.output))
    return 0


def pipeline(arguments: argparse.Namespace) -> int:
    """Run notebooks as chained stages. What is done and unchanged is skipped; what was interrupted goes on."""
    from workbench.pipeline import PipelineConfig, run_pipeline

    config = PipelineConfig.from_yaml(arguments.file).change(arguments.set)
    done = run_pipeline(config, arguments.output, echo=lambda line: print(line, flush=True))
    for name, outputs in done.outputs.items():
        for key, value in outputs.items():
            print(f"{name}.{key} = {value}")
    return 0


COMMANDS: dict[str, Command] = {
    f.__name__: f for f in (train, launch, runs, show, follow, stop, pause, resume, snapshot, report, pipeline)
}


# -- parts --------------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    from workbench import __version__

    parser = argparse.ArgumentParser(
        prog="workbench", description="Train, inspect, prune and quantize PyTorch models.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"workbench {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    parsers = {}
    for name, command in COMMANDS.items():
        text = command.__doc__ or ""
        parsers[name] = commands.add_parser(name, help=text.partition(". ")[0].rstrip("."), description=text, allow_abbrev=False)
        parsers[name].set_defaults(command=command)

    for name in ("show", "follow", "stop", "pause", "resume", "snapshot", "report"):
        parsers[name].add_argument("run", metavar="RUN", help="the run's folder, its name, or the start of its name")
    setting: dict[str, Any] = {"action": "append", "default": [], "metavar": "NAME=VALUE"}
    parsers["train"].add_argument("--config", type=Path, metavar="FILE", help="settings as YAML; by default the defaults")
    parsers["train"].add_argument("--set", **setting, help="change a setting, e.g. optim.lr=1e-3; may be repeated")
    restarts: dict[str, Any] = {"type": _count, "metavar": "N"}
    parsers["train"].add_argument("--nproc", type=_positive, default=1, metavar="N", help="processes, one an accelerator (1)")
    parsers["train"].add_argument(
        "--restarts", default=0, **restarts, help="start again from the last checkpoint so often after a process was lost (0)"
    )
    parsers["train"].add_argument("--detach", action="store_true", help="print the run's folder and return at once")
    printed = parsers["launch"]
    printed.add_argument("config", nargs="?", type=Path, metavar="CONFIG", help="settings as YAML; by default the defaults")
    printed.add_argument("--set", **setting, help="change a setting, e.g. optim.lr=1e-3; may be repeated")
    printed.add_argument("--nproc", type=_positive, metavar="N", help="processes a host, one an accelerator (1)")
    printed.add_argument("--hosts", type=_positive, metavar="N", help="machines (1)")
    printed.add_argument("--restarts", **restarts, help="start all again so often after a rank was lost (3)")
    printed.add_argument("--print", required=True, metavar="KIND", help="torchrun, slurm or kubernetes")
    printed.add_argument(
        "--cluster", **setting, help="change a setting of that kind, e.g. partition=gpu, image=...; may be repeated"
    )
    parsers["runs"].add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="TEXT",
        help="part of a name, or status=running, failed ...; may be repeated",
    )
    parsers["runs"].add_argument("--limit", type=int, default=0, metavar="N", help="the newest N")
    parsers["resume"].add_argument(
        "--nproc", type=_positive, metavar="N", help="processes of the new start; by default as many as before"
    )
    parsers["resume"].add_argument("--restarts", default=0, **restarts, help="as for train (0)")
    parsers["resume"].add_argument("--follow", action="store_true", help="show its progress until it ends")
    parsers["snapshot"].add_argument("--steps", type=_positive, default=2, metavar="N", help="steps to record, at most 50 (2)")
    parsers["report"].add_argument("-o", "--output", type=Path, metavar="FILE", help="by default report.html in the run's folder")
    parsers["pipeline"].add_argument("file", metavar="FILE.yaml", help="the stages")
    parsers["pipeline"].add_argument("--set", **setting, help="change a stage's parameter, e.g. train.epochs=2; may be repeated")
    parsers["pipeline"].add_argument("--output", type=Path, metavar="FOLDER", help="where it keeps its state and results")
    return parser


def _positive(text: str) -> int:
    return _count(text, least=1)


def _count(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {least}")
    return int(text)


def _post(name: str, command: str) -> int:
    from workbench.run import Run

    Run.open(name).command(command)
    return 0


def _matches(run: Run, text: str) -> bool:
    key, equals, value = text.partition("=")
    return run.status == value if equals and key == "status" else text.casefold() in run.id.casefold()


def _follow(run: Run, stops: bool = True) -> int:
    """Show progress until the run ends; its exit code."""
    from workbench.terminal import Display

    interrupts = 0
    with Display(run) as display:
        while True:
            try:
                status = display.watch()
                break
            except KeyboardInterrupt:
                interrupts += 1
                if not stops:
                    display.say(f"The run goes on: workbench follow {run.id}")
                    return 0
                if interrupts > 1:
                    run.kill()
                    return 130
                run.stop()
                display.say("Stopping after the present step; Ctrl-C again ends it at once.")
    if status == "failed":
        print(f"workbench: the run {run.id} failed: {run.error}", file=sys.stderr)
        return 1
    if status == "lost":
        print(f"workbench: the processes of {run.id} are gone. Go on: workbench resume {run.id}", file=sys.stderr)
        return 1
    if status == "stopped":
        print(f"Stopped at step {run.progress.step}. Go on: workbench resume {run.id}")
        return 130 if interrupts else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
