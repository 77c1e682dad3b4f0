"""Readings against a float64 copy of the model with hooks by hand, alone and compiled, with faults planted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from workbench.models import ModelConfig, build_model
from workbench.models.resnet import ResNet
from workbench.probes import EDGES, PROBES, Probe, ProbeConfig, ProbeSet, StepContext

Readings = dict[tuple[str, int], dict[str, Any]]


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.GroupNorm(4, 8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 32),
        nn.Tanh(),
        nn.Linear(32, 10),
    )


def residual() -> nn.Module:
    return ResNet((4, 8), (1, 1), in_channels=1)


class Recurrent(nn.Module):
    """An LSTM, whose output is a tuple, and a layer that the forward pass never reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 12, batch_first=True)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.lstm(x.squeeze(1))
        found: Tensor = self.head(output[:, -1])
        return found


MODELS: dict[str, Callable[[], nn.Module]] = {"convolutional": convolutional, "residual": residual, "recurrent": Recurrent}


def batch(seed: int = 0, size: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 1, 8, 8, generator=generator), torch.randint(10, (size,), generator=generator)


def probed(model: nn.Module, every: int = 1, layers: str = "*", kinds: str = "*") -> tuple[ProbeSet, Readings]:
    """Gradient and activation probes attached, and the dict that their readings will fill, by (kind, step)."""
    readings: Readings = {}
    config = ProbeConfig(every=every, layers=layers, kinds=kinds)
    probes: dict[str, tuple[Probe, int]] = {kind: (PROBES.create(kind, config), every) for kind in ("gradients", "activations")}
    chosen = ProbeSet(probes, lambda kind, step, columns: readings.__setitem__((kind, step), columns))
    chosen.attach(model)
    return chosen, readings


def step(
    model: nn.Module,
    probes: ProbeSet,
    number: int,
    x: Tensor,
    y: Tensor,
    micro: int = 1,
    scale: float = 1.0,
    update: bool = False,
) -> None:
    """What the trainer does of a step; the update takes a thousandth of each weight."""
    model.zero_grad(set_to_none=True)
    probes.begin(number)
    for part_x, part_y in zip(x.chunk(micro), y.chunk(micro), strict=True):
        (nn.functional.cross_entropy(model(part_x), part_y) * (scale / micro)).backward()
    probes.read(StepContext(number, None if scale == 1.0 else torch.tensor(scale)))
    with torch.no_grad():
        for parameter in model.parameters() if update else ():
            parameter.mul_(1 - 1e-3)
    probes.updated()


