"""Quantization without calibration: linear layers, LSTMs and embeddings, against closed forms and floating point."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from workbench.artefact import load_model, save_model, size_on_disk
from workbench.compress import QuantConfig, quantize
from workbench.compress.dynamic import Int8Embedding
from workbench.compress.int8_lstm import Int8LSTM
from workbench.compress.saturation import saturates
from workbench.errors import ModelError
from workbench.models import ModelConfig, build_model

DYNAMIC, WEIGHTS = QuantConfig(mode="dynamic"), QuantConfig(mode="weight_only")


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(1, 500, (4, 24), generator=torch.Generator().manual_seed(0))


def text(name: str) -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelConfig(name=name, num_classes=4, args={"vocab_size": 500})).eval()


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("bert_small", DYNAMIC),
        ("bert_small", WEIGHTS),
        ("lstm", DYNAMIC),
        ("bert_small", DYNAMIC.override({"granularity": "tensor"})),
    ],
)
def test_text_models_are_a_quarter_as_large_and_reload_bit_equal(
    name: str, config: QuantConfig, ids: Tensor, tmp_path: Path
) -> None:
    model = text(name)
    before = copy.deepcopy(model.state_dict())
    quantized = quantize(model, config)
    with torch.no_grad():
        output, reference = quantized(ids), model(ids)
        assert (output - reference).norm() / reference.norm() < 0.05
        small, large = save_model(quantized, tmp_path / "int8"), save_model(model, tmp_path / "float")
        assert size_on_disk(small) < 0.3 * size_on_disk(large)
        assert torch.equal(load_model(small)(ids), output)
        assert torch.equal(copy.deepcopy(quantized)(ids), output)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.skipif(saturates(), reason="INT8 products saturate on this CPU, which has no VNNI")
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_an_lstm_gives_what_pytorchs_gives(bidirectional: bool, batch_first: bool) -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(16, 32, num_layers=2, bidirectional=bidirectional, batch_first=batch_first).eval()
    x, (hidden, cell) = torch.randn(5, 7, 16), (torch.randn(2, 2 + 2 * bidirectional, 7 if not batch_first else 5, 32) * 0.1)
    with torch.no_grad():
        for state in (None, (hidden, cell)):
            ours, theirs = Int8LSTM(lstm)(x, state), lstm(x, state)
            for one, other in ((ours[0], theirs[0]), (ours[1][0], theirs[1][0]), (ours[1][1], theirs[1][1])):
                assert one.shape == other.shape
                assert (one - other).norm() / other.norm() < 0.05


def test_an_int8_lstm_exports_and_compiles_whole(tmp_path: Path, ids: Tensor) -> None:
    int8 = quantize(text("lstm"), DYNAMIC)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(int8, (ids,), dynamic_shapes=({0: batch},), strict=True)
    torch.export.save(program, tmp_path / "lstm.pt2")
    loaded = torch.export.load(tmp_path / "lstm.pt2").module()
    with torch.no_grad():
        for samples in (ids, ids[:1], ids.repeat(3, 1)):
            assert torch.equal(loaded(samples), int8(samples))
        assert torch.allclose(torch.compile(int8, fullgraph=True, dynamic=False)(ids), int8(ids), atol=1e-4)


def test_exported_files_load_elsewhere_once_their_operations_are_imported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    lstm, ids, x = text("lstm"), torch.randint(1, 500, (4, 8)), torch.randn(16, 8)
    static = quantize(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), None, x)
    cases = {  # in this order: reading the second file imports what the first one needs
        "torchao.quantization.pt2e": (static.graph, x),
        "workbench.compress.int8_lstm": (quantize(lstm, DYNAMIC), ids),
    }
    for needed, (model, given) in cases.items():
        torch.export.save(torch.export.export(model, (given,), strict=True), tmp_path / f"{needed}.pt2")
        torch.save((given, model(given)), tmp_path / f"{needed}.pt")
    code = """
import importlib, sys, torch
folder, *names = sys.argv[1:]
for needed in names:
    try:
        torch.export.load(f"{folder}/{needed}.pt2")
        sys.exit("it loads without: say so in the docstrings")
    except RuntimeError:
        importlib.import_module(needed)
    given, expected = torch.load(f"{folder}/{needed}.pt")
    assert torch.equal(torch.export.load(f"{folder}/{needed}.pt2").module()(given), expected), needed
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), *cases], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]


def test_an_lstm_follows_weights_loaded_after_a_call() -> None:
    torch.manual_seed(0)
    first, second = (Int8LSTM(nn.LSTM(8, 8)) for _ in range(2))
    x = torch.randn(3, 2, 8)
    with torch.no_grad():
        before = first(x)[0]
        first.load_state_dict(second.state_dict())
        assert torch.equal(first(x)[0], second(x)[0]) and not torch.equal(first(x)[0], before)


def test_a_model_that_is_an_lstm_or_a_linear_layer_is_not_left_alone() -> None:
    assert isinstance(quantize(nn.LSTM(4, 4), DYNAMIC), Int8LSTM)
    linear = quantize(nn.Linear(16, 16), DYNAMIC)
    assert type(linear.weight.data) is not Tensor


def test_an_embedding_is_within_half_a_step() -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(100, 32, padding_idx=0)
    small = Int8Embedding(embedding)
    rows = torch.arange(100)
    step = embedding.weight.abs().amax(1, keepdim=True) / 127
    assert ((small(rows) - embedding(rows)).abs() <= step / 2 + 1e-7).all()
    assert small(torch.zeros(2, 3, dtype=torch.int64)).abs().max() == 0  # padding stays zero
    assert torch.equal(small(rows), small.weight)


def test_layers_kept_in_float_and_embeddings_by_choice(ids: Tensor) -> None:
    quantized = quantize(text("lstm"), QuantConfig(mode="dynamic", keep_float=["lstm"], embedding_bit=32))
    assert isinstance(quantized.lstm, nn.LSTM) and isinstance(quantized.embedding, nn.Embedding)
    assert type(quantized.classifier.weight.data) is not Tensor


def test_a_model_that_hardly_changes_is_no_silent_success(tmp_path: Path) -> None:
    model = build_model(ModelConfig(name="resnet20", num_classes=10, in_channels=1, args={"width": 4}))
    with pytest.warns(UserWarning, match=r"mode='dynamic' takes .*: \d\.\d% of the parameters of ResNet.*mode='static'"):
        quantized = quantize(model, DYNAMIC)
    load_model(save_model(quantized, tmp_path / "m"))  # and isn't said again


def test_what_has_no_form_is_refused() -> None:
    with pytest.raises(ModelError, match="mode='dynamic'"):
        quantize(text("lstm"), WEIGHTS)
    with pytest.raises(ModelError, match="mode='static'"):
        quantize(nn.Conv2d(1, 1, 1), DYNAMIC)
    with pytest.raises(ModelError, match="proj_size"):
        quantize(nn.LSTM(8, 8, proj_size=4), DYNAMIC)
    with pytest.raises(ModelError, match="embedding_bit=32"):
        Int8Embedding(nn.Embedding(4, 4, max_norm=1.0))
    with pytest.raises(ModelError, match="quantized already"):
        quantize(quantize(nn.Linear(16, 16), DYNAMIC), DYNAMIC)
