"""Texts as token ids: a vocabulary of words, and the loaders of the text data sets that have a card."""

from __future__ import annotations

import csv
import html
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from workbench.data.cards import data_folder
from workbench.data.splits import Arrays, Splits, stratified
from workbench.errors import DataError

PAD, UNKNOWN = 0, 1
"""Ids of what fills up a short text, and of a word that the vocabulary does not hold."""

_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?|\d+|[^\sa-z\d]")
_MARKUP = re.compile(r"<[^>]{0,200}>")


def words(text: str) -> list[str]:
    """Lower-cased words, whole numbers and single other characters; markup and escapes of web pages are dropped."""
    plain = html.unescape(text.replace("\\", " ").replace(" #39;", "&#39;").replace("#36;", "&#36;"))
    return _WORD.findall(_MARKUP.sub(" ", plain).lower())


@dataclass(frozen=True)
class Vocabulary:
    """Words by id: word i of ``entries`` has the id i + 2, as 0 is padding and 1 an unknown word.

    Example:
        >>> Vocabulary.of(["the cat", "the dog"], size=3).encode(["The bird"], length=4)
        tensor([[2, 1, 0, 0]])
    """

    entries: tuple[str, ...]

    @classmethod
    def of(cls, texts: Iterable[str], size: int, least: int = 1) -> Self:
        """The most frequent words of ``texts``; among equals, in alphabetical order.

        Args:
            size: ids in all, the two special ones included.
            least: occurrences that a word needs.
        """
        counts = Counter(word for text in texts for word in words(text))
        ordered = sorted((word for word, count in counts.items() if count >= least), key=lambda word: (-counts[word], word))
        return cls(tuple(ordered[: max(0, size - 2)]))

    def __len__(self) -> int:
        return len(self.entries) + 2

    @property
    def tokens(self) -> tuple[str, ...]:
        """Text of each id: none of padding."""
        return "", "[unknown]", *self.entries

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self.entries, start=2)}

    def encode(self, texts: Sequence[str], length: int) -> Tensor:
        """int64 [N, length]: each text's first words as ids, filled up with 0."""
        ids = torch.zeros(len(texts), length, dtype=torch.int64)
        for row, text in enumerate(texts):
            found = [self._ids.get(word, UNKNOWN) for word in words(text)[:length]]
            ids[row, : len(found)] = torch.tensor(found, dtype=torch.int64)
        return ids


def ag_news(length: int = 64, vocabulary: int = 8192, seed: int = 0) -> Splits:
    """The 7,600 test articles of AG News: 6,000 to train on and 1,600 to evaluate on, each class a quarter of both.

    Args:
        length: ids per article, title first; longer ones are cut off.
        vocabulary: ids in all; the words are those of the articles trained on that occur twice or more.
        seed: of the division.

    Returns:
        Splits of token ids int64 [N, length] and int64 labels.

    Raises:
        DataError: ``ag_news/test.csv`` is not below the data folder, or is not what its publisher wrote.
    """
    labels, texts = _ag_news_articles()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    evaluated = torch.zeros(len(labels), dtype=torch.bool)
    evaluated[stratified(order, labels, 1600)] = True
    known = Vocabulary.of((text for text, held in zip(texts, evaluated, strict=True) if not held), vocabulary, least=2)
    ids = known.encode(texts, length)
    return Splits(Arrays(ids[~evaluated], labels[~evaluated]), Arrays(ids[evaluated], labels[evaluated]), tokens=known.tokens)


def _ag_news_articles() -> tuple[Tensor, list[str]]:
    file = data_folder() / "ag_news" / "test.csv"
    try:
        with file.open(encoding="utf-8", newline="") as content:
            rows = list(csv.reader(content))
    except OSError as error:
        raise DataError(
            f"AG News is not at {file}: {error.strerror}.", "Set WORKBENCH_DATA to the folder that holds ag_news/test.csv."
        ) from None
    wrong = next((number for number, row in enumerate(rows, 1) if len(row) != 3 or row[0] not in ("1", "2", "3", "4")), None)
    if wrong is not None or len(rows) != 7600:
        raise DataError(
            f"{file} has {len(rows)} articles{f', and line {wrong} is no (class, title, description)' if wrong else ''}.",
            "Fetch it again: 7,600 lines of class 1–4, title and description.",
        )
    return torch.tensor([int(row[0]) - 1 for row in rows]), [f"{title} {description}" for _, title, description in rows]