def by_hand(model: nn.Module, x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients by parameter and outputs by leaf layer of a float64 copy."""
    model = copy.deepcopy(model).double()
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs[name] = (output if isinstance(output, Tensor) else output[0]).detach().clone()

        return hook

    for name, module in model.named_modules():
        if not any(module.children()):
            module.register_forward_hook(keep(name))
    nn.functional.cross_entropy(model(x.double()), y).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, outputs


def rows(columns: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Readings by layer."""
    return {layer: {name: columns[name][row] for name in columns} for row, layer in enumerate(columns["layer"])}


def compare(columns: dict[str, Any], expected: dict[str, Tensor], tolerance: float) -> float:
    """Check activations against float64 outputs; the largest error relative to the layer's spread."""
    worst = 0.0
    for layer, row in rows(columns).items():
        value = expected[layer]
        spread = float(value.std(correction=0)) + 1e-12
        errors = {
            "mean": abs(row["mean"] - float(value.mean())),
            "std": abs(row["std"] - float(value.std(correction=0))),
            "min": abs(row["min"] - float(value.min())),
            "max": abs(row["max"] - float(value.max())),
        }
        for name, error in errors.items():
            assert error < tolerance * spread, f"{layer}: {name} is off by {error:.2e}"
        worst = max(worst, *(error / spread for error in errors.values()))
        assert row["count"] == value.numel()
        assert row["nonfinite"] == 0
        assert abs(row["zeros"] - float((value == 0).double().mean())) < 1e-3
    return worst


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("micro", [1, 3])
def test_readings_are_those_of_a_float64_model(name: str, micro: int) -> None:
    torch.manual_seed(1)
    model = MODELS[name]().train()
    if name == "residual" and micro > 1:
        model.eval()  # batch statistics are of a micro-batch; without them the outputs are the whole batch's
    x, y = batch()
    probes, readings = probed(model)
    gradients, outputs = by_hand(model, x, y)
    step(model, probes, 1, x, y, micro)
    found = rows(readings["gradients", 1])
    assert found.keys() == gradients.keys()  # what got no gradient has no row
    for layer, row in found.items():
        assert row["norm"] == pytest.approx(float(gradients[layer].norm()), rel=2e-4), layer
        gradient = gradients[layer]
        assert row["max"] == pytest.approx(float(gradient.abs().max()), rel=2e-4), layer
        assert row["mean"] == pytest.approx(float(gradient.mean()), abs=2e-4 * float(gradient.abs().max())), layer
        assert row["std"] == pytest.approx(float(gradient.std(correction=0)), rel=2e-3, abs=1e-7), layer
        assert row["nonfinite"] == 0 and row["histogram"].sum() == min(gradient.numel(), 4096)
    activations = readings["activations", 1]
    assert "unused" not in activations["layer"]
    print(f"{name}: {compare(activations, outputs, 1e-4):.1e}")


@pytest.mark.parametrize("name", ["convolutional", "residual"])
def test_readings_of_a_compiled_model_are_those_of_a_float64_model(name: str) -> None:
    """Three steps, the middle one unread: a compiled graph with readings, one without, and the first again."""
    torch.manual_seed(2)
    model = MODELS[name]().train()
    probes, readings = probed(model, every=3)
    expected = {number: by_hand(model, *batch(number)) for number in (1, 3)}
    model.compile()
    for number in (1, 2, 3):
        step(model, probes, number, *batch(number))
    assert {number for _, number in readings} == {1, 3}
    for number in (1, 3):
        gradients, outputs = expected[number]
        for layer, row in rows(readings["gradients", number]).items():
            assert row["norm"] == pytest.approx(float(gradients[layer].norm()), rel=2e-4), layer
        print(f"compiled {name}, step {number}: {compare(readings['activations', number], outputs, 1e-4):.1e}")


@pytest.mark.parametrize("name", MODELS)
def test_the_update_ratio_is_what_the_step_changed(name: str) -> None:
    model = MODELS[name]()
    probes, readings = probed(model)
    for number in (1, 2):
        step(model, probes, number, *batch(number), update=True)
        found = rows(readings["gradients", number])
        for layer, parameter in model.named_parameters():
            if layer in found and bool(parameter.any()):
                assert found[layer]["update_ratio"] == pytest.approx(1e-3, rel=1e-3), layer


def test_dead_and_saturated_units_are_counted_by_channel() -> None:
    """Two of eight channels never fire; three of ten features sit at a bound of tanh; a layer that is alive has none."""
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(512, 10), nn.Tanh(), nn.Linear(10, 10)
    )
    with torch.no_grad():
        model[0].bias[:2] = -1e3
        model[3].bias[:3] = torch.tensor([50.0, -50.0, 60.0])
    probes, readings = probed(model)
    for number in range(1, 5):
        step(model, probes, number, *batch(number))
        found = rows(readings["activations", number])
        assert found["1"]["dead"] == 0.25 and found["0"]["dead"] == found["5"]["dead"] == 0
        assert found["4"]["saturated"] == (0.3 if number * 24 >= 64 else 0)  # 24 samples a reading
        assert found["4"]["dead"] == found["1"]["saturated"] == 0


def test_kinds_choose_layers_by_class() -> None:
    model = convolutional()
    probes, readings = probed(model, kinds="Conv*, Linear, ReLU")
    step(model, probes, 1, *batch())
    assert readings["activations", 1]["layer"] == ["0", "2", "5", "7"]


def test_loss_scaling_is_undone() -> None:
    torch.manual_seed(3)
    model = convolutional()
    probes, readings = probed(model)
    x, y = batch()
    step(model, probes, 1, x, y)
    step(model, probes, 2, x, y, scale=1024.0)
    plain, scaled = rows(readings["gradients", 1]), rows(readings["gradients", 2])
    for layer in plain:
        assert scaled[layer]["norm"] == pytest.approx(plain[layer]["norm"], rel=1e-6)
        assert scaled[layer]["max"] == pytest.approx(plain[layer]["max"], rel=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("planted", [float("nan"), float("inf")])
def test_nonfinite_numbers_are_counted_where_they_arise(planted: float, compiled: bool) -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(6, 5), nn.Identity(), nn.Linear(5, 4), nn.Linear(4, 3))
    with torch.no_grad():
        model[2].bias[1] = planted
    probes, readings = probed(model)
    if compiled:
        model.compile()
    x, y = torch.randn(7, 6), torch.randint(3, (7,))
    step(model, probes, 1, x, y)
    found = rows(readings["activations", 1])
    assert found["0"]["nonfinite"] == 0 and np.isfinite(found["0"]["mean"])
    assert found["2"]["nonfinite"] == 7 and not np.isfinite(found["2"]["max"])
    assert found["3"]["nonfinite"] == 21
    gradients = rows(readings["gradients", 1])
    assert all(gradients[layer]["nonfinite"] > 0 for layer in ("0.weight", "2.weight"))
    assert gradients["0.weight"]["nonfinite"] == int((~torch.isfinite(model[0].weight.grad)).sum())


