"""Classifiers of token sequences, trained from random weights: BERT and a bidirectional LSTM.

Both take ONE tensor: token ids int64 [N, L], padded with 0, which they mask themselves. The LSTM takes series of numbers
[N, L, F] as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

PAD = 0
"""The id that fills up short sequences."""


class BertClassifier(nn.Module):
    """transformers' BERT encoder with its pooler, dropout and a linear classifier (Devlin et al. 2018, arXiv:1810.04805).

    Args:
        config: a ``transformers.BertConfig``.
        num_classes: outputs.
    """

    def __init__(self, config: Any, num_classes: int) -> None:
        from transformers import BertModel

        super().__init__()
        self.bert: Any = BertModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, num_classes)
        nn.init.normal_(self.classifier.weight, std=config.initializer_range)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [N, L] -> logits [N, num_classes]."""
        # Part by part: BertModel's own forward looks at the mask's values, which waits for the device, and doesn't export.
        mask = (ids != PAD)[:, None, None, :]  # [N, 1, 1, L]
        states = self.bert.encoder(self.bert.embeddings(input_ids=ids), attention_mask=mask).last_hidden_state
        return self.classifier(self.dropout(self.bert.pooler(states)))


def _bert(num_classes: int, layers: int, width: int, heads: int, vocab_size: int, dropout: float, length: int) -> BertClassifier:
    from transformers import BertConfig

    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        max_position_embeddings=length,
        pad_token_id=PAD,
    )
    return BertClassifier(config, num_classes)


def bert_base(
    num_classes: int = 2,
    layers: int = 12,
    width: int = 768,
    heads: int = 12,
    vocab_size: int = 30522,
    dropout: float = 0.1,
    length: int = 512,
) -> BertClassifier:
    """BERT-base: 109.5 M parameters; ids below ``vocab_size``, sequences of at most ``length``."""
    return _bert(num_classes, layers, width, heads, vocab_size, dropout, length)


def bert_small(
    num_classes: int = 2,
    layers: int = 4,
    width: int = 256,
    heads: int = 4,
    vocab_size: int = 8192,
    dropout: float = 0.1,
    length: int = 512,
) -> BertClassifier:
    """A BERT that trains in minutes on a CPU: 5.5 M parameters; ids below ``vocab_size``, sequences of at most ``length``."""
    return _bert(num_classes, layers, width, heads, vocab_size, dropout, length)


class LSTMClassifier(nn.Module):
    """Embedding, bidirectional LSTM (Hochreiter & Schmidhuber 1997), attention pooling, linear classifier.

    Each place gets a score from its hidden state; the softmax of the scores over places that are no padding weighs the states
    (Yang et al. 2016, Hierarchical Attention Networks, with one layer of it).

    Args:
        features: numbers at each place of a series [N, L, features]; None for token ids.
    """

    def __init__(
        self, num_classes: int, features: int | None, vocab_size: int, embedding: int, width: int, layers: int, dropout: float
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding, padding_idx=PAD) if features is None else None
        self.dropout = nn.Dropout(dropout)
        self.lstm = nn.LSTM(
            embedding if features is None else features,
            width,
            layers,
            batch_first=True,
            bidirectional=True,
            dropout=dropout if layers > 1 else 0.0,
        )
        self.attention = nn.Linear(2 * width, 1)
        self.classifier = nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """int64 [N, L], or floating-point [N, L, features] -> logits [N, num_classes]."""
        states, _ = self.lstm(self.dropout(x if self.embedding is None else self.embedding(x)))  # [N, L, 2 * width]
        scores = self.attention(states).squeeze(2)  # [N, L]
        if self.embedding is not None:
            scores = scores.masked_fill(x == PAD, torch.finfo(scores.dtype).min)
        pooled = (scores.softmax(1).unsqueeze(2) * states).sum(1)
        return self.classifier(self.dropout(pooled))


def lstm(
    num_classes: int = 2,
    in_channels: int | None = None,
    vocab_size: int = 8192,
    embedding: int = 128,
    width: int = 128,
    layers: int = 1,
    dropout: float = 0.3,
) -> LSTMClassifier:
    """A bidirectional LSTM with attention pooling, 1.3 M parameters.

    Args:
        in_channels: numbers at each place of a series; None for token ids below ``vocab_size``.
    """
    return LSTMClassifier(num_classes, in_channels, vocab_size, embedding, width, layers, dropout)
