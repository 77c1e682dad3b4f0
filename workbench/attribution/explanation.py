"""Explained samples, which show themselves.

* :func:`explain_samples` — explains samples and notes what the model makes of them.
* :class:`Explanation` — a sample, its credits, the model's answer: as HTML, a plotly figure, a table.
* :class:`Explanations` — several, as one page.
* :class:`Names` — of classes, tokens and columns, as a data set has them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor

from workbench.attribution.calls import Model, evaluating, outputs_of, part_of, targets_of
from workbench.attribution.crediting import explain
from workbench.attribution_config import AttributionConfig
from workbench.errors import DataError
from workbench.storage import write_atomic

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Kind = Literal["image", "text", "table", "series"]


@dataclass(frozen=True)
class Names:
    """Words for numbers: classes in label order, tokens by id, a table's columns in order; each may be empty."""

    classes: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()

    @classmethod
    def of(cls, data: Any) -> Self:
        """Those that a data set or its batches have as attributes."""
        return cls(*(tuple(getattr(data, name, ())) for name in ("classes", "tokens", "columns")))

    def label(self, index: int) -> str:
        """A class's name, else its number."""
        return self.classes[index] if index < len(self.classes) else str(index)

    def token(self, index: int) -> str:
        """A token's text, else its id."""
        return self.tokens[index] if index < len(self.tokens) else str(index)

    def column(self, index: int) -> str:
        """A column's name, else its number."""
        return self.columns[index] if index < len(self.columns) else str(index)


@dataclass(frozen=True, repr=False)
class Explanation:
    """One sample, what speaks for one of the model's outputs in it, and what the model makes of it.

    Example:
        >>> Explanation(x[0], explain(model, x[:1], 3)[0], target=3)
    """

    x: Tensor
    """An image (C, H, W), token ids (L,), a table's row (F,), or a series (L, F)."""
    credits: Tensor
    """Of x's shape, or one that broadcasts to it."""
    target: int = 0
    """The class whose output is explained."""
    prediction: int | None = None
    """The class that the model prefers, and its probability (the softmax of the outputs)."""
    probability: float | None = None
    method: str = ""
    label: int | None = None
    """The true class, the probability that the model gives it, and the cross-entropy, in nats."""
    label_probability: float | None = None
    loss: float | None = None
    sample: int | None = None
    """Its place in the data, from 0."""
    names: Names = field(default_factory=Names)

    @property
    def kind(self) -> Kind:
        """What it is drawn as.

        Raises:
            DataError: there is no drawing for this shape.
        """
        by_shape: dict[tuple[int, bool], Kind] = {(3, True): "image", (1, False): "text", (1, True): "table", (2, True): "series"}
        found = by_shape.get((self.x.dim(), self.x.is_floating_point()))
        if found is None:
            raise DataError(
                f"There is no drawing for a sample {list(self.x.shape)} of {self.x.dtype}.",
                "Draw images (C, H, W), rows (F,) and series (L, F) of numbers, or token ids (L,).",
            )
        return found

    @property
    def parts(self) -> Tensor:
        """Credits as drawn, on the CPU: of an image (H, W), of a series (L, F), of a text (L,), of a table's row (F,).

        An image's channels are summed; where a patch or window is credited as a whole, each of its channels has the whole credit,
        and their mean is taken.
        """
        credits = self.credits.detach().double().cpu()
        if self.kind != "image":
            return credits.expand(self.x.shape)
        whole = self.method == "occlusion" and len(credits) > 1
        return (credits.mean(0) if whole else credits.sum(0)).expand(self.x.shape[-2:])

    def table(self) -> pd.DataFrame:
        """A row a part with its credit: of a text and a series in order, else those with the largest credits first."""
        import pandas as pd

        parts, x = self.parts, self.x.detach().cpu()
        if self.kind == "text":
            tokens = [self.names.token(int(i)) for i in x]
            return pd.DataFrame({"position": range(len(x)), "token": tokens, "credit": parts.numpy()})
        if self.kind == "series":
            values = {self.names.column(i): x[:, i].numpy() for i in range(x.shape[1])}
            credits = {f"credit of {self.names.column(i)}": parts[:, i].numpy() for i in range(x.shape[1])}
            return pd.DataFrame({"step": range(len(x)), **values, **credits})
        if self.kind == "table":
            names = [self.names.column(i) for i in range(len(x))]
            found = pd.DataFrame({"column": names, "value": x.numpy(), "credit": parts.numpy()})
        else:
            rows, columns = (index.flatten().numpy() for index in torch.meshgrid(*map(torch.arange, parts.shape), indexing="ij"))
            found = pd.DataFrame({"row": rows, "column": columns, "credit": parts.flatten().numpy()})
        return found.sort_values("credit", key=abs, ascending=False, kind="stable").reset_index(drop=True)

    def figure(self) -> go.Figure:
        """The drawing in plotly, to zoom and point at."""
        from workbench.attribution.figures import figure

        return figure(self)

    def _repr_html_(self) -> str:
        from workbench.attribution.drawing import fragment

        return fragment([self])

    def __repr__(self) -> str:
        from workbench.attribution.drawing import caption

        title, facts = caption(self)
        return f"Explanation({self.kind}: {title}; {facts})" if facts else f"Explanation({self.kind}: {title})"


