"""One attempt at a run, from its folder: build everything, train, save, and say how it ended."""

from __future__ import annotations

import os
import re
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from workbench import events, launcher
from workbench.allocator import ran_out
from workbench.artefact import save_model
from workbench.data.batches import Batches, Shard, Target, derive_seed
from workbench.data.mix import mix_targets
from workbench.data.splits import Arrays, Splits, load_splits
from workbench.distributed import World, barrier, process_group
from workbench.errors import ConfigError, DeviceError, MemoryExhausted, ModelError, RunError, WorkbenchError
from workbench.losses import check_labels, check_output, make_loss, takes_labels
from workbench.models import ModelConfig, build_model
from workbench.probes import PROBES, Probe, ProbeSet
from workbench.registry import find_source
from workbench.run import Run
from workbench.training import decisions, environment, fp8, repro, sources
from workbench.training.advice import Advice, advise
from workbench.training.balance import SETTING, Balance, first_shares
from workbench.training.checkpoint import random_state, set_random_state
from workbench.training.communication import check_communication, decide_bucket
from workbench.training.config import TrainConfig
from workbench.training.control import Command, Control
from workbench.training.distillation import Distillation
from workbench.training.economy import check_memory
from workbench.training.fitting import GIB, sample_batch, settle_memory
from workbench.training.mesh import Mesh
from workbench.training.objective import Objective
from workbench.training.padding import settle_padding
from workbench.training.placement import check_precision, draw_apart, place_layers, with_others
from workbench.training.precision import Precision, layers_for_fp8, settle_fp8
from workbench.training.recorder import Recorder, say_failed
from workbench.training.speed import MEASURED_FROM, measured_compile, measured_fp8, measured_precision
from workbench.training.stages import divided
from workbench.training.tensor_parallel import divide
from workbench.training.trainer import Trainer
from workbench.training.trial import Trial


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
            with _flags(config, world), _interruptible(control):
                trainer = _build(config, run, recorder, control, world, data)
                stack.callback(trainer.batches.close)
                stack.callback(trainer.precision.release)
                stack.callback(trainer.snapshots.close)
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


