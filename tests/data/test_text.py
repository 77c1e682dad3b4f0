"""Texts as ids: the vocabulary's definition, AG News divided, models trained on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench import TrainConfig, train
from workbench.data import load_batches, load_splits
from workbench.data.cards import data_folder
from workbench.data.config import DataConfig
from workbench.data.splits import Arrays, Splits
from workbench.data.text import UNKNOWN, Vocabulary, words
from workbench.errors import DataError, ModelError


def test_words_are_lower_cased_and_markup_is_dropped() -> None:
    text = r"Oil\soars: the  #36;43.5M &lt;A HREF=x&gt;deal&lt;/A&gt; wasn't Ivan #39;s"
    assert words(text) == ["oil", "soars", ":", "the", "$", "43", ".", "5", "m", "deal", "wasn't", "ivan's"]


@given(st.lists(st.text(alphabet="abc ", max_size=30), min_size=1, max_size=8), st.integers(2, 8), st.integers(1, 12))
def test_ids_are_those_of_the_most_frequent_words(texts: list[str], size: int, length: int) -> None:
    vocabulary = Vocabulary.of(texts, size)
    assert len(vocabulary) <= size
    ids = vocabulary.encode(texts, length)
    assert ids.shape == (len(texts), length) and ids.dtype == torch.int64
    counted = {word: sum(words(text).count(word) for text in texts) for text in texts for word in words(text)}
    left_out = set(counted) - set(vocabulary.entries)
    assert all(counted[kept] >= counted[other] for kept in vocabulary.entries for other in left_out)
    for row, text in zip(ids.tolist(), texts, strict=True):
        found = [vocabulary.entries[i - 2] if i > UNKNOWN else None for i in row if i]
        assert found == [word if word in vocabulary.entries else None for word in words(text)[:length]]
        assert row[len(found) :] == [0] * (length - len(found))


needs_news = pytest.mark.skipif(
    not (data_folder() / "ag_news" / "test.csv").is_file(), reason="ag_news/test.csv is not below WORKBENCH_DATA"
)


@needs_news
def test_the_articles_are_divided_by_seed_class_by_class() -> None:
    one, same, other = (load_splits(DataConfig(name="ag_news", args={"seed": seed})) for seed in (0, 0, 1))
    for split, count in (("train", 1500), ("eval", 400)):
        assert torch.bincount(getattr(one, split).y).tolist() == [count] * 4
        assert torch.equal(getattr(one, split).x, getattr(same, split).x)
        assert not torch.equal(getattr(one, split).y, getattr(other, split).y)
    x: Any = one.train.x  # type: ignore[union-attr]
    assert int(x.max()) < 8192 and float((x == UNKNOWN).sum() / (x > 0).sum()) < 0.08


@needs_news
def test_ids_reach_the_model_as_they_are() -> None:
    config = DataConfig(name="ag_news", limit=128, batch_size=64, args={"length": 16})
    ids: Any = load_splits(config).train.x  # type: ignore[union-attr]
    batches = load_batches(config, "train")
    seen = torch.cat([x for x, _ in batches])
    assert seen.dtype == torch.int64 and sorted(seen.tolist()) == sorted(ids.tolist())
    known = Vocabulary(batches.tokens[2:])
    text = " ".join(batches.tokens[i] for i in seen[0].tolist() if i > UNKNOWN)
    assert known.encode([text], 16)[0].tolist()[: int((seen[0] > UNKNOWN).sum())] == [i for i in seen[0].tolist() if i > UNKNOWN]


@needs_news
@pytest.mark.slow
@pytest.mark.parametrize(("name", "rate"), [("bert_small", 5e-3), ("lstm", 2e-2)])
def test_a_model_learns_to_classify_articles(name: str, rate: float) -> None:
    config = TrainConfig(
        data={"name": "ag_news", "limit": 1500, "batch_size": 50, "args": {"length": 24}},
        model={"name": name, "args": {"width": 32, **({"layers": 1, "heads": 2} if name == "bert_small" else {"embedding": 32})}},
        optim={"lr": rate, "weight_decay": 0.01},
        clip={"mode": "fixed"},
        epochs=4,
        device="cpu",
    )
    result = train(config)
    assert result.metrics["accuracy"] > 0.6
    x = load_batches(config.data)[0][0]
    with torch.no_grad():
        assert torch.equal(result.run.load_model()(x), result.model(x))


def test_articles_that_are_missing_or_damaged_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"AG News is not at .*Set WORKBENCH_DATA"):
        load_splits(DataConfig(name="ag_news"))
    (tmp_path / "ag_news").mkdir()
    (tmp_path / "ag_news" / "test.csv").write_text('"1","a","b"\n"5","c","d"\n')
    with pytest.raises(DataError, match="has 2 articles, and line 2 is no"):
        load_splits(DataConfig(name="ag_news"))


def test_an_id_beyond_the_embedding_is_named_before_training() -> None:
    ids = torch.randint(1, 60, (64, 8))
    ids[3, 3] = 70
    part = Arrays(ids, torch.arange(64) % 4)
    config = TrainConfig(
        data={"batch_size": 16}, model={"name": "lstm", "args": {"vocab_size": 60, "width": 8}}, epochs=1, device="cpu"
    )
    with pytest.raises(ModelError, match=r"token id 70.*holds 60.*vocab_size=71"):
        train(config, data=Splits(part, part))
