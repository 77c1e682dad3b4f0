"""One attempt at a run, from its folder: build everything, train, save, and say how it ended."""

from __future__ import annotations

import os
import traceback
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch

from workbench import events, launcher
from workbench.allocator import ran_out
from workbench.artefact import save_model
from workbench.data.batches import Batches
from workbench.data.order import derive_seed
from workbench.distributed import World, barrier, process_group
from workbench.errors import WorkbenchError
from workbench.losses import make_loss
from workbench.models import ModelConfig, build_model
from workbench.probes import PROBES, Probe, ProbeSet
from workbench.registry import find_source
from workbench.run import Run
from workbench.training import decisions, environment, repro, sources
from workbench.training.advice import advise
from workbench.training.balance import SETTING, Balance
from workbench.training.budget import Budget, clock
from workbench.training.communication import check_communication, decide_bucket
from workbench.training.config import TrainConfig
from workbench.training.control import Command, Control
from workbench.training.distillation import Distillation
from workbench.training.economy import check_memory
from workbench.training.failure import in_words
from workbench.training.fitting import settle_memory
from workbench.training.objective import Objective
from workbench.training.placement import draw_apart, with_others
from workbench.training.process import flags, interruptible
from workbench.training.recorder import Recorder, say_failed
from workbench.training.settling import settle_compile, settle_precision
from workbench.training.stages import Stage, divided
from workbench.training.subject import Subject, load_subject
from workbench.training.tensor_parallel import divide
from workbench.training.trainer import Trainer


def execute(run: Run, attempt: int, *, data: Any = None) -> Trainer:
    """Carry out attempt number ``attempt`` at a run, in this process as one rank of its group.

    Every way it can end is said in the run folder: finished, stopped, or failed with the error in words.

    Args:
        data: splits or torch datasets in place of the config's data.

    Raises:
        WorkbenchError: whatever failed, in words.
    """
    rank = int(os.environ.get("RANK", 0))
    recorder: Recorder | None = None
    trainer: Trainer | None = None
    config: TrainConfig | None = None
    with ExitStack() as stack:
        if rank == 0:
            stack.callback(launcher.release, run.path, attempt)
        try:
            config = _config(run)
            world = stack.enter_context(process_group(config.device))
            recorder = Recorder(run.path, attempt, world.rank)
            stack.callback(recorder.close)
            control = Control(run.path, world, _replay(run.path))
            stack.callback(control.close)
            world = with_others(world, config)
            with flags(config, world), interruptible(control):
                trainer = _build(config, run, recorder, control, world, data, stack)
                trainer.fit()
                _finish(trainer, run, recorder, world)
            return trainer
        except BaseException as error:
            trace = traceback.format_exc()
            short = trainer if ran_out(error) else None
            snapshot = short.snapshots.failed(short.step) if short is not None else None
            advice = advise(short, error) if short is not None else None
            said = in_words(error, config, advice, snapshot) if config is not None else error
            failed = events.Failed(
                step=trainer.step if trainer else 0,
                error=type(said).__name__,
                message=str(said) if isinstance(said, WorkbenchError) else f"{type(said).__name__}: {said}",
                traceback=trace,
            )
            with suppress(WorkbenchError, OSError):
                if recorder is not None:
                    recorder.emit(failed)
                else:
                    say_failed(run.path, attempt, rank, failed)
            if said is error:
                raise
            raise said from error


def _config(run: Run) -> TrainConfig:
    """The run's, with the mesh of this start."""
    config: TrainConfig = run.config
    attempt = launcher.Attempt.latest(run.path)
    return config if attempt is None or attempt.mesh is None else config.override({"mesh": attempt.mesh})


def _build(
    config: TrainConfig, run: Run, recorder: Recorder, control: Control, world: World, data: Any, stack: ExitStack
) -> Trainer:
    """Settle what the config leaves open, each question once there is what it goes by, and put the trainer together.

    Args:
        stack: takes what is to be undone afterwards, whether or not all of it succeeds.
    """
    config = sources.as_kept(config, run.path)
    decided = decisions.Decisions(run.resolved)
    subject = load_subject(config, run.path, world, decided, data)
    model, batches, mesh = subject.model, subject.batches, subject.mesh
    stack.callback(batches.close)
    stack.callback(lambda: subject.precision.release())  # the one that is settled then
    choice = settle_precision(config, subject, decided)
    _divide_layers(config, subject, run.path, decided)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    stage = _stage(subject)
    probes = _probes(config, subject, run.path, recorder, decided)
    stack.callback(probes.detach)
    probes.attach(model, stage.computes if stage is not None else None)
    objective = Objective(model, make_loss(config.loss), config.penalties, _distillation(config, subject, run.path))
    stack.callback(objective.detach)
    compile_mode = settle_compile(config, subject, objective, choice, decided)
    precision = subject.precision
    budget = _budget(config, subject, probes, run.path, recorder, control, decided)
    balance = _balance(config, batches, run.path, recorder, world, decided)
    check_communication(config, mesh.sizes, precision.name)
    exchange = decide_bucket(config, objective, batches, precision, compile_mode, mesh, decided)
    config = config.model_copy(update={"communication": exchange})
    check_memory(config.memory, world.device, compile_mode, sharded=not mesh.plain)
    memory = settle_memory(config, objective, batches, precision.name, compile_mode, world, decided)
    config = config.model_copy(update={"memory": memory})
    trainer = Trainer(config, objective, batches, precision, compile_mode, budget, recorder, control, mesh, balance, stage)
    stack.callback(trainer.snapshots.close)

    torch.manual_seed(derive_seed(config.seed, mesh.copy))
    draw_apart(world, config.seed, mesh.copy)
    if run.checkpoints:
        trainer.restore(run.checkpoints[-1])
    if world.main:
        decided.write(run.path)
        environment.write_environment(run.path, world)
        _say_started(trainer, run, recorder, parameters)
    barrier(world)
    return trainer


