"""BERT and the LSTM: padding does not count, sequences of numbers, reference, export."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from workbench import TrainConfig, train
from workbench.data import Arrays, Splits
from workbench.models import ModelConfig, build_model
from workbench.models.text import BertClassifier

SMALL: dict[str, dict[str, Any]] = {
    "bert_small": {"layers": 2, "width": 32, "heads": 2, "vocab_size": 100, "length": 16},
    "lstm": {"embedding": 16, "width": 8, "vocab_size": 100},
}


def made(name: str) -> Any:
    torch.manual_seed(0)
    return build_model(ModelConfig(name=name, num_classes=4, args=SMALL[name])).eval()


def padded() -> torch.Tensor:
    ids = torch.randint(1, 100, (3, 12), generator=torch.Generator().manual_seed(0))
    ids[1, 7:] = 0
    return ids


def test_bert_is_transformers_own_forward_in_double_precision() -> None:
    model, ids = made("bert_small").double(), padded()
    expected = model.classifier(model.bert(input_ids=ids, attention_mask=(ids != 0).long()).pooler_output)
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=0)


def test_bert_does_not_see_padding() -> None:
    model, ids = made("bert_small").double(), padded()
    torch.testing.assert_close(model(ids[1:2, :7]), model(ids)[1:2])


def test_the_lstm_pools_by_the_softmax_of_scores_over_places_that_are_no_padding() -> None:
    model, ids = made("lstm").double(), padded()
    states, _ = model.lstm(model.embedding(ids))
    for row, length in ((0, 12), (1, 7), (2, 12)):
        kept = states[row, :length]
        weights = (kept @ model.attention.weight[0] + model.attention.bias).softmax(0)
        torch.testing.assert_close(model(ids)[row], model.classifier(weights @ kept))
    assert torch.isfinite(model(torch.zeros(2, 5, dtype=torch.int64))).all()  # padding alone is no division by zero


def test_the_lstm_takes_series_of_numbers() -> None:
    model = build_model(ModelConfig(name="lstm", num_classes=3, in_channels=5, args={"width": 8})).eval()
    assert model.embedding is None
    x = torch.randn(4, 9, 5)
    assert model(x).shape == (4, 3)
    torch.testing.assert_close(model(x[:1]), model(x)[:1])


def test_a_run_fits_the_lstm_to_its_series() -> None:
    """The sign of the sum of one of 3 numbers at each of 6 places."""
    torch.manual_seed(0)
    x = torch.randn(256, 6, 3)
    y = (x[:, :, 0].sum(1) > 0).long()
    config = TrainConfig(
        data={"batch_size": 32}, model={"name": "lstm", "args": {"width": 16}}, optim={"lr": 0.02}, epochs=8, device="cpu"
    )
    result = train(config, data=Splits(Arrays(x[:192], y[:192]), Arrays(x[192:], y[192:])))
    assert result.metrics["accuracy"] > 0.8
    with torch.no_grad():
        assert torch.equal(result.run.load_model()(x), result.model(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_text_model_exports_for_any_batch(name: str) -> None:
    model, ids = made(name), padded()
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(model, (ids,), dynamic_shapes=shapes, strict=True).module()
    for rows in (1, 2, 3):
        torch.testing.assert_close(program(ids[:rows]), model(ids[:rows]))


def test_the_registry_does_not_import_transformers() -> None:
    code = "import sys; from workbench.models import MODELS, text; assert 'lstm' in MODELS; print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_bert_base_has_the_size_of_bert_base() -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig(name="bert_base", num_classes=2))
    assert isinstance(model, BertClassifier)
    assert sum(p.numel() for p in model.parameters()) == 109_482_240 + 2 * 768 + 2