def test_bins_hold_everything_between_the_infinities() -> None:
    assert list(EDGES) == sorted(EDGES) and EDGES[0] == -float("inf") and EDGES[-1] == float("inf")
    assert {-edge for edge in EDGES} == set(EDGES)


@pytest.mark.parametrize(
    ("pattern", "gradients", "activations"),
    [
        ("*", 8, 7),
        ("0*", 2, 1),
        ("0, 5*", 2, 2),
        ("7.bias", 1, 0),
        ("nothing", 0, 0),
    ],
)
def test_a_layer_filter_takes_shell_patterns(pattern: str, gradients: int, activations: int) -> None:
    model = convolutional()
    probes, readings = probed(model, layers=pattern)
    step(model, probes, 1, *batch())
    assert len(readings.get(("gradients", 1), {"layer": []})["layer"]) == gradients
    assert len(readings.get(("activations", 1), {"layer": []})["layer"]) == activations


def test_a_probe_reads_the_first_step_and_every_so_many() -> None:
    model = convolutional()
    probes, readings = probed(model, every=4)
    for number in range(1, 13):
        step(model, probes, number, *batch(number))
    assert sorted({number for _, number in readings}) == [1, 4, 8, 12]


def test_detached_probes_read_nothing() -> None:
    model = convolutional()
    probes, readings = probed(model)
    probes.detach()
    assert not any(module._forward_hooks for module in model.modules())
    model(batch()[0])
    assert not readings


def test_readings_under_autocast_are_of_the_numbers_that_the_layers_gave() -> None:
    """bf16 outputs, summed in float64: the same to the last digits as the outputs' own."""
    torch.manual_seed(6)
    model = convolutional()
    probes, readings = probed(model)
    outputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if not any(module.children()):
            module.register_forward_hook(lambda m, a, output, name=name: outputs.__setitem__(name, output.detach().double()))
    probes.begin(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(batch()[0])
    probes.read(StepContext(1))
    probes.updated()
    assert compare(readings["activations", 1], outputs, 1e-6) < 1e-6


def test_a_compiled_step_that_is_read_keeps_no_more_for_its_backward_pass() -> None:
    """Readings stand behind what uses the outputs read: GELU is computed again as it is in other steps."""
    from functorch.compile import min_cut_rematerialization_partition, nop
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    from workbench.training.graph_passes import put_readings_off

    kept: list[list[str]] = []

    def divide(joint: torch.fx.GraphModule, inputs: Any, **settings: Any) -> Any:
        for change in passes:
            change(joint.graph)
        joint.graph.lint()
        return min_cut_rematerialization_partition(joint, inputs, **settings)

    def forward(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        outputs = next(node for node in graph.graph.nodes if node.op == "output").args[0]
        values = [node.meta["val"] for node in outputs if node.op == "call_function" and "getitem" not in node.name]
        kept.append(sorted(f"{value.dtype} {list(value.shape)}" for value in values))
        return nop(graph, inputs)

    table = select_decomp_table()
    backend = aot_autograd(fw_compiler=forward, bw_compiler=nop, partition_fn=divide, decompositions=table)
    passes: list[Callable[[torch.fx.Graph], None]] = []
    for read, passes[:] in ((False, []), (True, []), (True, [put_readings_off])):
        sizes = {"layers": 1, "width": 64, "heads": 2}
        model = build_model(ModelConfig(name="bert_base", num_classes=2, args=sizes))
        probes, _ = probed(model, kinds="Linear, GELU*")
        torch.compiler.reset()
        call = torch.compile(nn.Sequential(model), backend=backend, fullgraph=True)
        if read:
            probes.begin(1)
        with torch.autocast("cpu", torch.bfloat16):
            call(torch.arange(64).view(4, 16)).sum().backward()
    torch.compiler.reset()
    unread, plain, behind = kept
    derivative = "torch.float32 [4, 16, 256]"  # of GELU, twice as large as what it is computed from
    assert derivative in plain and derivative not in unread + behind
