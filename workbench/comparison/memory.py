"""Peak memory of a form, by PyTorch's own allocators, the same on CPU and GPU.

The model's tensors, what compiling keeps beside them (packed copies of the weights), and the most that one call holds on top.
"""

from __future__ import annotations

from torch import Tensor

from workbench.allocator import held_by, tensor_bytes
from workbench.comparison.forms import Form


def peak_bytes(form: Form, x: Tensor) -> int:
    """Bytes of ``form`` while it runs on ``x`` (N, ...), without ``x`` itself; its first call there is this one."""
    kept, _ = held_by(lambda: form.call(x), x.device)
    _, most = held_by(lambda: form.call(x), x.device)
    return tensor_bytes(form.model) + max(0, kept) + most
