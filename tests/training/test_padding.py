"""Token sequences padded for tensor cores: the same outputs and losses, or none of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from workbench import TrainConfig, train
from workbench.data.config import DataConfig
from workbench.data.splits import Arrays, Splits
from workbench.errors import ConfigError
from workbench.models.text import bert_small, lstm
from workbench.training.decisions import Decisions
from workbench.training.padding import TOLERANCE, settle_padding

NET = Path(__file__).with_name("net.py")
BERT = {"layers": 2, "width": 32, "heads": 2, "vocab_size": 100}
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def sentences(length: int) -> Splits:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 100, (12, length), generator=generator)
    ids[torch.arange(length)[None] >= torch.randint(3, length + 1, (12, 1), generator=generator)] = 0
    return Splits(Arrays(ids, torch.arange(12) % 2), Arrays(ids[:6], torch.arange(6) % 2))


def settled(model: nn.Module, splits: Splits, pad_to: Any = "auto", device: torch.device = CUDA) -> tuple[Splits, Decisions]:
    decided = Decisions()
    return settle_padding(DataConfig(pad_to=pad_to), model, splits, device, torch.bfloat16, decided), decided


@pytest.mark.parametrize("length", range(3, 20, 3))
def test_a_model_that_masks_gives_the_same_outputs_and_gradients(length: int) -> None:
    torch.manual_seed(0)
    model, splits = bert_small(**BERT).eval(), sentences(length)
    padded, decided = settled(model, splits)
    assert padded.train.x.shape[1] == padded.eval.x.shape[1] == -(-length // 8) * 8  # type: ignore[union-attr]
    assert torch.equal(padded.train.x[:, :length], splits.train.x) and not padded.train.x[:, length:].any()  # type: ignore[union-attr]
    assert decided.made["data.pad_to"]["value"] == 8
    found = []
    for part in (splits.train, padded.train):
        model.zero_grad()
        logits = model(part.x)  # type: ignore[union-attr]
        nn.functional.cross_entropy(logits, part.y).backward()  # type: ignore[union-attr]
        found.append([logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(two, one, rtol=TOLERANCE, atol=1e-6)


class Mean(nn.Module):
    """Forgets to mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding(ids).mean(1)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Mean(), "computes something else then"),
        (lstm(vocab_size=100, width=8, embedding=8), "computes something else then"),
        (bert_small(**BERT, length=13), "the model fails on longer ones"),
        (nn.Embedding(100, 4), "output is as long as its input"),
    ],
    ids=["unmasked", "lstm", "places", "tokens"],
)
def test_other_models_see_what_they_saw(model: nn.Module, words: str) -> None:
    splits = sentences(13)
    found, decided = settled(model, splits)
    assert found is splits and model.training
    assert decided.made["data.pad_to"]["value"] == 1 and words in decided.made["data.pad_to"]["reason"]
    with pytest.raises(ConfigError, match=rf"data.pad_to=8 would pad 13 tokens to 16, and .*{words}.*Set data.pad_to=auto"):
        settled(model, splits, 8)


def test_nothing_is_padded_without_a_need() -> None:
    model = bert_small(**BERT)
    for splits, pad_to, device in ((sentences(13), "auto", CPU), (sentences(13), 1, CUDA), (sentences(16), "auto", CUDA)):
        found, decided = settled(model, splits, pad_to, device)
        assert found is splits and not decided.made
    images = Splits(*(Arrays(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(4).long()) for _ in range(2)))
    assert settled(model, images)[0] is images
    with pytest.raises(ConfigError, match="pads token ids held in memory"):
        settled(model, images, 8)


def test_a_padded_run_has_the_losses_of_the_other(config: Callable[..., TrainConfig]) -> None:
    given = config(
        data={"name": f"{NET}:words", "args": {"length": 11}, "batch_size": 32},
        model={"name": "bert_small", "args": BERT | {"dropout": 0.0}},
        epochs=1,
    )
    plain, padded = train(given).run, train(given.override({"data.pad_to": 8})).run
    assert padded.resolved["data.pad_to"] == {"value": 8, "reason": "11 tokens padded to 16 change no output"}
    assert "data.pad_to" not in plain.resolved
    assert float(np.abs(plain.history["loss"] - padded.history["loss"]).max()) < 1e-4
