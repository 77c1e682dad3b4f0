"""FP8 layers on a CPU, which rounds as a GPU does: their arithmetic, which layers they are, and runs that are as others."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from workbench import PruneConfig, Run, TrainConfig, load_model, prune, train
from workbench.distributed import World
from workbench.errors import ConfigError, DeviceError, ModelError, NonFiniteLoss
from workbench.losses import LossConfig, make_loss
from workbench.optim import OptimConfig
from workbench.training import carry_out, checks, fp8, speed
from workbench.training.decisions import Decisions
from workbench.training.distillation_config import DistillConfig
from workbench.training.mesh import Mesh
from workbench.training.objective import Objective
from workbench.training.precision import Precision
from workbench.training.trial import Trial

NET = Path(__file__).with_name("net.py")
ROUNDING = {fp8.INPUT: (2**-4, 2**-10), fp8.GRADIENT: (2**-3, 2**-17)}
"""Largest error of a rounded number, as a share of it, and below the normal numbers as a multiple of its tensor's scale."""

pytestmark = pytest.mark.filterwarnings("ignore:CUDA initialization")


@pytest.fixture
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fp8.EMULATED, "emulate")


def plain(**changes: Any) -> Any:
    return torch.autocast("cpu", enabled=False, **changes)


def eighth(layer: nn.Linear) -> nn.Linear:
    fp8.convert([layer])
    return layer


# -- arithmetic ---------------------------------------------------------------------------------------------------------


def error_of(x: Tensor, kind: torch.dtype) -> Tensor:
    """Most that each number of a tensor may be off once rounded, in float64."""
    relative, absolute = ROUNDING[kind]
    return relative * x.abs() + absolute * x.abs().max() / torch.finfo(kind).max


def product_error(a: Tensor, b: Tensor, kinds: tuple[torch.dtype, torch.dtype], out: float) -> Tensor:
    """Most that each number of ``a @ b`` may be off: both rounded, and the result to ``out``."""
    da, db = error_of(a, kinds[0]), error_of(b, kinds[1])
    off = da @ (b.abs() + db) + a.abs() @ db
    return off + out * ((a @ b).abs() + off)


@pytest.mark.parametrize("size", [1e-5, 1.0, 1e4])
@pytest.mark.parametrize(("shape", "bias"), [((32,), True), ((3, 7), True), ((1,), False)])
def test_outputs_and_gradients_are_those_of_float64_within_the_rounding(shape: tuple[int, ...], bias: bool, size: float) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(48, 64, bias=bias)
    x, g = size * torch.randn(*shape, 48), torch.randn(*shape, 64).exp() * 1e-6
    exact = copy.deepcopy(layer).double()
    x64 = x.double().requires_grad_()
    exact(x64).backward(g.double())
    x = x.requires_grad_()
    y = eighth(layer)(x)
    y.backward(g)
    a, w, d = x64.detach().reshape(-1, 48), exact.weight.detach(), g.double().reshape(-1, 64)
    fine = 2**-20  # fp32
    forward = product_error(a, w.t(), (fp8.INPUT, fp8.INPUT), fine).view_as(y)
    assert ((y.double() - exact(x64)).abs() <= forward + fine * exact(x64).abs()).all()
    assert x.grad is not None and x64.grad is not None and layer.weight.grad is not None and exact.weight.grad is not None
    assert ((x.grad - x64.grad).abs() <= product_error(d, w, (fp8.GRADIENT, fp8.INPUT), fine).view_as(x)).all()
    assert ((layer.weight.grad - exact.weight.grad).abs() <= product_error(d.t(), a, (fp8.GRADIENT, fp8.INPUT), fine)).all()
    if bias:
        torch.testing.assert_close(layer.bias.grad.double(), exact.bias.grad, rtol=1e-6, atol=0)


