"""How much to remove, and in which order: the search behind a pruning ratio.

* :class:`Ranking` — all units of all groups in one queue, the least important first; a pruned model is a prefix of it.
* :func:`shortest` — the shortest prefix that removes enough, where counting is exact; :func:`topped_up` — single groups' units
  in place of its last one, where that one is large.
* :func:`nearest` — the prefix that comes nearest, where measuring is noisy and dear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from workbench.compress.coupling import Cuts, Group

_PRECISION = 1e-3
"""Of the target: what is removed beyond it may be this much without a further trial."""


class Ranking:
    """Units of ``groups`` in the order in which they go: by their rank among the groups of their scope, so that every scope loses
    the same share; a rank over all would empty whole layers. Weights shift that: what has a low weight goes earlier.

    Args:
        scores: one a unit, by group; a group without any stays whole.
        weights: by group, what its units' ranks are multiplied with.
        fixed: the share of its units that a group loses whatever else happens, by group.
        most: the share of its units that any other group loses at most.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        scores: Sequence[torch.Tensor],
        fixed: Mapping[int, float] | None = None,
        most: float = 1.0,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.groups, self.most = groups, most
        weights = weights or [1.0] * len(groups)
        self.fixed = dict(fixed or {})
        self.order = [score.argsort(stable=True).tolist() for score in scores]
        self.queue: list[int] = []
        by_scope: dict[str, list[tuple[float, int]]] = {}
        for index, (group, score) in enumerate(zip(groups, scores, strict=True)):
            if index not in self.fixed:
                by_scope.setdefault(group.scope, []).extend((value, index) for value in score.tolist())
        ranked = [
            ((place + 0.5) / len(units) * weights[index], index)
            for units in by_scope.values()
            for place, (_, index) in enumerate(sorted(units, key=lambda unit: unit[0]))
        ]
        self.queue = [index for _, index in sorted(ranked, key=lambda unit: unit[0])]

    def __len__(self) -> int:
        return len(self.queue)

    def cuts(self, length: int, extra: Mapping[int, int] | None = None) -> Cuts:
        """What goes with the first ``length`` units of the queue, rounded and bounded group by group.

        Args:
            extra: steps that single groups lose beyond that, by group.
        """
        wanted = [0] * len(self.groups)
        for index in self.queue[:length]:
            wanted[index] += 1
        steps = []
        for index, group in enumerate(self.groups):
            if index in self.fixed:
                count = group.removable(round(self.fixed[index] * len(group.units)))
            else:
                count = group.removable(wanted[index], self.most)
                if extra and index in extra:
                    count = group.removable(count + extra[index] * group.step, self.most)
            channels = sorted(channel for unit in self.order[index][:count] for channel in group.units[unit])
            if channels:
                steps.append((group.name, group.is_out, channels))
        return steps


def shortest(removed: Callable[[int], float], length: int, wanted: float) -> int | None:
    """The shortest prefix, within :data:`_PRECISION`, of which ``removed`` is at least ``wanted``; None if there is none.

    ``removed`` grows with the prefix, in steps. Interpolation and bisection take turns: each alone can be slow.
    """
    at_low = removed(0)
    if at_low >= wanted:
        return 0
    at_high = removed(length)
    if at_high < wanted:
        return None
    low, high = 0, length
    turn = 0
    while high - low > 1 and at_high - wanted > _PRECISION:
        share = (wanted + _PRECISION / 2 - at_low) / max(at_high - at_low, 1e-12) if turn % 3 < 2 else 0.5
        middle = min(max(low + round(share * (high - low)), low + 1), high - 1)
        value = removed(middle)
        if value >= wanted:
            high, at_high = middle, value
        else:
            low, at_low = middle, value
        turn += 1
    return high


def topped_up(removed: Callable[[Mapping[int, int]], float], groups: Iterable[int], wanted: float) -> dict[int, int]:
    """Steps of single groups that bring ``removed`` to ``wanted``: the largest that fits each time, at last the smallest.

    Args:
        removed: the share that goes with the given steps by group; it is less than ``wanted`` without any.
        groups: those that may lose more.
    """
    base = removed({})
    gains = {group: removed({group: 1}) - base for group in groups}
    steps: dict[int, int] = {}
    share = base
    while share < wanted and (left := {group: gain for group, gain in gains.items() if gain > 0}):
        fitting = {group: gain for group, gain in left.items() if gain <= wanted - share}
        group = max(fitting, key=fitting.__getitem__) if fitting else min(left, key=left.__getitem__)
        grown = removed(steps | {group: steps.get(group, 0) + 1})
        if grown <= share:  # nothing is left of it
            gains[group] = 0.0
            continue
        steps[group] = steps.get(group, 0) + 1
        share = grown
    return steps


def nearest(
    measured: Callable[[int], float],
    work: Callable[[int], float],
    length: int,
    wanted: float,
    tolerance: float,
    trials: int,
    whole: float = 1.0,
) -> tuple[int, float]:
    """The prefix whose ``measured`` share of what was there comes nearest to ``wanted``, and that share.

    Time is taken to be a line over the share of the work that is left, which is counted exactly: fitted to all that was measured,
    what lies near ``wanted`` weighing most, it averages noise and the steps in which time falls with channels.

    Args:
        measured: the share of the time that is left without a prefix's channels; noisy, and dear.
        work: the share of the work that is left.
        tolerance: relative to ``wanted``: near enough to stop.
        trials: prefixes measured at most.
        whole: the share without a prefix; less than 1 where something went before.

    Returns:
        No prefix, if ``whole`` is near enough or less.
    """
    if whole <= wanted * (1 + tolerance):
        return 0, whole
    shares = {0: whole}
    aim = wanted
    for _ in range(trials):
        guess = shortest(lambda k: 1 - work(k), length, 1 - aim)
        guess = length if guess is None else max(guess, 1)
        tried = {work(k): k for k in shares}
        if (same := tried.get(work(guess))) is not None:  # we have been there: look on the side where the answer must be
            side = 1 if shares[same] > wanted else -1
            beyond = range(guess + side, length + 1 if side > 0 else 0, side)
            found = next((k for k in beyond if work(k) not in tried), None)
            if found is None:
                break
            guess = found
        shares[guess] = measured(guess)
        if abs(shares[guess] / wanted - 1) <= tolerance:
            break
        aim = _line_at([(work(k), share) for k, share in shares.items()], wanted)
    best = min((k for k in shares if k), key=lambda k: abs(shares[k] / wanted - 1))
    return best, shares[best]


def _line_at(points: Sequence[tuple[float, float]], wanted: float) -> float:
    """The work at which the weighted least-squares line through ``points`` (work, time) takes the time ``wanted``, in (0, 1)."""
    weights = [1 / (0.02 + abs(time - wanted)) for _, time in points]
    total = sum(weights)
    mean_work = sum(weight * work for weight, (work, _) in zip(weights, points, strict=True)) / total
    mean_time = sum(weight * time for weight, (_, time) in zip(weights, points, strict=True)) / total
    both = sum(w * (work - mean_work) * (time - mean_time) for w, (work, time) in zip(weights, points, strict=True))
    alone = sum(w * (work - mean_work) ** 2 for w, (work, _) in zip(weights, points, strict=True))
    slope = max(both / alone if alone else 1.0, 0.2)  # noise may turn the line over
    return min(max(mean_work + (wanted - mean_time) / slope, 0.005), 0.995)
