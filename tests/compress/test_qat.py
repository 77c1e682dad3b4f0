"""Quantization-aware training: it changes nothing but the rounding, and becomes the INT8 model that it simulated."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from workbench import Run, TrainConfig, launch, train
from workbench.artefact import load_model, save_model
from workbench.compress import PruneConfig, QuantAwareTraining, QuantConfig, prune, quantize
from workbench.compress.graph import _activations
from workbench.compress.qat import LearnedRange, RoundsWeight, plain_copy
from workbench.errors import ArtefactError, ConfigError, ModelError
from workbench.models import ModelConfig, build_model

pytestmark = [pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"), pytest.mark.usefixtures("forked")]

NETS = Path(__file__).with_name("nets.py")
QAT = QuantConfig(mode="qat")
CONFIG = TrainConfig(
    data={"name": "digits", "limit": 512, "batch_size": 64},
    optim={"name": "sgd", "lr": 0.05},
    epochs=2,
    device="cpu",
    checkpoint={"every_epochs": 1},
    probes={"memory": {"every": 0}},
)


def build(name: str = "residual") -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelConfig(name=f"{NETS}:{name}", num_classes=10, in_channels=1 if name == "residual" else None))


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.rand(64, 1, 28, 28, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def prepared(x: Tensor) -> nn.Module:
    return QuantAwareTraining(build(), QAT, x).prepare()


@pytest.fixture(scope="module")
def run(prepared: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(CONFIG, model=prepared, root=tmp_path_factory.mktemp("runs")).run


@pytest.fixture(scope="module")
def trained(run: Run) -> nn.Module:
    return run.load_model()


def settings(model: nn.Module) -> dict[str, tuple[float, ...]]:
    found: dict[str, tuple[float, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.momentum is not None
            found[name] = (module.eps, module.momentum)
        elif isinstance(module, nn.Dropout):
            found[name] = (module.p,)
    return found


def test_normalization_and_dropout_come_through_unchanged(prepared: nn.Module, trained: nn.Module) -> None:
    given = build()
    assert set(settings(given).values()) == {(1e-3, 0.01), (0.1,)}
    assert settings(prepared) == settings(trained) == settings(given)
    assert settings(prepared.train().eval().train()) == settings(given)
    # Not by name only: what they compute in training mode, with the rounding off, is bit for bit what the given model computes.
    given.train()
    plain = plain_copy(prepared).train()
    data = torch.rand(16, 1, 28, 28)
    for model in (given, plain):
        torch.manual_seed(5)
        model.output = model(data)  # type: ignore[assignment]
    assert torch.equal(given.output, plain.output)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(given.buffers(), plain.buffers(), strict=True))


def test_the_given_model_stays_as_it_was(x: Tensor) -> None:
    given = build().train()
    before = {name: value.clone() for name, value in given.state_dict().items()}
    QuantAwareTraining(given, QAT, x).prepare()
    assert given.training
    assert not any(isinstance(module, RoundsWeight) for module in given.modules())
    assert all(torch.equal(before[name], value) for name, value in given.state_dict().items())


def test_weights_are_those_of_int8_and_keep_their_names(prepared: nn.Module) -> None:
    given = build()
    assert set(given.state_dict()) <= set(prepared.state_dict())
    norm, conv, rounded = given.norm1, given.conv1, prepared.conv1.rounded_weight()
    factor = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).view(-1, 1, 1, 1)
    folded = (conv.weight * factor).double()
    step = folded.abs().amax((1, 2, 3), keepdim=True) / 127
    expected = torch.clamp(torch.round(folded / step), -128, 127) * step
    torch.testing.assert_close((rounded * factor).double(), expected, rtol=1e-5, atol=1e-7)


def test_a_learned_range_follows_batches_and_passes_gradients_within_it() -> None:
    learned = LearnedRange(QAT)
    assert torch.equal(learned.eval()(torch.tensor([0.3])), torch.tensor([0.3]))  # nothing seen yet: nothing is rounded
    learned.train()
    learned(torch.tensor([-1.0, 3.0]))
    learned(torch.tensor([-2.0, 4.0]))
    assert learned.low.item() == pytest.approx(-1.01) and learned.high.item() == pytest.approx(3.01)
    values = torch.tensor([-5.0, 0.5, 5.0], requires_grad=True)
    learned.eval()(values).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [0, 1, 0]
    assert learned(torch.zeros(1)).item() == 0  # zero, as padding, is always exact


def test_it_trains_and_the_int8_model_computes_what_was_trained(run: Run, trained: nn.Module, x: Tensor) -> None:
    losses = run.history["loss"]
    assert losses.iloc[-1] < 0.8 * losses.iloc[0]
    int8 = quantize(trained)
    assert any(tensor.dtype == torch.int8 for tensor in int8.state_dict().values())
    with torch.no_grad():
        simulated, computed, plain = trained(x), int8(x), plain_copy(trained)(x)
    rounding = (plain - simulated).norm()
    assert (simulated - computed).norm() < 0.2 * rounding  # what is left: values on the edge between two levels
    exact = torch.isclose(simulated, computed, rtol=1e-4, atol=1e-5).all(1)
    assert exact.float().mean() > 0.5
    assert (simulated.argmax(1) == computed.argmax(1)).float().mean() >= 0.98
    assert [t["kind"] for t in int8.structure.transforms] == ["qat", "quantize"]


class Forced(Interpreter):
    """An INT8 graph of which every activation is what was simulated, so that each layer is compared by itself."""

    def __init__(self, graph: GraphModule, simulated: dict[str, Tensor]) -> None:
        super().__init__(graph)
        self.simulated, self.quantizes = simulated, {node: value for value, node in _activations(graph)}
        self.levels: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        computed = super().run_node(n)
        value = self.quantizes.get(n.args[0]) if n.args else None
        if value is None or computed.shape != self.simulated[value].shape:  # max-pooling passes levels on
            return computed
        self.levels[value] = ((computed - self.simulated[value]) / n.args[1]).abs()
        return self.simulated[value]


@pytest.mark.parametrize("name", ["residual", "mobilenetv3_small_050"])
def test_each_layer_computes_what_was_simulated(name: str) -> None:
    """Whole networks drift apart: a value on the edge between two levels falls to either side, and such differences grow."""
    timm = name != "residual"
    model = build_model(ModelConfig(name=name, num_classes=10)) if timm else build()
    data = torch.randn(8, 3, 64, 64) if timm else torch.rand(16, 1, 28, 28)
    model = QuantAwareTraining(model, QAT, data).prepare()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model(data).square().mean().backward()
    optimizer.step()
    int8, record = quantize(model.eval()), model.structure.transforms[-1]
    seen: dict[str, Tensor] = {}
    for path in set(record["ranges"].values()):
        keep = lambda module, inputs, output, path=path: seen.update({path: output})  # noqa: E731
        model.get_submodule(path).register_forward_hook(keep)
    with torch.no_grad():
        simulated = model(data)
        forced = Forced(int8.graph, {value: seen[path] for value, path in record["ranges"].items()})
        computed = forced.run(data)
    assert len(forced.levels) >= len(record["ranges"]) - 1
    for value, levels in forced.levels.items():
        assert levels.max() < 1.01, value
        assert (levels > 0.5).sum() <= max(1, 2e-4 * levels.numel()), value
    torch.testing.assert_close(computed, simulated, rtol=1e-4, atol=1e-5)


def test_every_rounding_of_the_graph_is_simulated(prepared: nn.Module) -> None:
    record = prepared.structure.transforms[-1]
    assert record["layers"] == sorted(["stem.0", "conv1", "conv2", "conv3", "shortcut", "head"])
    assert not record["left"]
    places = set(record["ranges"].values())
    learned = {name for name, module in prepared.named_modules() if isinstance(module, LearnedRange)}
    assert places <= learned
    assert {"norm3.output_range", "norm4.output_range"} & places  # of a sum, one side becomes INT8 though no layer takes it


def test_reloads_bit_equal_in_a_fresh_process(trained: nn.Module, x: Tensor, tmp_path: Path) -> None:
    int8 = quantize(trained)
    save_model(trained, tmp_path / "halfway")
    save_model(int8, tmp_path / "int8")
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch; from workbench.artefact import load_model; from workbench import quantize\n"
        "torch.set_num_threads(int(sys.argv[2])); folder = sys.argv[1]; x = torch.load(folder + '/x.pt')\n"
        "half, int8 = (load_model(folder + name) for name in ('/halfway', '/int8'))\n"
        "torch.save([half(x), int8(x), quantize(half)(x)], folder + '/y.pt')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path), str(torch.get_num_threads())], check=True)
    half, reloaded, converted = torch.load(tmp_path / "y.pt")
    with torch.no_grad():
        assert torch.equal(half, trained(x))
        assert torch.equal(reloaded, int8(x)) and torch.equal(converted, int8(x))


def test_names_of_another_version_are_found_again(trained: nn.Module, x: Tensor) -> None:
    other = copy.deepcopy(trained)
    record = trained.structure.transforms[-1]
    ranges = {f"other_{value}": path for value, path in record["ranges"].items()}
    other.structure = replace(trained.structure, transforms=(record | {"ranges": ranges, "versions": {"torch": "2.0"}},))
    with torch.no_grad():
        assert torch.equal(quantize(other)(x), quantize(trained)(x))
    gone = dict(list(ranges.items())[1:])
    other.structure = replace(trained.structure, transforms=(record | {"ranges": gone, "versions": {"torch": "2.0"}},))
    with pytest.raises(ArtefactError, match=r"'torch': '2\.0'.*1 values"):
        quantize(other)


def test_resumed_in_the_middle_it_ends_the_same(prepared: nn.Module, run: Run, tmp_path: Path) -> None:
    stopped = train(CONFIG.override({"max_steps": None}), model=prepared, root=tmp_path, replay=[(9, "stop", {})]).run
    assert stopped.status != "finished"
    resumed = stopped.resume().wait(timeout=120)
    ours, theirs = resumed.load_model().state_dict(), run.load_model().state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.slow
def test_two_processes_train_it_alike(prepared: nn.Module, run: Run, tmp_path: Path, x: Tensor) -> None:
    two = launch(CONFIG, model=prepared, nproc=2, root=tmp_path).wait(timeout=180)
    assert abs(two.history["loss"].iloc[-1] - run.history["loss"].iloc[-1]) < 0.3
    assert (two.path / "source" / "model" / "structure.json").is_file()  # kept without pickle
    int8 = quantize(two.load_model())
    assert torch.isfinite(int8(x)).all()


def test_a_model_of_ids_trains_and_converts(tmp_path: Path) -> None:
    ids = torch.randint(1, 50, (32, 12))
    model = QuantAwareTraining(build("tokens"), QAT, ids).prepare()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids).square().mean().backward()
        optimizer.step()
    int8 = quantize(model.eval())
    save_model(int8, tmp_path / "int8")
    with torch.no_grad():
        torch.testing.assert_close(int8(ids), model(ids), rtol=0.05, atol=0.02)
        assert torch.equal(load_model(tmp_path / "int8")(ids), int8(ids))


def test_a_transformer_whose_modules_return_tuples() -> None:
    ids = torch.randint(1, 100, (8, 12))
    config = ModelConfig(name="bert_small", num_classes=4, args={"vocab_size": 100, "layers": 1, "width": 32, "length": 16})
    model = QuantAwareTraining(build_model(config), QAT, ids).prepare()
    model.train()(ids)
    with torch.no_grad():
        simulated, computed = model.eval()(ids), quantize(model)(ids)
    torch.testing.assert_close(simulated, computed, rtol=0.02, atol=0.01)


@pytest.mark.filterwarnings("ignore:.*of the parameters went:UserWarning")
def test_pruned_then_trained_then_int8(x: Tensor, tmp_path: Path) -> None:
    model = QuantAwareTraining(prune(build(), PruneConfig(ratio=0.3), x), QAT, x).prepare()
    model.train()(x)
    int8 = quantize(model.eval())
    save_model(int8, tmp_path)
    assert torch.equal(load_model(tmp_path)(x), int8(x))
    assert [t["kind"] for t in int8.structure.transforms] == ["prune", "qat", "quantize"]


def test_layers_kept_in_float_are_left_alone(x: Tensor) -> None:
    model = QuantAwareTraining(build(), QuantConfig(mode="qat", keep_float=["stem", "head"]), x).prepare()
    assert model.structure.transforms[-1]["layers"] == sorted(["conv1", "conv2", "conv3", "shortcut"])
    model.train()(x)
    state = quantize(model.eval()).state_dict()
    assert state["graph.head.weight"].dtype == torch.float32 and state["graph.conv1.weight"].dtype == torch.int8


def test_a_copy_learns_by_itself(prepared: nn.Module, x: Tensor) -> None:
    twin = copy.deepcopy(prepared).train()
    before = {name: value.clone() for name, value in prepared.state_dict().items()}
    twin(x).sum().backward()
    assert all(torch.equal(before[name], value) for name, value in prepared.state_dict().items())
    assert all(parameter.grad is None for parameter in prepared.parameters())


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the branch
            return self.layer(x)
        return x


def test_errors_name_the_remedy(prepared: nn.Module, x: Tensor) -> None:
    with pytest.raises(ModelError, match=r"test_qat\.py:\d+ .*if x\.sum\(\) > 0.*torch\.where"):
        QuantAwareTraining(Branching(), QAT, torch.randn(4, 4)).prepare()
    with pytest.raises(ConfigError, match="call quantize"):
        QuantAwareTraining(build(), QuantConfig(), x)
    with pytest.raises(ModelError, match="prepared for quantization-aware training already"):
        QuantAwareTraining(prepared, QAT, x).prepare()
    with pytest.raises(ModelError, match="Train it first"):
        quantize(QuantAwareTraining(build(), QAT, x).prepare())
    with pytest.raises(ModelError, match=r"QuantAwareTraining\(model"):
        quantize(build(), QAT)
    with pytest.raises(ConfigError, match="trained for other settings"):
        quantize(prepared, QuantConfig())
    with pytest.raises(ModelError, match="no convolution or linear layer"):
        QuantAwareTraining(nn.Sequential(nn.ReLU()), QAT, torch.randn(4, 4)).prepare()