def _build(config: TrainConfig, run: Run, recorder: Recorder, control: Control, world: World, data: Any) -> Trainer:
    config = sources.as_kept(config, run.path)
    decided = decisions.Decisions(run.resolved)
    open_questions = {name for name in ("precision", "compile") if getattr(config, name) == "auto" and name not in decided.made}
    splits = load_splits(config.data, data, root=run.path)
    precision = Precision(decisions.decide_precision(config, world.device, decided), *world.devices)
    torch.manual_seed(derive_seed(config.seed))
    model = build_model(fit_to_data(config, splits), root=run.path)
    images = len(splits.sample_shape) == 3
    mesh = Mesh(config.mesh.arranged(world.size), world)
    _check_mesh(config, mesh, precision)
    check_precision(precision.name, world)
    channels_last = config.channels_last and images and mesh.plain  # parts are rows of contiguous weights
    splits = settle_padding(config.data, model, splits, world.device, precision.dtype, decided)
    place_layers(model, config, world, decided)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    shares = first_shares(config, mesh.sizes, world, config.compile, decided)
    shard = Shard(mesh.copy, mesh.copies, config.accumulate, shares)
    target = Target(world.device, precision.dtype, channels_last)
    placement = decisions.decide_placement(config, splits, world.device, decided)
    batches = Batches(splits, config.data.override({"placement": placement}), shard, target, config.seed)
    total_steps = min(config.epochs * batches.steps_per_epoch, config.max_steps or 10**12)
    _check_model(model, batches, config, precision)
    measurable = mesh.plain and not world.others and total_steps >= MEASURED_FROM and config.distill is None
    choice = None
    may_be_fp8 = "precision" in open_questions and measurable and fp8.lacking(world.device) is None
    if precision.name == "fp8" or may_be_fp8:
        choice = layers_for_fp8(model, batches, precision)
    if "precision" in open_questions and measurable and config.compile == "off":
        x, y = sample_batch(batches)
        x = x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        trial = Trial(Objective(model, make_loss(config.loss)), (x, y), config.optim, choice=choice)
        precision = Precision(
            measured_precision(trial, precision.name, total_steps, config.accumulate, world, decided), world.device
        )
        batches.target = replace(target, dtype=precision.dtype)
    if precision.name == "fp8":
        settle_fp8(model, precision, choice, decided)
    if mesh["tensor"] > 1:
        whole = divide(model, find_source(config.mesh.plan, run.path), mesh.along("tensor"), next(batches.evaluation())[0][:2])
        if whole:
            decided.decide("mesh.plan", "whole: " + "; ".join(whole), "what doesn't divide evenly is computed by every rank")
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    stage = None
    if mesh["pipeline"] > 1:
        example = next(batches.evaluation())[0][:2]
        stage = divided(model, mesh["pipeline"], mesh.place["pipeline"], example, precision.autocast)

    probes: dict[str, tuple[Probe, int]] = {}
    for name, wanted in config.probes.by_name().items():
        every = decisions.decide_every(name, wanted.every, world.device, total_steps, decided)
        probes[name] = (PROBES.create(find_source(name, run.path), wanted), every)
    probe_set = ProbeSet(probes, recorder.reading)
    probe_set.attach(model, stage.computes if stage is not None else None)
    captured = mesh.plain and not world.others and config.balance.shares != "speed"
    compile_mode = decisions.decide_compile(config, world.device, total_steps, decided, captured=captured)
    objective = Objective(
        model, make_loss(config.loss), config.penalties, _distillation(config, model, batches, precision, run.path)
    )
    if "compile" in open_questions and compile_mode != "off" and measurable:
        trial = Trial(objective, sample_batch(batches), config.optim)
        compile_mode = measured_compile(trial, compile_mode, precision.name, total_steps, config.accumulate, world, decided)
    if may_be_fp8 and precision.name == "bf16" and compile_mode != "off" and choice is not None and choice.layers:
        trial = Trial(objective, sample_batch(batches), config.optim, choice=choice)
        name = measured_fp8(trial, compile_mode, precision.name, total_steps, config.accumulate, world, decided)
        if name == "fp8":
            precision = Precision(name, world.device)
            settle_fp8(model, precision, choice, decided)

    def reshared(sizes: tuple[int, ...], finding: events.Finding) -> None:
        decided.revise(SETTING, list(sizes), finding.message)
        if world.main:
            decided.write(run.path)
            recorder.emit(finding)

    balance = Balance(config.balance, batches, world, reshared)
    check_communication(config, mesh.sizes, precision.name)
    exchange = decide_bucket(config, objective, batches, precision, compile_mode, mesh, decided)
    config = config.model_copy(update={"communication": exchange})
    check_memory(config.memory, world.device, compile_mode, sharded=not mesh.plain)
    memory = settle_memory(config, objective, batches, precision.name, compile_mode, world, decided)
    config = config.model_copy(update={"memory": memory})
    trainer = Trainer(config, objective, batches, precision, compile_mode, probe_set, recorder, control, mesh, balance, stage)

    torch.manual_seed(derive_seed(config.seed, mesh.copy))
    draw_apart(world, config.seed, mesh.copy)
    if run.checkpoints:
        trainer.restore(run.checkpoints[-1])
    if world.main:
        decided.write(run.path)
        environment.write_environment(run.path, world)
        recorder.emit(
            events.AttemptStarted(
                step=trainer.step,
                total_steps=trainer.total_steps,
                steps_per_epoch=batches.steps_per_epoch,
                world_size=world.size,
                device=_device_name(world.device),
                parameters=parameters,
            )
        )
        before = launcher.Attempt.latest(run.path, before=recorder.attempt)
        if before is not None and before.failure:
            words = f"{before.failure} The run went on from step {trainer.step}, on {world.size} rank(s)."
            recorder.emit(events.Finding(step=trainer.step, name="restarted", severity="warning", message=words))
        if recorder.attempt == 1 and (words := sources.read_remedy(run.path)):
            recorder.emit(events.Finding(step=trainer.step, name="remedied", severity="info", message=words))
    barrier(world)
    return trainer


def _check_mesh(config: TrainConfig, mesh: Mesh, precision: Precision) -> None:
    """Refuse what a divided model can't do."""
    if not mesh.plain and precision.name == "fp16":
        raise ConfigError(
            "precision='fp16' scales the loss, and ranks that hold parts of a model do not agree on when it overflowed.",
            "Take precision='bf16' or 'fp32', or replicate the model: mesh.shard=1, mesh.tensor=1.",
        )
    if precision.name == "fp8" and mesh["tensor"] > 1:
        raise ConfigError(
            f"precision='fp8' scales tensors by their largest number, and mesh.tensor={mesh['tensor']} leaves no rank a whole.",
            f"Take mesh.shard={mesh['tensor']}, or precision='bf16'.",
        )
    for name in ("tensor", "pipeline"):
        for part in ("penalties", "distill"):
            if mesh[name] > 1 and getattr(config, part):
                raise ConfigError(
                    f"{part} looks at layers as a whole, and mesh.{name}={mesh[name]} divides them.",
                    f"Take mesh.shard={mesh[name]} instead.",
                )


def _distillation(
    config: TrainConfig, model: nn.Module, batches: Batches, precision: Precision, root: Path
) -> Distillation | None:
    """The teacher that the run folder keeps, and the terms to learn from it by."""
    if config.distill is None:
        return None
    teacher = build_model(ModelConfig(name=config.distill.teacher), root=root).to(batches.target.device)
    if batches.target.channels_last:
        teacher.to(memory_format=torch.channels_last)
    x = next(batches.evaluation())[0][:2]
    with precision.autocast():
        return Distillation(config.distill, model, teacher, x)


