"""From a model and its settings to a pruned model: :class:`Plan` ranks what can go, searches how much, and cuts."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from typing import Any

import torch
from torch import nn

from workbench.compress.cost import count_macs
from workbench.compress.coupling import Couplings, Cuts, Group, cut, explained, survivors
from workbench.compress.criteria import Evidence, batches_of, scored_by
from workbench.compress.latency import floor_ratio_of, latency_of, timed_call
from workbench.compress.pruning_config import LatencyConfig, PruneConfig
from workbench.compress.sample import one_sample
from workbench.compress.search import Ranking, nearest, shortest, topped_up
from workbench.compress.surgery import config_sizes, reshaped, set_config
from workbench.errors import ConfigError, ModelError, unknown
from workbench.models.structure import check_module, count_parameters, is_channels_last, lay_out, structure_of

_WITHIN = 0.01
"""Removed beyond the ratio, at most; else a remark says why."""
_BACK = 8
"""Units given back, at most, for single groups' steps in their place where one unit is more than that."""
_NEAR = 0.03
"""Of the wanted latency: a candidate this near ends the search; what is left covers the noise of measuring again."""
_LANDS = 0.1
"""Of the wanted latency: farther from it, the search has failed or a remark says so."""


class Plan:
    """A model with its coupled groups ranked, from which prefixes can be cut.

    Args:
        original: the model of which the ratio is a fraction, where ``model`` is what earlier steps left of it; by default
            ``model`` itself.

    Attributes:
        source: a copy of the model, in evaluation mode.
        x: the sample that it is traced with (1, ...).
        groups: what can be pruned; ``scores`` holds one tensor a group, a score a unit.
        whole: why other layers stay whole.
    """

    def __init__(
        self, model: nn.Module, config: PruneConfig, example: Any = None, data: Any = None, original: nn.Module | None = None
    ) -> None:
        check_module(model)
        _refuse(model)
        self.model, self.config = model, config
        self.source = copy.deepcopy(model).eval().requires_grad_(True)  # coupling is traced through autograd
        self.x = one_sample(self.source, example)
        self.original = self.source if original is None else copy.deepcopy(original).to(self.x.device).eval()
        self.round_to, self.remarks = _rounding(config, self.x.device)
        ignored = _matching(self.source, config.ignored)
        self.heads = config.attention == "heads"
        self.couplings = Couplings(self.source, self.x, ignored, self.round_to, self.heads)
        self.whole = self.couplings.whole
        evidence = Evidence(self.couplings.model)
        if data is not None:
            evidence.batches = batches_of(data, config.samples, self.x.device)
        score = scored_by(config.criterion, evidence)
        self.groups: list[Group] = []
        self.scores: list[torch.Tensor] = []
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            for group in self.couplings.groups:
                channels = score(group.members)
                if channels is None:
                    self.whole[group.layers[0]] = f"the criterion {config.criterion!r} has nothing to say of it"
                    continue
                self.groups.append(group)
                self.scores.append(torch.stack([channels[list(unit)].mean() for unit in group.units]))
        self.ranking = Ranking(self.groups, self.scores, self._fixed(), config.max_layer_ratio, self._weights())

    def search(self) -> tuple[Cuts, dict[str, Any]]:
        """The least pruning that meets the target, and what the record says of it."""
        if not self.groups:
            raise ModelError(
                f"None of {self._name}'s layers can be pruned{self._because()}.",
                self._remedy("Pass a model with layers between its first and last, or quantize it instead."),
            )
        if self.config.target == "latency":
            return self._to_latency()
        removed = self._prefixes(self.config.target)
        wanted = self.config.ratio
        length = shortest(removed, len(self.ranking), wanted)
        if length is None:
            most = removed(len(self.ranking))
            raise ModelError(
                f"{wanted:.1%} of the {self.config.target} can't be removed from {self._name}: "
                f"at most {most:.1%}{self._because()}.",
                self._remedy("Ask for less, set round_to=1, or ignore fewer layers."),
            )
        cuts, share = self.ranking.cuts(length), removed(length)
        free = [index for index in range(len(self.groups)) if index not in self.ranking.fixed]
        for shorter in range(length - 1, max(length - _BACK, 0) - 1, -1):
            if share <= wanted + _WITHIN:
                break
            steps = topped_up(partial(removed, shorter), free, wanted)
            if wanted <= (finer := removed(shorter, steps)) < share:
                cuts, share = self.ranking.cuts(shorter, steps), finer
        if wanted and share > wanted + _WITHIN:
            cause = "what goes at once is larger than that"
            if length == 0:
                cause = "ratios alone remove so much" if self.ranking.fixed else "earlier steps removed so much"
            self._remark(f"{share:.1%} of the {self.config.target} went, for {wanted:.1%}: {cause}.")
        return cuts, {"removed": share}

    def apply(self, cuts: Cuts, found: dict[str, Any]) -> nn.Module:
        """The model without the channels of ``cuts``, with the record of it."""
        record = {
            "kind": "prune",
            "config": self.config.model_dump(mode="json"),
            "example": list(self.x.shape),
            **found,
            "round_to": self.round_to,
            "before": self._costs(self.source),
        }
        if self.original is not self.source:
            record["original"] = self._costs(self.original)
        layers, positions = survivors(self.source, self.x, cuts, self.heads)
        pruned = reshaped(
            copy.deepcopy(self.model), layers, lambda name, old, shape: old.detach().flatten()[positions[name].to(old.device)]
        )
        sizes = config_sizes(self.model, pruned)
        set_config(pruned, sizes)
        if is_channels_last(self.model):
            lay_out(pruned, self.x.device)
        with explained(self.model):  # some couplings show only when the pruned model runs
            record["after"] = self._costs(pruned)
        if self.config.target == "latency":
            record["latency"] = self._measured_latency(pruned)
            record["removed"] = record["latency"]["removed"]
            if abs((1 - record["removed"]) / (1 - self.config.ratio) - 1) > _LANDS:
                self._remark(f"Timed again, {record['removed']:.1%} of the latency went, for {self.config.ratio:.1%}.")
        record |= {"layers": layers, "sizes": sizes, "whole": self.whole, "remarks": self.remarks}
        pruned.structure = structure_of(self.model).then(record)  # type: ignore[assignment]
        return pruned

    # Targets -------------------------------------------------------------------------------------------------------------

    def _costs(self, model: nn.Module) -> dict[str, int]:
        return {"parameters": count_parameters(model), "macs": count_macs(model, self.x)}

    def _prefixes(self, target: str) -> Callable[..., float]:
        """The share of the target that a prefix (and single groups' further steps) removes."""
        removed = self._removed(target)
        return lambda length, extra=None: removed(self.ranking.cuts(length, extra))

    def _removed(self, target: str) -> Callable[[Cuts], float]:
        """The share of the target that cuts remove; each is tried once."""

        def measure(model: nn.Module) -> int:
            return count_parameters(model) if target == "parameters" else count_macs(model, self.x)

        total = measure(self.original)
        seen: dict[tuple[tuple[str, int], ...], float] = {}

        def removed(cuts: Cuts) -> float:
            key = tuple((name, len(channels)) for name, _, channels in cuts)
            if key not in seen:
                seen[key] = 1 - measure(cut(self.source, self.x, cuts, self.heads)) / total
            return seen[key]

        return removed

    def _weights(self) -> list[float] | None:
        """For each group, what one of its units saves of the target, to the power -``economy``."""
        if not self.config.economy:
            return None
        saved = self._removed("parameters" if self.config.target == "parameters" else "macs")
        return [saved([(group.name, group.is_out, list(group.units[0]))]) ** -self.config.economy for group in self.groups]

    def _to_latency(self) -> tuple[Cuts, dict[str, Any]]:
        settings, wanted = self.config.latency, 1 - self.config.ratio
        removed = self._prefixes("macs")
        baseline = self._timed(self.original)[0]

        def share(length: int) -> float:
            candidate = cut(self.source, self.x, self.ranking.cuts(length), self.heads).eval()
            times = latency_of({"after": self._timed(candidate)[0], "before": baseline}, 10_000, settings.seconds)
            return floor_ratio_of(times["after"], times["before"])

        begun = 1.0 if self.original is self.source else share(0)
        length, left = nearest(share, lambda k: 1 - removed(k), len(self.ranking), wanted, _NEAR, settings.trials, begun)
        if left > wanted * (1 + _LANDS):
            raise ModelError(
                f"{self.config.ratio:.1%} of the latency of {self._name} can't be removed: "
                f"at most {1 - left:.1%}{self._because()}.",
                "Ask for less, set round_to='auto', or time a larger batch (latency={'batch': 32}): the rest of the time doesn't "
                "depend on channels.",
            )
        return self.ranking.cuts(length), {}

    def _measured_latency(self, pruned: nn.Module) -> dict[str, Any]:
        """The original and the pruned model timed anew, in turns."""
        calls = {"before": self._timed(self.original), "after": self._timed(copy.deepcopy(pruned).eval())}
        times = latency_of({name: call for name, (call, _) in calls.items()}, 10_000, self.config.latency.seconds)
        medians = {f"{name}_ms": sorted(values)[len(values) // 2] for name, values in times.items()}
        return {
            **medians,
            "removed": 1 - floor_ratio_of(times["after"], times["before"]),
            "device": torch.cuda.get_device_name(self.x.device) if self.x.is_cuda else "cpu",
            "threads": torch.get_num_threads(),
            "form": calls["after"][1],
            "batch": self.config.latency.batch,
            "rounds": len(times["after"]),
        }

    def _timed(self, model: nn.Module) -> tuple[Callable[[], Any], str]:
        settings: LatencyConfig = self.config.latency
        x = self.x.repeat(settings.batch, *[1] * (self.x.dim() - 1))
        if is_channels_last(self.model):
            x = x.to(memory_format=torch.channels_last)
        return timed_call(model, x, settings.form, torch.bfloat16 if settings.precision == "bf16" else torch.float32)

    # Words ---------------------------------------------------------------------------------------------------------------

    def _remark(self, text: str) -> None:
        self.remarks.append(text)
        warnings.warn(text, stacklevel=4)

    @property
    def _name(self) -> str:
        return type(self.model).__name__

    def _fixed(self) -> dict[int, float]:
        """The shares of single layers, by group; a name that fits only layers that stay whole is refused."""
        fixed: dict[int, float] = {}
        for pattern, share in self.config.ratios.items():
            named = _matching(self.source, [pattern])
            hits = [index for index, group in enumerate(self.groups) if named.intersection(group.layers)]
            if not hits and share:
                reasons = "; ".join({f": {reason}" for layer, reason in self.whole.items() if layer in named})
                raise ConfigError(
                    f"ratios[{pattern!r}]={share}: nothing that it names can be pruned{reasons}.",
                    "Name convolutions or linear layers within the model, not its outputs.",
                )
            fixed |= dict.fromkeys(hits, share)
        return fixed

    def _because(self) -> str:
        """Why layers stay whole, the most frequent reasons first."""
        reasons: dict[str, list[str]] = {}
        for layer, reason in self.whole.items():
            reasons.setdefault(reason, []).append(layer)
        told = sorted(reasons.items(), key=lambda item: -len(item[1]))[:3]
        whole = [
            f"{layers[0] or 'the model'}{f' and {len(layers) - 1} more' if len(layers) > 1 else ''}: {reason}"
            for reason, layers in told
        ]
        return f" (whole stay {'; '.join(whole)})" if whole else ""

    def _remedy(self, otherwise: str) -> str:
        if self.round_to > 1 and any("round_to" in reason for reason in self.whole.values()):
            return "Set round_to=1."
        return otherwise


# Reading the settings ---------------------------------------------------------------------------------------------------


def _refuse(model: nn.Module) -> None:
    for record in structure_of(model).transforms:
        if record["kind"] != "prune" and record["kind"] != "distill":
            raise ModelError(
                f"This model was changed by {record['kind']!r}, which fixes the shapes of its weights.",
                f"Prune first, then {record['kind']}.",
            )


def _rounding(config: PruneConfig, device: torch.device) -> tuple[int, list[str]]:
    """Channels that the device computes at once, and the reason."""
    if config.round_to != "auto":
        return config.round_to, []
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 7:
            return 8, [f"round_to=8: tensor cores (compute capability {major}.{minor}) take 16-bit channels eight at a time."]
        return 1, [f"round_to=1: compute capability {major}.{minor} has no tensor cores."]
    capability = torch.backends.cpu.get_cpu_capability()
    widths = {"AVX512": 16, "AVX2": 8}
    if capability in widths:
        return widths[capability], [
            f"round_to={widths[capability]}: with {capability}, convolutions take so many channels at a time."
        ]
    return 1, [f"round_to=1: no gain is known for {device.type} with {capability}."]


def _matching(model: nn.Module, patterns: list[str]) -> set[str]:
    names = [name for name, _ in model.named_modules() if name]
    found: set[str] = set()
    for pattern in patterns:
        matches = {name for name in names if fnmatch(name, pattern)}
        if not matches:
            raise unknown("layer", pattern, names)
        # A block stands for all its layers.
        found |= {name for name in names if any(name == match or name.startswith(f"{match}.") for match in matches)}
    return found
