"""Rules on the loss and the metrics, step by step."""

from __future__ import annotations

from workbench.diagnosis.base import Remedy, Tables, finding, finite, first_loss, rule, smooth_loss
from workbench.events import Finding


@rule
def non_finite_loss(tables: Tables) -> list[Finding]:
    """The loss became NaN or infinite."""
    history = tables.history
    if "loss" not in history or history.empty:
        return []
    broken = history[~finite(history["loss"])]
    if broken.empty or (len(broken) < 3 and finite(history["loss"]).iloc[-1]):
        return []
    first = int(broken["step"].iloc[0])
    message = f"The loss is not a finite number in {len(broken)} of {len(history)} steps, first at step {first}."
    cure: Remedy = {**tables.slower(10), "clip.mode": "fixed"}
    remedies = [{**cure, "precision": "fp32"}, cure] if tables.settings.get("precision") == "fp16" else [cure]
    return finding(tables, "non_finite_loss", "error", first, message, *remedies, {**tables.slower(100), "clip.mode": "fixed"})


@rule
def diverging_loss(tables: Tables) -> list[Finding]:
    """The loss rises well above its best, and above where it began or on and on."""
    loss = smooth_loss(tables.history)
    if len(loss) < 30:
        return []
    best, now, start = float(loss.min()), float(loss.iloc[-1]), first_loss(tables.history)
    noise = float(tables.history["loss"].diff().abs().median())
    quarter = loss.iloc[-max(5, len(loss) // 8) :]
    rising = float(quarter.iloc[-1]) > float(quarter.iloc[0]) + noise
    if now > best + 5 * noise and ((now > 2 * best and rising and now > 0.5 * start) or now > 1.5 * start):
        message = f"The loss diverges: it is {now:.3g}, after a best of {best:.3g}."
        remedies = ({**tables.slower(f), "clip.mode": "dynamic", "schedule.warmup": 0.1} for f in (5, 50))
        return finding(tables, "diverging_loss", "error", _now(tables), message, *remedies)
    return []


@rule
def plateau(tables: Tables) -> list[Finding]:
    """The loss stays near where it began: nothing is learnt. A loss that has fallen and levelled out is no fault."""
    loss = smooth_loss(tables.history)
    if len(loss) < 150:
        return []
    start, half = first_loss(tables.history), loss.iloc[len(loss) // 2 :]
    third = len(half) // 3
    before, after = float(half.iloc[:third].median()), float(half.iloc[-third:].median())
    if start > 0 and after > 0.95 * start and abs(before - after) < 0.02 * abs(before):
        message = f"The loss has hardly moved in {len(loss)} steps: {start:.3g} at first, {after:.3g} now."
        timid = 0 < tables.lr < 1e-4
        better: Remedy = {"optim.lr": 1e-3} if timid else {"optim.name": "adamw", "optim.lr": 1e-3}
        return finding(tables, "plateau", "warning", _now(tables), message, better, {"optim.name": "adamw", "optim.lr": 1e-3})
    return []


@rule
def noisy_loss(tables: Tables) -> list[Finding]:
    """The loss jumps from step to step by so much of what it began with that its steps undo one another."""
    history = tables.history
    loss = smooth_loss(history)
    if len(loss) < 100:
        return []
    start, half = first_loss(history), history["loss"][finite(history["loss"])].iloc[len(loss) // 2 :]
    noise = float(half.diff().abs().median()) / 0.954  # of independent draws, in standard deviations of one
    level = float(half.median())
    if start <= 0 or noise < NOISY * start or level < 0.2 * start:
        return []
    message = f"The loss is noisy: it jumps by {noise:.3g} from step to step, about a level of {level:.3g}."
    larger = tables.multiplied("data.batch_size", 8, 16)
    return finding(
        tables, "noisy_loss", "warning", _now(tables), message, larger, {**larger, **tables.slower(3)}, tables.slower(10)
    )


NOISY = 0.25
"""Standard deviation of the loss between steps, as a share of the first loss, that is noise rather than learning."""


@rule
def overfitting(tables: Tables) -> list[Finding]:
    """The held-out loss has risen for three evaluations while the training loss went on falling."""
    history = tables.history
    if "val_loss" not in history or history["val_loss"].notna().sum() < 4:
        return []
    loss, start = smooth_loss(history), first_loss(history)
    held = history[finite(history["val_loss"])]
    place = int(held["val_loss"].to_numpy().argmin())
    best, after = held.iloc[place], held.iloc[place + 1 :]
    if len(after) < 3 or start <= 0:
        return []
    lowest, now = float(best["val_loss"]), float(after["val_loss"].iloc[-3:].median())
    trained, then = float(loss.iloc[-1]), float(loss.loc[: held.index[place]].iloc[-1])
    risen = bool((after["val_loss"].iloc[-3:] > lowest + 0.02 * start).all())
    if not risen or now < 1.1 * lowest or trained > 0.9 * then or trained > 0.5 * now:
        return []
    epoch = int(best["epoch"])
    message = (
        f"The model over-fits: held-out loss has risen from {lowest:.3g} (epoch {epoch}) to {now:.3g}, "
        f"while training loss fell from {then:.3g} to {trained:.3g}."
    )
    return finding(tables, "overfitting", "warning", _now(tables), message, *_against_overfitting(tables, epoch))


def _against_overfitting(tables: Tables, epoch: int) -> list[Remedy]:
    decay = {"optim.weight_decay": min(0.5, 100 * float(tables.settings.get("optim.weight_decay", 5e-4)))}
    classes = tables.settings.get("loss.name", "cross_entropy") == "cross_entropy"
    return [{"data.mix": "mixup", **decay} if classes else decay, {"epochs": epoch}]


def _now(tables: Tables) -> int:
    return int(tables.history["step"].iloc[-1])
