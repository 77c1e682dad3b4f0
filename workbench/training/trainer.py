"""The training loop.

:class:`Trainer` holds a run's model, data and optimizer on one rank; :meth:`Trainer.fit` is the loop. What surrounds it has
modules of its own: batches, precision, losses on their way to the host (:mod:`meter`), commands (:mod:`control`), checkpoints,
probes, and what is written to the run folder (:mod:`recorder`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench import events
from workbench.data.batches import Batch, Batches
from workbench.distributed import sum_over_ranks
from workbench.errors import NonFiniteLoss
from workbench.optim import AdaptiveGradientClipper, ClipConfig, Schedule, make_optimizer
from workbench.probes import StepContext
from workbench.probes.holders import RunParts
from workbench.training import checkpoint
from workbench.training.average import WeightAverage
from workbench.training.balance import Balance
from workbench.training.budget import READ, Budget
from workbench.training.clock import StepClock
from workbench.training.config import TrainConfig
from workbench.training.control import Command, Control
from workbench.training.economy import Economy
from workbench.training.mesh import Mesh
from workbench.training.meter import Meter, Window
from workbench.training.objective import Objective
from workbench.training.parallel import parallelize
from workbench.training.precision import Precision
from workbench.training.recorder import Recorder
from workbench.training.snapshots import Snapshots
from workbench.training.stages import Stage


class Trainer:
    """A run on one rank.

    Args:
        config: of the run.
        objective: model and loss on the device, probes attached, not yet wrapped.
        batches: this rank's.
        precision, compile_mode: as decided.
        budget: of what the probes cost, and with it the probes.
        balance: of the ranks' shares.
    """

    def __init__(
        self,
        config: TrainConfig,
        objective: Objective,
        batches: Batches,
        precision: Precision,
        compile_mode: str,
        budget: Budget,
        recorder: Recorder,
        control: Control,
        mesh: Mesh,
        balance: Balance,
        stage: Stage | None = None,
    ) -> None:
        self.parallel = parallelize(
            objective,
            mesh,
            compile_mode,
            communication=config.communication,
            accumulate=config.accumulate,
            deterministic=config.deterministic,
            stage=stage,
        )
        self.config, self.objective, self.batches, self.precision = config, objective, batches, precision
        self.probes, self.budget = budget.probes, budget
        self.recorder, self.control, self.mesh, self.world = recorder, control, mesh, mesh.world
        self.model, self.trained = objective.model, objective.trained
        self.optimizer = make_optimizer(self.trained, config.optim)
        self.economy = Economy(config.memory, self.model, self.optimizer)
        self.clip(config.clip)
        self.average = WeightAverage(self.model, config.ema, self.parallel.owns)
        # Telling the compiler of a new step imports all of it, seconds that other runs need not spend.
        self._captured = compile_mode in ("reduce-overhead", "max-autotune")
        planned = config.epochs * batches.steps_per_epoch
        self.total_steps = min(planned, config.max_steps or planned)
        self.schedule = Schedule(config.schedule, config.optim.lr, self.total_steps)
        self.meter = Meter(config.log_every, mesh.world, self._report)
        self.clock, self.balance = StepClock(mesh.world.device, batches, self.parallel), balance
        parts = self._parts(compile_mode, stage)
        self.probes.join(parts)
        self.snapshots = Snapshots(recorder.folder, mesh.world, parts, self._say)
        self.step = 0
        self.metrics: dict[str, float] = {}
        self.stopped = False
        self._saved = -1

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return self.step // self.batches.steps_per_epoch

    # -- the loop -------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train from the present step to the last, or until stopped."""
        self.model.train()
        self.snapshots.ask(self.config.probes.memory.snapshot_steps, self.step)
        self._go_on()
        while self.step < self.total_steps and not self.stopped:
            for micro_batches in self.batches.epoch(self.epoch, start=self.step % self.batches.steps_per_epoch):
                self.train_step(micro_batches)
                self.boundary()
                if self.stopped or self.step == self.total_steps:
                    break
        self.control.drain()
        self.balance.drain()
        self.meter.flush()
        self.probes.collect(wait=True)

    def train_step(self, micro_batches: Iterable[Batch]) -> None:
        """One optimizer step: forward and backward over the micro-batches, then the update. Nothing waits for the device."""
        rate = self._set_rate()
        self.clock.begin()
        self.budget.begin(self.step + 1)
        if self._captured:
            torch.compiler.cudagraph_mark_step_begin()
        watched = self.balance.watching or self.probes.timed

        def backward(loss: Tensor, last: bool) -> None:
            self.precision.backward(self.clock.watch(loss) if watched and last else loss)

        accumulate, parts = self.config.accumulate, self.batches.parts(self.step)
        total = self.parallel.step(micro_batches, accumulate, parts, self._forward, backward)
        timing = self.clock.gathered()
        self.balance.take(self.step, timing)
        self.probes.read(StepContext(self.step + 1, self.precision.scale, timing))
        self.snapshots.computed(self.step + 1)
        with self.clipper or nullcontext():
            self.precision.step(self.optimizer)
        self.probes.updated()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.average.update(self.step)
        self.meter.add(self.step, (self.step - 1) // self.batches.steps_per_epoch + 1, rate, total)
        self.clock.end()

    def boundary(self) -> None:
        """Between two steps: what is due by step, by epoch, or on command."""
        self.recorder.progressed(self.step)
        self.balance.after(self.step)
        if self.snapshots.recording:
            self.budget.interrupted()
        self.snapshots.after(self.step)
        self.budget.after()
        commands = self.control.due(self.step)
        for command in commands:
            self.apply(command)
        end_of_epoch = self.step % self.batches.steps_per_epoch == 0
        last = self.step == self.total_steps
        if last or (end_of_epoch and _due(self.epoch, self.config.eval_every)):
            self.evaluate()
        policy = self.config.checkpoint
        if last or (end_of_epoch and _due(self.epoch, policy.every_epochs)) or _due(self.step, policy.every_steps):
            self.save()

    # -- commands -------------------------------------------------------------------------------------------------

    def apply(self, command: Command) -> None:
        """Carry out a command, after the same step on every rank."""
        self.budget.interrupted()
        if command.name == READ:
            self.budget.apply(self.step, **command.settings)
            return
        if command.name == "set":
            self._set(command.settings)
        applied = events.CommandApplied.model_validate(
            {"step": self.step, "id": command.id, "name": command.name, "settings": command.settings}
        )
        if command.name == "set" and self._saved == self.step:
            self._saved = -1  # the checkpoint of this step was written before the change
            self.save()
        self._emit(applied)
        match command.name:
            case "save":
                self.save()
            case "snapshot":
                self.snapshots.ask(int(command.settings.get("steps", 1)), self.step)
            case "stop":
                self.save()
                self.stopped = True
            case "pause":
                self._pause()

    def _set(self, settings: Mapping[str, Any]) -> None:
        if "lr" in settings:
            self.schedule.set_rate(settings["lr"], self.step)
        if "peak" in settings:
            self.schedule.set_peak(settings["peak"])
        if "weight_decay" in settings:
            for group in self.optimizer.param_groups:
                group["weight_decay"] = settings["weight_decay"] if group["weight_decay"] else 0.0
        clipping = {name: settings[f"clip_{name}"] for name in ("mode", "max_norm") if f"clip_{name}" in settings}
        if clipping:
            self.clip(self.clipping.override(clipping))

    def clip(self, config: ClipConfig) -> None:
        """Clip gradients so from the next step on."""
        self.clipping = config
        self.clipper = None if config.mode == "off" else AdaptiveGradientClipper(config.max_norm, config.mode)
        if self.clipper is not None and self.mesh["pipeline"] > 1:
            self.clipper.others = self.mesh.along("pipeline").get_group()

    def _pause(self) -> None:
        self.meter.flush()
        self.probes.collect(wait=True)
        self._emit(events.Paused(step=self.step))
        while not self.stopped:
            self.recorder.progressed(self.step)
            for command in self.control.wait():
                if command.name == "resume":
                    self._emit(events.Resumed(step=self.step))
                    self._go_on()
                    return
                if command.name != "pause":
                    self.apply(command)

    # -- evaluation, state ----------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """Metrics on the held-out samples, over all ranks: ``val_loss``, and for class labels ``accuracy``.

        Of the averaged weights, where there is an average.
        """
        self.meter.flush()
        self._share_buffers()
        self.model.eval()
        with self.average.swapped():
            self.metrics = self._measure()
        self.model.train()
        self._emit(events.Evaluated(step=self.step, epoch=self.epoch, metrics=self.metrics))
        self._go_on()
        return self.metrics

    @torch.no_grad()
    def _measure(self) -> dict[str, float]:
        sums = torch.zeros(4, dtype=torch.float64, device=self.world.device)
        for x, y, count in self.batches.evaluation():
            with self.precision.autocast():
                output = self.parallel.output(x)
                if output is None:
                    continue
                output = output[:count]
                loss = self.objective.loss(output, y[:count])
            classes = output.ndim == 2 and y.ndim == 1 and not y.is_floating_point()
            right = (output.argmax(1) == y[:count]).sum() if classes else torch.zeros_like(loss)
            counts = torch.tensor([count, classes], dtype=torch.float64).to(loss.device, non_blocking=True)
            sums += torch.cat([torch.stack([loss.double() * count, right.double()]), counts])
        loss_sum, right_sum, count_sum, classes = sum_over_ranks(sums, self.world).tolist()
        return {"val_loss": loss_sum / count_sum} | ({"accuracy": right_sum / count_sum} if classes else {})

    def save(self) -> Path:
        """Checkpoint this step; what was said of it so far is on disk first."""
        path = self.recorder.folder / "checkpoints" / f"step-{self.step}"
        if self._saved == self.step:
            return path
        self.meter.flush()
        self.probes.collect(wait=True)
        self.recorder.flush(durable=True)
        self._share_buffers()
        state = checkpoint.training_state(self.trained, self.optimizer, self._extra(), self.mesh, self.parallel.owns)
        facts = {"step": self.step, "lr_scale": self.schedule.scale, "metrics": self.metrics, "world_size": self.world.size}
        if self.clipping != self.config.clip:
            facts["clip"] = self.clipping.model_dump()
        checkpoint.save(path.parent, self.step, state, facts, self.world, self.config.checkpoint.keep)
        self._saved = self.step
        self._emit(events.CheckpointSaved(step=self.step, path=f"checkpoints/step-{self.step}"))
        self._go_on()
        return path

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint."""
        facts = checkpoint.read_facts(path)
        if "clip" in facts:
            self.clip(ClipConfig(**facts["clip"]))
        extra = checkpoint.restore(path, self.trained, self.optimizer, self._extra(), self.world, self.parallel.owns)
        self.step = self._saved = facts["step"]
        self.control.skip_to(self.step)
        self.schedule.scale, self.metrics = facts["lr_scale"], facts["metrics"]
        self.average.load({name.removeprefix("ema."): value for name, value in extra.items()})
        for name, value in self.parallel.carried().items():
            value.copy_(extra.get(f"exchange.{name}", value))  # a rank that the checkpoint does not know begins anew
        if self.clipper is not None and "clipper" in extra:
            self.clipper.state = extra["clipper"].to(self.world.device)
        if "scaler" in extra:
            scale, growth = extra["scaler"].tolist()
            self.precision.scaler.load_state_dict(
                {**self.precision.scaler.state_dict(), "scale": scale, "_growth_tracker": int(growth)}
            )

    def _extra(self) -> dict[str, Tensor]:
        """Tensors of the state beside model, optimizer and random generators; a template before the first step."""
        extra = {f"ema.{name}": value for name, value in self.average.state.items()}
        extra |= {f"exchange.{name}": value for name, value in self.parallel.carried().items()}
        if self.clipper is not None and self.clipper.mode == "dynamic":
            extra["clipper"] = torch.zeros(3) if self.clipper.state is None else self.clipper.state.cpu()
        if self.precision.scaler.is_enabled():
            state = self.precision.scaler.state_dict()
            extra["scaler"] = torch.tensor([state["scale"], float(state["_growth_tracker"])], dtype=torch.float64)
        return extra

    # -- small parts ----------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Time counts again, after something that was no step."""
        self.meter.start()
        self.clock.start()
        self.budget.interrupted()

    def _share_buffers(self) -> None:
        self.parallel.share((*self.model.buffers(), *self.average.buffers))

    @contextmanager
    def _forward(self) -> Iterator[None]:
        with self.snapshots.forward(self.step + 1), self.probes.forward(), self.economy.forward(), self.precision.autocast():
            yield

    def _parts(self, compile_mode: str, stage: Stage | None) -> RunParts:
        """What holds memory here, to be told apart."""
        taught = self.objective.distillation
        named: dict[str, Callable[[], Iterable[Tensor]]] = {
            "average": lambda: self.average.state.values(),
            "exchange": lambda: self.parallel.carried().values(),
            "data": lambda: self.batches.waiting,
        }
        if taught is not None:
            named["teacher"] = lambda: (*taught.teacher.parameters(), *taught.teacher.buffers())
        return RunParts(
            trained=self.trained,
            optimizer=self.optimizer,
            named=named,
            buckets=self.parallel.buckets,
            views=self.parallel.views,
            compiled=compile_mode != "off",
            flying=1 if stage is None else self.mesh["pipeline"] - self.mesh.place["pipeline"],
        )

    def _set_rate(self) -> float:
        rate = self.schedule.rate(self.step)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        return rate

    def _report(self, window: Window, losses: list[float]) -> None:
        samples = len(losses) * self.config.data.batch_size
        self._emit(
            events.Steps(
                step=window.last,
                first=window.first,
                loss=[loss if math.isfinite(loss) else None for loss in losses],
                lr=window.rates,
                epoch=window.epoch,
                samples_per_s=samples / window.seconds if window.seconds else None,
            )
        )
        bad = next((index for index, loss in enumerate(losses) if not math.isfinite(loss)), None)
        # fp16 may overflow now and then: the scaler skips such a step. A whole window of them is divergence.
        if bad is not None and (not self.precision.scaler.is_enabled() or not any(map(math.isfinite, losses))):
            raise NonFiniteLoss(
                f"The loss became {losses[bad]} at step {window.first + bad} (learning rate {window.rates[bad]:g}).",
                f"Try a lower rate (optim.lr={self.config.optim.lr / 10:g}), clipping (clip.mode=dynamic), or precision=fp32; "
                "resume() would go on from the last checkpoint.",
            )

    def _say(self, words: str) -> None:
        self._emit(events.Finding(step=self.step, name="memory_snapshot", severity="info", message=words))

    def _emit(self, event: events.Event) -> None:
        if self.world.main:
            self.recorder.emit(event)


def _due(count: int, every: int) -> bool:
    return every > 0 and count > 0 and count % every == 0