def fit_to_data(config: TrainConfig, splits: Splits) -> Any:
    """The model's config with classes and input channels filled in from the data."""
    values = config.model.model_dump()
    if values["num_classes"] is None:
        values["num_classes"] = splits.num_classes
    shape = splits.sample_shape
    if values["in_channels"] is None and len(shape) == 3:
        values["in_channels"] = shape[0]
    if values["in_channels"] is None and len(shape) == 2 and splits.first_input.is_floating_point():
        values["in_channels"] = shape[1]  # a series [L, F]
    return type(config.model)(**values)


@torch.no_grad()
def _check_model(model: nn.Module, batches: Batches, config: TrainConfig, precision: Precision) -> None:
    """One small batch through model and loss before anything is compiled or trained."""
    _check_ids(model, batches.splits)
    x, y, count = next(batches.evaluation())
    x, y = (part[: min(2, count)] if isinstance(part, torch.Tensor) else part for part in (x, y))
    model.eval()
    try:
        with precision.autocast():
            output = model(x)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        shape = list(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
        raise ModelError(
            f"The model {config.model.name!r} fails on an input of shape {shape}: {error}",
            "Set mesh.devices so that layers whose outputs are added or joined lie on one device."
            if config.mesh.devices and "same device" in str(error)
            else "Set model.in_channels or model.args to fit the data.",
        ) from error
    finally:
        model.train()
    loss, output, y = make_loss(config.loss), output.float().cpu() if isinstance(output, torch.Tensor) else output, y.cpu()
    check_output(loss, output, y, config.loss)
    if takes_labels(config.loss, output, y):
        batches.watch(partial(check_labels, classes=output.shape[1], config=config.loss), output.shape[1])
        if config.data.mix != "off":  # a loss of labels need not take probabilities
            check_output(loss, output, mix_targets(y, y, torch.ones(len(y)), output.shape[1]), config.loss)


def _check_ids(model: nn.Module, splits: Splits) -> None:
    """Token ids against the model's embedding: on an accelerator, one out of range ends the process without a word."""
    embedding = next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)
    for part in (splits.train, splits.eval):
        if embedding is None or not isinstance(part, Arrays) or part.x.dtype != torch.int64:
            return
        if (largest := int(part.x.max())) >= embedding.num_embeddings:
            raise ModelError(
                f"The data has the token id {largest}, but the model's embedding holds {embedding.num_embeddings}.",
                f"Set model.args.vocab_size={largest + 1}.",
            )


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


def in_words(
    error: BaseException, config: TrainConfig, advice: Advice | None = None, snapshot: Path | None = None
) -> BaseException:
    """An error that says what to do, where we know; otherwise the error itself."""
    text = str(error)
    if ran_out(error):
        asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", text)
        what = f"Out of memory with data.batch_size={config.data.batch_size}{f', asking for {asked[1]}' if asked else ''}."
        if advice is not None:
            what += f" A step takes about {advice.needed / GIB:.3g} GiB, and there are {advice.available / GIB:.3g} for it."
        if snapshot is not None:
            what += f" What held the memory then is in snapshots/{snapshot.name}: memory.snapshot_page(run) draws it."
        if advice is not None and advice.remedies:
            fitting = "; ".join(map(str, advice.remedies))
            return MemoryExhausted(what, f"Set one of these, each proved by a step to fit: {fitting}.")
        untested = [f"accumulate={config.accumulate * 2}", f"data.batch_size={max(1, config.data.batch_size // 2)}"]
        untested[1:1] = ["precision=bf16"] if config.precision in ("fp32", "tf32") else []
        untested[1:1] = ["memory.recompute=1"] if not config.memory.recompute else []
        return MemoryExhausted(what, f"Try {', or '.join(untested)}; none of it could be tested.")
    if isinstance(error, RuntimeError) and "does not have a deterministic implementation" in text:
        return DeviceError(
            f"deterministic=true, but {text.split()[0]} has no algorithm here that repeats bit for bit.",
            "Replace the layer that calls it (adaptive pooling: by AvgPool2d or a mean), or set deterministic=false.",
        )
    if isinstance(error, KeyboardInterrupt):
        return RunError("Interrupted.", "resume() goes on from the last checkpoint.")
    return error


@contextmanager
def _flags(config: TrainConfig, world: World) -> Iterator[None]:
    """Process-wide switches and random generators, given back as they were: a notebook's kernel is not ours."""
    generators = random_state(*world.devices)
    benchmark, deterministic = torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not config.deterministic
    try:
        yield
    finally:
        set_random_state(generators, *world.devices)
        torch.backends.cudnn.benchmark = benchmark
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32


@contextmanager
def _interruptible(control: Control) -> Iterator[None]:
    """The first Ctrl-C stops the run in order, after the present step; a second one interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, before)
        control.post("stop")

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _replay(folder: Path) -> list[tuple[int, Command]]:
    return [(step, Command(name, settings)) for step, name, settings in sources.read_replay(folder)]
