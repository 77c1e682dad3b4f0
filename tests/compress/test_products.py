"""8-bit linear layers against closed forms in float64, and models made of them: calibrated, compiled, joined, reloaded."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.compress.nets import Attending
from tests.fresh import answers_elsewhere
from workbench.artefact import load_model, save_model
from workbench.compress import QuantConfig, compiled, quantize
from workbench.compress.calibration import inputs_seen
from workbench.compress.gpu import reduced
from workbench.compress.joined import Part, join_siblings
from workbench.compress.patches import PatchConv2d, patches_as_products
from workbench.compress.products import (
    EightBitLinear,
    Fp8Linear,
    Int8Linear,
    Range,
    scaled_product,
    scaled_product_in_float,
)
from workbench.errors import ConfigError, DataError, ModelError
from workbench.models import ModelConfig, build_model
from workbench.models.structure import structure_of

NETS = Path(__file__).with_name("nets.py")
FP8, STATIC, DYNAMIC = (QuantConfig(mode=mode, backend="cuda") for mode in ("fp8", "static", "dynamic"))
CASES = {
    "fp8": (FP8, True),
    "fp8, a scale for each channel": (FP8.override({"granularity": "channel"}), True),
    "fp8, measured": (FP8, False),
    "fp8, measured by row": (FP8.override({"granularity": "channel"}), False),
    "int8": (STATIC, True),
    "int8, symmetric": (STATIC.override({"quant_scheme": "symmetric", "observer": "minmax"}), True),
    "int8, a scale for each tensor": (STATIC.override({"granularity": "tensor"}), True),
    "int8, measured": (DYNAMIC, False),
    "int8, measured, a scale for each tensor": (DYNAMIC.override({"granularity": "tensor"}), False),
}


def text() -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelConfig(name="bert_small", num_classes=4, args={"layers": 2, "vocab_size": 500})).eval()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(1, 500, (8, 24), generator=torch.Generator().manual_seed(0))


def made(model: nn.Module, config: QuantConfig, samples: Tensor | None) -> nn.Module:
    """As ``quantize`` does where there is a GPU."""
    module, found = reduced(copy.deepcopy(model), config, [] if samples is None else [samples])
    module.structure = structure_of(model).then({"kind": "quantize", "config": config.model_dump(mode="json"), **found})
    return module


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    sizes=st.tuples(st.sampled_from([16, 48, 64]), st.sampled_from([16, 32])),
    by_channel=st.booleans(),
    bias=st.booleans(),
    low=st.floats(-8, 0),
    high=st.floats(0, 8),
    seed=st.integers(0, 99),
)
def test_integer_products_are_those_of_rounded_numbers(
    rows: int, sizes: tuple[int, int], by_channel: bool, bias: bool, low: float, high: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(*sizes, bias=bias)
    x = torch.randn(rows, sizes[0], generator=generator) * 3
    scale = max(high - low, 1e-3) / 255
    of = Range(scale, round(-low / scale) - 128)
    layer = Int8Linear(linear, by_channel, of)
    weight, offset = linear.weight.detach().double(), linear.bias.detach().double() if bias else 0
    rounded = (torch.round(x / scale + of.zero).clamp(-128, 127).double() - of.zero) * scale
    torch.testing.assert_close(layer(x).double(), rounded @ layer.weight.double().T + offset, rtol=1e-4, atol=1e-4)
    largest = weight.abs().amax(1, keepdim=True)
    step = (largest if by_channel else largest.amax().expand_as(largest)) / 127
    assert ((layer.weight - weight).abs() <= step * 0.5001).all()
    measured = Int8Linear(linear, by_channel)(x).double()
    by = x.double().abs().amax(1, keepdim=True) if by_channel else x.double().abs().amax()
    bound = by / 254 * weight.abs().sum(1) + (x.double().abs().sum(1, keepdim=True) + by * sizes[0] / 254) * step.T / 2
    assert ((measured - (x.double() @ weight.T + offset)).abs() <= bound * 1.001 + 1e-5).all()


@pytest.mark.parametrize("by_channel", [True, False])
@pytest.mark.parametrize("calibrated", [True, False])
def test_floating_point_products_are_those_of_rounded_numbers(by_channel: bool, calibrated: bool) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 48), torch.randn(9, 64) * torch.logspace(-3, 2, 9)[:, None]
    layer = Fp8Linear(linear, by_channel, Range(0.25) if calibrated else None)
    by = torch.tensor(0.25) if calibrated else (x.abs().amax(1, keepdim=True) if by_channel else x.abs().amax()) / 448
    rounded = (x / by).clamp(-448, 448).to(torch.float8_e4m3fn).double() * by.double()
    expected = rounded @ layer.weight.double().T + linear.bias.detach().double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-2, atol=1e-3)  # the output is bfloat16
    error = (layer.weight - linear.weight.detach()).abs()
    assert (error <= linear.weight.detach().abs() / 16 + layer.scale.reshape(-1, 1) * 2**-10).all()  # three bits and a half step
    assert layer(x.bfloat16()).dtype == torch.bfloat16 and layer(x).dtype == torch.float32
    assert layer(x[None, :, None]).shape == (1, 9, 1, 48) and layer(x[0]).shape == (48,)


@pytest.mark.parametrize("rows", [True, False])
def test_the_kernel_multiplies_as_floating_point_does(rows: bool) -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(n, 32).to(torch.float8_e4m3fn) for n in (20, 16))
    scales = (torch.rand(20, 1), torch.rand(1, 16)) if rows else (torch.rand(()), torch.rand(()))
    bias = torch.randn(16).bfloat16()
    try:
        found = scaled_product(x, scales[0], weight, scales[1], bias)
    except (RuntimeError, ValueError) as error:
        pytest.skip(f"no such kernel for this CPU in this PyTorch: {error}")
    torch.testing.assert_close(found, scaled_product_in_float(x, scales[0], weight, scales[1], bias), rtol=2e-2, atol=2e-2)


def test_calibration_sees_extremes_and_counts() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    unused = nn.ModuleDict({"net": model, "other": nn.Linear(16, 16)})
    unused.forward = lambda x: unused["net"](x)  # type: ignore[method-assign]
    batches = [torch.randn(10, 16), torch.randn(6, 16)]
    seen = inputs_seen(unused, ["net.0", "net.2", "other"], batches)
    assert set(seen) == {"net.0", "net.2"}
    assert seen["net.0"].lows.tolist() == [batch.min().item() for batch in batches]
    assert seen["net.0"].counts.sum() == 16 * 16 and seen["net.2"].counts.sum() == 16 * 32
    assert seen["net.2"].low == 0


@pytest.mark.parametrize("name", CASES)
def test_a_text_model_stays_close_and_reloads_bit_equal(name: str, ids: Tensor, tmp_path: Path) -> None:
    config, calibrated = CASES[name]
    model = text()
    with torch.no_grad():
        reference = model(ids)
        quantized = made(model, config, ids if calibrated else None)
        output = quantized(ids)
        assert (output - reference).norm() / reference.norm() < (0.12 if config.mode == "fp8" else 0.05)
        assert output.dtype == torch.float32 and quantized(ids[:1, :3]).shape == (1, 4)  # fewer rows than kernels take
        save_model(quantized, tmp_path)
        assert torch.equal(load_model(tmp_path)(ids), output)
        assert torch.equal(copy.deepcopy(quantized)(ids), output)
    layers = [module for module in quantized.modules() if isinstance(module, EightBitLinear)]
    assert len(layers) == 13 and all((layer.input_scale is not None) == calibrated for layer in layers)


def test_it_reloads_in_a_fresh_process(ids: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(name=f"{NETS}:tokens", num_classes=16)).eval()
    cases = [(made(model, config, ids % 50 if calibrated else None), ids % 50) for config, calibrated in CASES.values()]
    for (quantized, x), answer in zip(cases, answers_elsewhere(cases, tmp_path), strict=True):
        assert torch.equal(answer, quantized(x))


def test_layers_kept_in_float_and_layers_that_samples_do_not_reach(ids: Tensor, tmp_path: Path) -> None:
    quantized = made(text(), STATIC.override({"keep_float": ["bert.encoder.layer.0", "*.pooler.*"]}), ids)
    names = [name for name, module in quantized.named_modules() if isinstance(module, EightBitLinear)]
    assert len(names) == 6 and all(name.startswith("model.bert.encoder.layer.1.") for name in names)

    class Multihead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.attention = nn.Linear(32, 32), nn.MultiheadAttention(32, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.attention(y, y, y)[0]

    model = Multihead()
    x = torch.randn(6, 32)
    found = reduced(copy.deepcopy(model), STATIC, [x])[1]  # attention reads its layer's weight without calling it
    assert found["layers"] == ["first"]
    with pytest.raises(ModelError, match="samples reach no linear layer"):
        reduced(copy.deepcopy(model), STATIC.override({"keep_float": ["first"]}), [x])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp8", "int8, measured"])
def test_compiled_it_computes_the_same_and_siblings_are_one_product(name: str, ids: Tensor) -> None:
    config, calibrated = CASES[name]
    torch.manual_seed(0)
    ids = ids % 50
    quantized = reduced(Attending().eval(), config, [ids] if calibrated else [])[0]  # a BERT takes twice as long to compile
    with torch.no_grad():
        eager = quantized(ids)
        fast = compiled(quantized)
        assert (fast(ids) - eager).norm() / eager.norm() < 0.05  # what lies between two kernels was rounded to bfloat16
    assert sum(isinstance(module, Part) for module in fast.modules()) == 3
    assert not any(isinstance(module, Part) for module in quantized.modules())
    if config.mode == "dynamic":
        with torch.profiler.profile() as profile:
            fast(ids)
        assert {event.key: event.count for event in profile.key_averages()}["aten::_int_mm"] == 1 + 1


@pytest.mark.parametrize("name", CASES)
def test_joined_layers_compute_what_they_did(name: str, ids: Tensor) -> None:
    config, calibrated = CASES[name]
    quantized = made(text(), config, ids if calibrated else None)
    with torch.no_grad():
        output = quantized(ids)
        groups = join_siblings(quantized, ids)
        torch.testing.assert_close(quantized(ids), output, rtol=1e-2, atol=2e-3)
    expected = 0 if not config.by_channel and not calibrated else 2
    assert [[name.rpartition(".")[2] for name in group] for group in groups] == [["query", "key", "value"]] * expected


def test_layers_called_twice_or_on_other_inputs_are_left_apart() -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x) + self.a(x.exp()) + self.c(x.exp())

    module, _ = reduced(Net(), DYNAMIC, [])
    assert join_siblings(module, torch.randn(4, 16)) == []


@pytest.mark.parametrize("size", [(32, 48), (37, 20)])
def test_patches_are_cut_as_a_convolution_does(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, (16, 8), stride=(16, 8)), nn.Conv2d(5, 4, 1)).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    changed = patches_as_products(copy.deepcopy(model))
    assert isinstance(changed[0], PatchConv2d) and isinstance(changed[1], nn.Conv2d)
    torch.testing.assert_close(changed(x), model(x))
    assert changed.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    "settings", [{"padding": 1}, {"stride": 8}, {"groups": 3}, {"dilation": 2}, {"kernel_size": 2, "stride": 2}]
)
def test_other_convolutions_stay(settings: dict[str, int]) -> None:
    conv = nn.Conv2d(3, 6, **({"kernel_size": 16, "stride": 16} | settings))
    assert patches_as_products(nn.Sequential(conv))[0] is conv


def test_what_cannot_be_quantized_is_refused() -> None:
    with pytest.raises(ModelError, match="can be quantized for the GPU"):
        reduced(nn.Sequential(nn.Linear(10, 10)), DYNAMIC, [])
    with pytest.raises(DataError, match="needs samples"):
        quantize(nn.Linear(32, 32), STATIC)
    with pytest.raises(ConfigError, match="activation_bit=7"):
        STATIC.override({"activation_bit": 7})