def _divide_layers(config: TrainConfig, subject: Subject, folder: Path, decided: decisions.Decisions) -> None:
    """Leave this rank its part of the layers that ranks compute together."""
    mesh = subject.mesh
    if mesh["tensor"] > 1:
        plan = find_source(config.mesh.plan, folder)
        whole = divide(subject.model, plan, mesh.along("tensor"), next(subject.batches.evaluation())[0][:2])
        if whole:
            decided.decide("mesh.plan", "whole: " + "; ".join(whole), "what doesn't divide evenly is computed by every rank")


def _stage(subject: Subject) -> Stage | None:
    """Leave this rank its stage of the model; None where there is but one."""
    mesh = subject.mesh
    if mesh["pipeline"] == 1:
        return None
    example = next(subject.batches.evaluation())[0][:2]
    return divided(subject.model, mesh["pipeline"], mesh.place["pipeline"], example, subject.precision.autocast)


def _probes(config: TrainConfig, subject: Subject, folder: Path, recorder: Recorder, decided: decisions.Decisions) -> ProbeSet:
    probes: dict[str, tuple[Probe, int]] = {}
    for name, wanted in config.probes.by_name().items():
        every = decisions.decide_every(
            name, wanted.every, subject.world.device, subject.total_steps, subject.batches.steps_per_epoch, decided
        )
        probes[name] = (PROBES.create(find_source(name, folder), wanted), every)
    return ProbeSet(probes, recorder.reading)


def _budget(
    config: TrainConfig,
    subject: Subject,
    probes: ProbeSet,
    folder: Path,
    recorder: Recorder,
    control: Control,
    decided: decisions.Decisions,
) -> Budget:
    """The budget of what probes read, which writes down and says what it finds.

    A deterministic run keeps to the rule: which steps are read must not hang on how long they take.
    """
    world = subject.world

    def changed(event: events.ReadingsTimed, reason: str) -> None:
        for name in budget.auto:
            decided.revise(f"probes.{name}.every", event.every, reason)
        if world.main:
            decided.write(folder)
            recorder.emit(event)

    auto = [name for name, wanted in config.probes.by_name().items() if wanted.every == "auto" and not config.deterministic]
    post = control.post if world.main else None
    steps = subject.total_steps, subject.batches.steps_per_epoch
    budget = Budget(probes, auto, config.probes.overhead, *steps, clock(world.device), post, changed, decisions.LIGHT)
    return budget


def _distillation(config: TrainConfig, subject: Subject, folder: Path) -> Distillation | None:
    """The teacher that the run folder keeps, and the terms to learn from it by."""
    if config.distill is None:
        return None
    target = subject.batches.target
    teacher = build_model(ModelConfig(name=config.distill.teacher), root=folder).to(target.device)
    if target.channels_last:
        teacher.to(memory_format=torch.channels_last)
    x = next(subject.batches.evaluation())[0][:2]
    with subject.precision.autocast():
        return Distillation(config.distill, subject.model, teacher, x)


def _balance(
    config: TrainConfig, batches: Batches, folder: Path, recorder: Recorder, world: World, decided: decisions.Decisions
) -> Balance:
    """The balance of shares, which writes down and says when they change."""

    def reshared(sizes: tuple[int, ...], finding: events.Finding) -> None:
        decided.revise(SETTING, list(sizes), finding.message)
        if world.main:
            decided.write(folder)
            recorder.emit(finding)

    return Balance(config.balance, batches, world, reshared)


def _say_started(trainer: Trainer, run: Run, recorder: Recorder, parameters: int) -> None:
    """The attempt's first event; and why there was another before, or a run that this one mends."""
    step, world = trainer.step, trainer.world
    recorder.emit(
        events.AttemptStarted(
            step=step,
            total_steps=trainer.total_steps,
            steps_per_epoch=trainer.batches.steps_per_epoch,
            world_size=world.size,
            device=torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
            parameters=parameters,
        )
    )
    before = launcher.Attempt.latest(run.path, before=recorder.attempt)
    if before is not None and before.failure:
        words = f"{before.failure} The run went on from step {step}, on {world.size} rank(s)."
        recorder.emit(events.Finding(step=step, name="restarted", severity="warning", message=words))
    if recorder.attempt == 1 and (words := sources.read_remedy(run.path)):
        recorder.emit(events.Finding(step=step, name="remedied", severity="info", message=words))


def _finish(trainer: Trainer, run: Run, recorder: Recorder, world: World) -> None:
    trainer.probes.detach()
    trainer.objective.detach()
    trainer.economy.undo(state=False)
    trainer.average.apply()
    trainer.model.eval()
    recorder.flush(durable=True)
    state = trainer.parallel.state()
    if world.main:
        repro.write_code(run.path, run.config, run.events, world.size)
        if trainer.stopped and trainer.step < trainer.total_steps:
            recorder.emit(events.Stopped(step=trainer.step))
        else:
            save_model(trainer.model, run.path, state=state)
            recorder.emit(events.Finished(step=trainer.step, metrics=trainer.metrics))


def _replay(folder: Path) -> list[tuple[int, Command]]:
    return [(step, Command(name, settings)) for step, name, settings in sources.read_replay(folder)]