class Explanations(list[Explanation]):
    """Explained samples; show themselves in a notebook."""

    def frame(self) -> pd.DataFrame:
        """A row a sample: its place, the classes, the model's probabilities and loss."""
        import pandas as pd

        columns = ("sample", "label", "prediction", "probability", "label_probability", "loss", "target", "method")
        rows = pd.DataFrame([{name: getattr(one, name) for name in columns} for one in self], columns=columns)
        for name in ("label", "prediction"):
            rows[f"{name}_name"] = [None if (i := getattr(one, name)) is None else one.names.label(i) for one in self]
        return rows

    def to_html(self, path: str | os.PathLike[str] | None = None, title: str = "What the model looks at") -> str:
        """A page that needs nothing else, light or dark as the reader's system is; written to ``path`` too when given."""
        from workbench.attribution.drawing import page

        html = page(self, title)
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(Path(path), html)
        return html

    def _repr_html_(self) -> str:
        from workbench.attribution.drawing import fragment

        return fragment(self)


def explain_samples(
    model: Model,
    x: Tensor,
    labels: Tensor | Sequence[int] | None = None,
    target: Tensor | int | None = None,
    method: str = "integrated_gradients",
    config: AttributionConfig | None = None,
    background: Tensor | None = None,
    names: Names | None = None,
    samples: Iterable[int] | None = None,
) -> Explanations:
    """Explain samples, to look at: :func:`~workbench.attribution.explain`, with what the model makes of each.

    Args:
        labels: true classes (N,), where they are known.
        names: of classes, tokens and columns, e.g. ``Names.of(batches)``.
        samples: their places in the data; by default from 0.

    The others are those of :func:`~workbench.attribution.explain`, and so are the errors.
    """
    config = AttributionConfig.checked(config)
    names = names or Names()
    places = range(len(x)) if samples is None else list(samples)
    truth = None if labels is None else torch.as_tensor(labels).to(x.device)
    if len(places) != len(x) or truth is not None and truth.shape != (len(x),):
        raise DataError(
            f"There are {len(x)} samples, {len(places)} places and labels {truth if truth is None else list(truth.shape)}."
        )
    found = Explanations()
    for start in range(0, len(x), config.batch_size):
        part = slice(start, start + config.batch_size)
        with evaluating(model):
            outputs = outputs_of(model, x[part])
        chosen = targets_of(outputs, part_of(target, part))
        credits = explain(model, x[part], chosen, method, config, background)
        logs = outputs.double().log_softmax(1).cpu()
        answers = outputs.argmax(1).tolist()
        for i, log in enumerate(logs):
            known = {}
            if truth is not None:
                label = int(truth[start + i])
                known = {"label": label, "label_probability": float(log[label].exp()), "loss": float(-log[label])}
            found.append(
                Explanation(
                    x=x[start + i].detach().cpu(),
                    credits=credits[i].cpu(),
                    target=int(chosen[i]),
                    prediction=answers[i],
                    probability=float(log[answers[i]].exp()),
                    method=method,
                    sample=places[start + i],
                    names=names,
                    **known,  # type: ignore[arg-type]
                )
            )
    return found
