"""Other runtimes as backends: called, saved and loaded like the model they came from."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from workbench.artefact import load_model, save_model
from workbench.compress import QuantConfig, quantize
from workbench.compress import gpu as on_gpu
from workbench.errors import ConfigError, DeviceError, MissingDependency, ModelError
from workbench.models import ModelConfig, build_model

pytestmark = pytest.mark.filterwarnings("ignore")  # of the runtimes themselves

NETS = Path(__file__).with_name("nets.py")
EXTRA = {"onnxruntime": ("onnxruntime", "onnxscript"), "openvino": ("openvino", "nncf", "onnxscript")}
CONFIGS = {
    "onnxruntime": QuantConfig(backend="onnxruntime"),
    "onnxruntime percentile": QuantConfig(backend="onnxruntime", observer="percentile", quant_scheme="symmetric"),
    "onnxruntime dynamic": QuantConfig(backend="onnxruntime", mode="dynamic"),
    "openvino": QuantConfig(backend="openvino"),
    "openvino weights": QuantConfig(backend="openvino", mode="weight_only"),
}


def build(name: str = "residual") -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelConfig(name=f"{NETS}:{name}", num_classes=10, in_channels=1 if name == "residual" else None)).eval()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.rand(64, 1, 28, 28, generator=torch.Generator().manual_seed(1))


def need(backend: str) -> None:
    for module in EXTRA[backend]:
        pytest.importorskip(module)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_called_copied_and_reloaded_like_a_model(name: str, x: Tensor, tmp_path: Path) -> None:
    config, model = CONFIGS[name], build()
    need(config.backend)
    quantized = quantize(model, config, x)
    with torch.no_grad():
        reference = model(x)
    assert (quantized(x) - reference).norm() / reference.norm() < 0.05
    assert quantized(x[:3]).shape == (3, 10)
    assert torch.equal(copy.deepcopy(quantized)(x), quantized(x))
    save_model(quantized, tmp_path)
    assert torch.equal(load_model(tmp_path)(x), quantized(x))
    assert quantized.structure.transforms[-1]["parameters"] == sum(p.numel() for p in model.parameters())
    with pytest.raises(ModelError, match="Fine-tune the model first"):
        quantized.train()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_kept_layers_stay_in_float(backend: str, x: Tensor) -> None:
    need(backend)
    model = build()
    with torch.no_grad():
        reference = model(x)
        layers = ["stem", "conv1", "conv2", "conv3", "shortcut", "head"]
        full = quantize(model, QuantConfig(backend=backend), x)(x)
        kept = quantize(model, QuantConfig(backend=backend, keep_float=layers), x)(x)
    assert (kept - reference).norm() < 0.6 * (full - reference).norm()  # sums are still rounded
    with pytest.raises(ConfigError, match="matches no layer"):
        quantize(model, QuantConfig(backend=backend, keep_float=["nowhere"]), x)


@pytest.mark.slow
def test_models_of_ids_take_ids(tmp_path: Path) -> None:
    need("onnxruntime")
    ids = torch.randint(1, 50, (16, 12))
    model = build("tokens")
    quantized = quantize(model, QuantConfig(backend="onnxruntime"), ids)
    with torch.no_grad():
        torch.testing.assert_close(quantized(ids), model(ids), rtol=0.1, atol=0.05)


def test_without_its_extra_a_backend_names_it(x: Tensor) -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = sys.modules['nncf'] = sys.modules['executorch'] = None\n"
        "import torch; from torch import nn; from workbench import QuantConfig, quantize\n"
        "from workbench.errors import MissingDependency\n"
        "for backend, extra in (('onnxruntime', 'onnx'), ('openvino', 'openvino'), ('xnnpack', 'executorch')):\n"
        "    try: quantize(nn.Linear(4, 4), QuantConfig(backend=backend), torch.randn(4, 4))\n"
        "    except MissingDependency as error: assert f'workbench[{extra}]' in str(error), error\n"
        "    else: raise AssertionError(backend)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert issubclass(MissingDependency, Exception)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"backend": "openvino", "mode": "dynamic"}, "it has static, weight_only"),
        ({"mode": "fp8"}, "fp8 runs on cuda"),
        ({"weight_bit": 4}, "weight_bit=4 is for"),
        ({"backend": "onnxruntime", "activation_bit": 7}, "activation_bit=7"),
        ({"observer": "minimax"}, "Did you mean 'minmax'"),
        ({"percentile": 40}, "percentile"),
    ],
)
def test_what_a_backend_cannot_do_is_refused_when_asked_for(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        QuantConfig(**settings)


def test_settings_that_a_backend_chooses_itself_are_refused(x: Tensor) -> None:
    need("openvino")
    need("onnxruntime")
    for config, words in (
        (QuantConfig(backend="openvino", observer="entropy"), "NNCF chooses"),
        (QuantConfig(backend="onnxruntime", observer="histogram"), "has no observer 'histogram'"),
        (QuantConfig(backend="xnnpack", quant_scheme="symmetric"), "leaves no choice"),
    ):
        with pytest.raises(ConfigError, match=words):
            quantize(build(), config, x)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_without_a_gpu_its_backend_says_so() -> None:
    with pytest.raises(DeviceError, match="none is here"):
        quantize(nn.Linear(32, 32), QuantConfig(mode="fp8", backend="cuda"))


def test_layers_for_the_gpu_have_sizes_that_its_kernels_take() -> None:
    model = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10), nn.Linear(12, 32))
    config = QuantConfig(mode="dynamic", backend="cuda")
    assert on_gpu.quantizable_layers(model, config) == ["0"]
    assert on_gpu.quantizable_layers(model, config.override({"mode": "weight_only", "weight_bit": 4})) == ["0"]
    with pytest.raises(ModelError, match="multiple of 16"):
        on_gpu.quantizable_layers(model[2:], config)
