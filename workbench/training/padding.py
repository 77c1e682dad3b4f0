"""Shapes for tensor cores: what is padded, by whom, and what isn't.

In bf16 and fp16 the fastest kernels of cuBLAS take operands whose rows are multiples of 16 bytes, 8 numbers.

* Widths, numbers of classes and vocabularies: ``torch.compile`` pads the operands of products on CUDA within its graph, and cuts
  the result, where it measures that it is faster (``torch/_inductor/fx_passes/pad_mm.py``, on by default as
  ``torch._inductor.config.shape_padding``). Nothing is left to do here; a model's weights keep their shapes.
* The length of token sequences, which models see: :func:`settle_padding`, once, where the data lies in memory. Attention that
  multiplies its scores itself gains by it; the numbers of samples and tokens of a linear layer are no matter, for they are no
  rows' lengths.
* Rows of an FP8 product: :class:`~workbench.training.fp8.Float8Linear`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.data.config import DataConfig
from workbench.data.splits import Arrays, Splits
from workbench.errors import ConfigError
from workbench.training.decisions import Decisions

GRAIN = 8
"""Numbers of 2 bytes in the 16 that tensor cores' operands are read by."""

TOLERANCE = 1e-4
"""Of a model's outputs with padding from those without, relative to the largest: sums are taken in another order, no more."""

SETTING = "data.pad_to"


def settle_padding(
    config: DataConfig, model: nn.Module, splits: Splits, device: torch.device, dtype: torch.dtype, decided: Decisions
) -> Splits:
    """``splits`` whose token sequences are as long as a multiple of ``config.pad_to``, filled up with 0.

    Only for a model that computes the same with it, as those of :mod:`workbench.models.text` do but the LSTM, which reads padding
    before words: that is tried out. In training, dropout then draws masks of other shapes, no others in kind.

    Args:
        model: on the CPU, where an id or place out of range is an error and not the end of the process.
        device, dtype: of the run's steps.

    Raises:
        ConfigError: a multiple was asked for, and these samples or this model don't allow it.
    """
    parts = [part for part in (splits.train, splits.eval) if isinstance(part, Arrays)]
    tokens = len(parts) == 2 and all(part.x.dtype == torch.int64 and part.x.ndim == 2 for part in parts)
    if config.pad_to == "auto" and not (tokens and device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)):
        return splits
    grain = GRAIN if config.pad_to == "auto" else config.pad_to
    if not tokens:
        if grain == 1:
            return splits
        raise ConfigError(
            f"data.pad_to={grain} pads token ids held in memory, which these samples aren't.", "Set data.pad_to=auto."
        )
    length = parts[0].x.shape[1]
    wanted = -length % grain
    if not wanted or parts[1].x.shape[1] != length:
        return splits
    if SETTING not in decided.made:
        why = _objection(model, parts[1].x[:8], wanted)
        if why is not None and config.pad_to != "auto":
            raise ConfigError(
                f"data.pad_to={grain} would pad {length} tokens to {length + wanted}, and {why}.", "Set data.pad_to=auto."
            )
        told = (
            f"{length} tokens stay as they are, for {why}"
            if why
            else f"{length} tokens padded to {length + wanted} change no output"
        )
        decided.decide(SETTING, 1 if why else grain, told)
    if decided.made[SETTING]["value"] == 1:
        return splits
    train, evaluation = (Arrays(F.pad(part.x, (0, wanted)), part.y) for part in parts)
    return replace(splits, train=train, eval=evaluation)


@torch.no_grad()
def _objection(model: nn.Module, ids: Tensor, more: int) -> str | None:
    """Why sequences can't be ``more`` longer; None if they can."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        plain = model(ids)
        padded = model(F.pad(ids, (0, more)))
    except Exception as error:
        return f"the model fails on longer ones: {str(error).splitlines()[0]}"
    finally:
        for module, training in modes:
            module.training = training
    if not isinstance(plain, Tensor) or plain.shape != padded.shape:
        return "the model's output is as long as its input"
    off = float((padded - plain).abs().max() / plain.abs().max())
    return None if off <= TOLERANCE else f"the model computes something else then ({off:.1%} off)"