def test_under_autocast_outputs_are_bf16_and_gradients_fp32() -> None:
    layer, x = eighth(nn.Linear(32, 16, bias=False)), torch.randn(5, 32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = nn.functional.relu(layer(x), inplace=True)
    y.sum().backward()  # a gradient of one number, seen many times
    assert y.dtype == torch.bfloat16 and x.grad is not None and layer.weight.grad is not None
    assert x.grad.dtype == layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", [fp8.INPUT, fp8.GRADIENT])
def test_the_largest_number_of_a_tensor_is_the_largest_of_the_type(kind: torch.dtype) -> None:
    for x in (torch.randn(64, 16), 1e-30 * torch.randn(64, 16), torch.full((16, 16), 3e38), torch.randn(64, 16).bfloat16()):
        found, scale = fp8.rounded(x, kind)
        assert float(found.float().abs().max()) == torch.finfo(kind).max
        assert ((found.double() * scale.double() - x.double()).abs() <= 1.001 * error_of(x.double(), kind)).all()
    found, scale = fp8.rounded(torch.zeros(16, 16), kind)
    assert not found.float().any() and scale == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_told_of(bad: float) -> None:
    x = torch.randn(16, 32)
    x[3, 4] = bad
    assert not eighth(nn.Linear(32, 16))(x).isfinite().all()


def test_operands_lie_in_memory_as_cuda_wants_them() -> None:
    """PyTorch's own checks of a product on CUDA, carried out on tensors without data."""
    kept = SimpleNamespace(needs_input_grad=(True, True))
    kept.save_for_backward = lambda *tensors: setattr(kept, "saved_tensors", tensors)
    with FakeTensorMode(), torch.device("cuda"):
        x, weight = torch.empty(48, 64, dtype=torch.bfloat16), torch.empty(32, 64)
        for rows in (x, torch.empty(64, 48, dtype=torch.bfloat16).t(), x[:1].expand(48, 64)):
            y = fp8._Product.forward(kept, rows, weight)
            for gradient in (torch.empty_like(y), torch.empty(1, 1, dtype=y.dtype).expand_as(y)):
                to_x, to_weight = fp8._Product.backward(kept, gradient)
                assert (y.dtype, to_x.dtype, to_weight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
                assert to_x.shape == x.shape and to_weight.shape == weight.shape


def test_compiled_layers_compute_the_same() -> None:
    """In one graph, differentiated by the compiler; its kernels are for the tests on a GPU."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 16))
    fp8.convert([model[0], model[2]])  # type: ignore[list-item]
    x = torch.randn(20, 32)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = []
    for call in (model, compiled):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = call(x).float().square().mean()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for one, two in zip(*found, strict=True):
        assert (two - one).norm() <= 1e-3 * one.norm()


# -- which layers -------------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Layers of all kinds that matter."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(1024, 4096)
        self.narrow = nn.Linear(4096, 64)
        self.odd = nn.Linear(64, 30)
        self.again = nn.Linear(30, 64)
        self.spare = nn.Linear(64, 64)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.odd(self.narrow(self.wide(x))))
        return self.head(self.drop(self.attention(x, x, x)[0])).mean(1)


def test_layers_are_chosen_by_their_sizes_and_the_others_say_why() -> None:
    model = Mixed()
    model.drop.eval()
    choice = fp8.choose(model, torch.randn(2, 9, 1024), 2, 1024, plain)
    assert list(choice.layers) == ["wide"] and choice.layers["wide"] is model.wide
    assert choice.others == {
        "narrow": "4096 × 64 with 9,216 rows a step, too small to gain more than rounding costs",
        "odd": "64 × 30, not multiples of 16",
        "again": "30 × 64, not multiples of 16",
        "spare": "not called as a layer",
        "attention.out_proj": "a NonDynamicallyQuantizableLinear, which computes in its own way",
        "head": "the output layer",
    }
    assert choice.told.startswith("1 of 7 linear layers multiply in FP8; in bf16 stay narrow (4096 × 64 with")
    assert model.training and not model.drop.training
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_without_such_layers_is_told_what_the_largest_lacks() -> None:
    model = Mixed()
    choice = fp8.choose(model, torch.randn(2, 9, 1024), 2, 16, plain)
    with pytest.raises(
        ModelError, match=r"none of this Mixed: the largest, 'wide', is 1024 × 4096 with 144 rows a step.*Take bf16"
    ):
        choice.check(model)
    alone = nn.Sequential(nn.Conv2d(1, 4, 3))
    with pytest.raises(ModelError, match=r"makes linear layers faster, and none of this Sequential\. Take bf16"):
        fp8.choose(alone, torch.randn(2, 1, 8, 8), 2, 16, plain).check(alone)


def test_sizes_gain_where_torchao_measured_that_they_do() -> None:
    """``torchao/float8/README.md``, on an H100: 0.80 and 1.39 times as fast."""
    assert not fp8.gains(1024, 2048, 1024)
    assert fp8.gains(4096, 8192, 16384)
    assert fp8.gains(16384, 768, 3072) and fp8.gains(16384, 3072, 768) and not fp8.gains(10**9, 768, 768)


@pytest.mark.usefixtures("_emulated")
def test_names_repeated_by_number_are_told_once() -> None:
    parts = [OrderedDict(up=nn.Linear(16, 20), down=nn.Linear(20, 16)) for _ in range(3)]
    model = nn.Sequential(*map(nn.Sequential, parts))
    told = fp8.choose(model, torch.randn(2, 16), 2, 16, plain).told
    assert told == (
        "0 of 6 linear layers multiply in FP8; in bf16 stay *.up (3) (16 × 20, not multiples of 16), *.down (2) (20 × 16, not "
        "multiples of 16), 2.down (the output layer)"
    )


@pytest.mark.usefixtures("_emulated")
@pytest.mark.parametrize("seed", range(4))
def test_converting_changes_nothing_that_lasts(seed: int) -> None:
    """Modules, parameters, names and hooks are the same objects throughout; what is undone is as before to the bit."""
    torch.manual_seed(seed)
    widths = (16 * torch.randint(1, 5, (seed + 3,))).tolist()
    model = nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in zip(widths, widths[1:], strict=False)))
    fired: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, args, output, name=name: fired.append(name))
    x = torch.randn(8, widths[0])
    before, state, modules = model(x), dict(model.state_dict(keep_vars=True)), dict(model.named_modules())
    order, fired[:] = list(fired), []
    choice = fp8.choose(model, x, len(x), 64, plain)
    assert len(choice.layers) == seed + 1  # all but the last
    fired.clear()
    undo, nothing = fp8.convert(choice.layers.values()), fp8.convert(choice.layers.values())
    assert not torch.equal(model(x), before) and fired == order
    assert dict(model.named_modules()) == modules
    nothing()  # the second changed none
    assert all(type(layer) is fp8.Float8Linear for layer in choice.layers.values())
    again = copy.deepcopy(model)
    assert torch.equal(again(x), model(x))
    undo()
    undo()
    assert all(value is state[name] for name, value in model.state_dict(keep_vars=True).items())
    assert {type(module) for module in model.modules()} == {nn.Sequential, nn.Linear, nn.Tanh}
    assert torch.equal(model(x), before)


# -- devices ------------------------------------------------------------------------------------------------------------


def test_a_device_without_fp8_is_told_what_it_has(monkeypatch: pytest.MonkeyPatch, config: Callable[..., TrainConfig]) -> None:
    with pytest.raises(DeviceError, match=r"precision='fp8' needs an NVIDIA GPU of compute capability 8.9.*on a CPU\. Take bf16"):
        train(config(precision="fp8"))
    assert "on a CPU" in (Run.all()[0].error or "")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(DeviceError, match=r"8\.9 or above, and A100 has 8\.0"):
        fp8.check_device(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    fp8.check_device(torch.device("cuda"))


@pytest.mark.usefixtures("_emulated")
def test_what_cannot_be_divided_or_has_no_layers_is_refused(config: Callable[..., TrainConfig]) -> None:
    mesh = Mesh({"pipeline": 1, "replicate": 1, "shard": 1, "tensor": 2}, World(rank=0, size=2))
    with pytest.raises(ConfigError, match="precision='fp8' scales tensors.*mesh.tensor=2.*Take mesh.shard=2"):
        checks.check_mesh(config(), mesh, Precision("fp8", torch.device("cpu")))
    with pytest.raises(ModelError, match="none of this Sequential: the largest, '7', is the output layer"):
        train(config(precision="fp8"))


# -- runs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def given(config: Callable[..., TrainConfig], _emulated: None) -> Callable[..., TrainConfig]:
    def make(**changes: Any) -> TrainConfig:
        base = {"precision": "fp8", "model": {"name": "mlp", "args": {"widths": [48, 32]}}, "data.augment": [], "epochs": 2}
        return config(**(base | changes))

    return make


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[nn.Linear]:
    """The layers that were converted, held on to."""
    seen: list[nn.Linear] = []
    real = fp8.convert

    def noted(layers: Any) -> Callable[[], None]:
        seen.extend(layers := list(layers))
        return real(layers)

    monkeypatch.setattr(fp8, "convert", noted)
    return seen


def test_a_run_learns_as_in_bf16_and_leaves_an_ordinary_model(given: Callable[..., TrainConfig]) -> None:
    config = given(ema=0.9, penalties={"l1": 1e-5}, accumulate=2)
    result, other = train(config), train(config.override({"precision": "bf16"}))
    run = result.run
    assert run.resolved["fp8"]["value"] == ["1", "3"] and "fp8" not in other.run.resolved
    assert run.resolved["fp8"]["reason"] == "2 of 3 linear layers multiply in FP8; in bf16 stay 5 (the output layer)"
    difference = np.abs(run.history["loss"] - other.run.history["loss"])
    assert 0 < difference.max() < 0.1 and run.history["loss"].iloc[-1] < run.history["loss"].iloc[0]
    for kind in ("gradients", "activations"):
        one, two = run.readings(kind), other.run.readings(kind)
        assert len(one) and one[["step", "layer"]].equals(two[["step", "layer"]])
    assert [type(module) for module in result.model.modules()] == [type(module) for module in other.model.modules()]
    assert list(result.model.state_dict()) == list(other.model.state_dict())
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(load_model(run.path)(x), result.model(x))
    assert (run.path / "structure.json").read_text().count("mlp") and "fp8" not in (run.path / "structure.json").read_text()
    pruned = prune(result.model, PruneConfig(ratio=0.3), x)
    assert pruned(x).shape == (4, 10) and sum(p.numel() for p in pruned.parameters()) < 5000


def test_a_student_learns_in_fp8_from_a_teacher(given: Callable[..., TrainConfig]) -> None:
    teacher = train(given(precision="fp32", epochs=1)).run
    distill = DistillConfig(teacher=str(teacher.path), terms={"soft": 0.5})
    losses = train(given(distill=distill)).run.history["loss"]
    assert losses.iloc[-1] < losses.iloc[0]


def test_recomputed_blocks_compute_in_fp8_again(given: Callable[..., TrainConfig]) -> None:
    config = given(
        **{"model": {"name": f"{NET}:vit", "args": {"depth": 2, "heads": 2, "width": 16}}, "epochs": 1, "data.limit": 96}
    )
    kept, again = train(config).run, train(config.override({"memory.recompute": 1.0})).run
    assert len(kept.resolved["fp8"]["value"]) == 8
    assert again.history["loss"].equals(kept.history["loss"])


@pytest.mark.parametrize(("before", "after"), [("fp8", "bf16"), ("bf16", "fp8")])
def test_a_checkpoint_opens_in_another_precision(before: str, after: str, given: Callable[..., TrainConfig]) -> None:
    config = given(precision=before, ema=0.9)
    whole = train(config.override({"precision": after})).run
    run = train(config, replay=[(6, "stop", {})]).run
    assert run.status == "stopped"
    file = run.path / "config.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"precision": after}))
    carry_out(run)
    assert run.status == "finished" and run.history["step"].tolist() == list(range(1, 17))
    assert float(np.abs(run.history["loss"] - whole.history["loss"]).max()) < 0.1


def test_layers_are_ordinary_again_however_a_run_ends(
    given: Callable[..., TrainConfig], converted: list[nn.Linear], tmp_path: Path
) -> None:
    assert train(given(), replay=[(3, "stop", {})]).run.status == "stopped"
    assert len(converted) == 2 and all(type(layer) is nn.Linear for layer in converted)
    source = tmp_path / "broken.py"
    source.write_text(
        "def broken():\n    return lambda output, y: output.float().sum() * (float('nan') if output.requires_grad else 1)\n"
    )
    with pytest.raises(NonFiniteLoss):
        train(given(loss={"name": f"{source}:broken"}))
    assert len(converted) == 4 and all(type(layer) is nn.Linear for layer in converted)


# -- by measurement -----------------------------------------------------------------------------------------------------


def small_trial() -> Trial:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    x, y = torch.rand(64, 64), torch.arange(64) % 10
    choice = fp8.choose(model, x, len(x), len(x), plain)
    return Trial(Objective(model, make_loss(LossConfig())), (x, y), OptimConfig(), choice=choice)


def decided(value: str) -> Decisions:
    return Decisions({"precision": {"value": value, "reason": "by rule"}})


@pytest.mark.usefixtures("_emulated")
def test_fp8_is_measured_beside_the_others_and_the_model_stays_as_it_was(converted: list[nn.Linear]) -> None:
    trial, made = small_trial(), decided("fp32")
    weights = {name: value.clone() for name, value in trial.objective.state_dict().items()}
    chosen = speed.measured_precision(trial, "fp32", 10**9, 1, World(), made)
    assert chosen == made.made["precision"]["value"] and "fp8 " in made.made["precision"]["reason"]
    assert converted and all(type(layer) is nn.Linear for layer in converted)
    assert all(torch.equal(value, weights[name]) for name, value in trial.objective.state_dict().items())


@pytest.mark.usefixtures("_emulated")
@pytest.mark.parametrize(
    ("times", "steps", "chosen", "words"),
    [
        ({"bf16": 0.010, "fp8": 0.007}, 10**6, "fp8", "a compiled step takes 10 ms in bf16, 7 ms in fp8"),
        ({"bf16": 0.010, "fp8": 0.009}, 10**6, "bf16", "9 ms in fp8: not 1.3 × as fast"),
        ({"bf16": 0.010, "fp8": 0.001}, 1000, "bf16", "a run of about 10 s, compiled, doesn't pay for compiling in FP8 too"),
    ],
)
def test_compiled_steps_decide(
    times: dict[str, float], steps: int, chosen: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With seconds given: what is measured on a GPU is for the tests there."""
    monkeypatch.setattr(speed, "_compiled", lambda trial, setting, mode, world: times[setting.precision])
    made = decided("bf16")
    assert speed.measured_fp8(small_trial(), "default", "bf16", steps, 1, World(), made) == chosen
    assert made.made["precision"]["value"] == chosen and words in made.made["precision"]["reason"]
