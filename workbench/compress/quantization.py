"""INT8 by torchao: fewer bytes, faster kernels, and a recipe that rebuilds the same model in another process.

* :func:`quantize` — a new, quantized model; :class:`Quantizer` is the same as a class.
* :class:`QuantizedModel` — what *static* gives: an exported graph of INT8 weights and fixed activation ranges.
* :func:`replay` — rebuilds the quantized form of a fresh model; the weights are loaded into it afterwards.

The graph runs on INT8 kernels once it is compiled: see :func:`~workbench.compress.compilation.compiled`.
"""

from __future__ import annotations

import copy
import operator
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.fx import GraphModule, Node

from workbench.compress.compilation import import_quietly
from workbench.compress.quantization_config import QuantConfig
from workbench.errors import ArtefactError, DataError, ModelError
from workbench.models.structure import Structure, count_parameters, structure_of

_OPS = torch.ops.quantized_decomposed


class QuantizedModel(nn.Module):
    """An INT8 graph that is called like the model it came from: any batch size, no gradients, always in evaluation mode.

    ``state_dict`` keeps the layers' names: ``graph.conv1.weight`` (int8), ``graph.conv1.weight_scale``, ``graph.conv1.bias`` …
    """

    def __init__(self, graph: GraphModule) -> None:
        super().__init__()
        self.graph = graph.requires_grad_(False)
        self.training = False
        self.structure = Structure()

    def forward(self, x: torch.Tensor) -> Any:
        return self.graph(x)

    def train(self, mode: bool = True) -> QuantizedModel:
        """Evaluation mode is all there is: an exported graph can't switch."""
        if mode:
            raise ModelError(
                "An INT8 model doesn't train: its weights are integers.", "Fine-tune the model first, then quantize it."
            )
        return self


class Quantizer:
    """Quantize a model: ``Quantizer(model, QuantConfig(), data).quantize()``; the given model stays as it is."""

    def __init__(self, model: nn.Module, config: QuantConfig | None = None, data: Any = None) -> None:
        self.model, self.config, self.data = model, config or QuantConfig(), data

    def quantize(self) -> nn.Module:
        return quantize(self.model, self.config, self.data)


def quantize(model: nn.Module, config: QuantConfig | None = None, data: Any = None) -> nn.Module:
    """An INT8 copy of ``model``, for the CPU; the given model stays as it is.

    Args:
        model: an image or feature model that takes one tensor (N, ...).
        config: by default static, 8 bits for weights and activations.
        data: calibration samples, typical of what the model will see: a tensor (N, ...), or an iterable of such tensors or
            of (x, y) batches. Needed in static mode; the other mode takes no data.

    Raises:
        ModelError: the model can't be exported (the message names the line), or has nothing to quantize.
        DataError: static mode without samples, or samples that aren't tensors.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference" (2018).
    """
    config = config or QuantConfig()
    if config.mode == "qat":
        raise ModelError(
            "Quantization-aware training isn't a single call: it trains.",
            "Use mode='static' with calibration data, or mode='dynamic' for linear layers.",
        )
    source = copy.deepcopy(model).cpu().eval()
    quantized, found = (_dynamic(source), {}) if config.mode == "dynamic" else _static(source, config, data)
    record = {
        "kind": "quantize",
        "config": config.model_dump(mode="json"),
        "parameters": count_parameters(model),
        **found,
        "versions": _versions(),
    }
    quantized.structure = structure_of(model).then(record)  # type: ignore[assignment]
    return quantized


def replay(model: nn.Module, record: dict[str, Any]) -> nn.Module:
    """The quantized form of a freshly built ``model``, as ``record`` describes it; its weights are yet to be loaded.

    Raises:
        ArtefactError: this version of torch or torchao builds another graph than the one recorded.
    """
    config = QuantConfig(**record["config"])
    if config.mode == "dynamic":
        return _dynamic(model)
    shape, dtype = record["input"]["shape"], getattr(torch, record["input"]["dtype"])
    prepared = _prepare(model.eval(), torch.zeros(2, *shape, dtype=dtype), config)
    with torch.no_grad():
        prepared(torch.zeros(2, *shape, dtype=dtype))  # observers want to have seen something; the ranges are replaced below
    graph = _convert(prepared)
    ranges, found = record["activations"], dict(_activations(graph))
    if list(found) != list(ranges):
        raise ArtefactError(
            f"The quantized graph differs from the saved one: {len(found)} activation ranges where {len(ranges)} were saved.",
            f"It was saved with {record['versions']}, and this is {_versions()}: install those versions, or quantize again.",
        )
    for name, node in found.items():
        for quantized in (node, *node.users):
            quantized.args = (quantized.args[0], *ranges[name], *quantized.args[3:])
    graph.recompile()
    return QuantizedModel(graph)


def _static(source: nn.Module, config: QuantConfig, data: Any) -> tuple[QuantizedModel, dict[str, Any]]:
    batches = list(_samples(data, config.calibration_samples))
    if not batches:
        raise DataError(
            "Static quantization needs samples to take activation ranges from, and got none.",
            "Pass data=: a tensor (N, ...), or batches of typical inputs; or use mode='dynamic', which needs no data.",
        )
    prepared = _prepare(source, batches[0], config)
    with torch.no_grad():
        for batch in batches:
            prepared(batch)
    graph = _convert(prepared)
    ranges = {name: list(node.args[1:3]) for name, node in _activations(graph)}
    if not ranges:
        raise ModelError("Nothing in this model can be quantized: it has no convolution or linear layer.", "Keep it as it is.")
    first = batches[0]
    record = {
        "input": {"shape": list(first.shape[1:]), "dtype": str(first.dtype).removeprefix("torch.")},
        "samples": sum(len(batch) for batch in batches),
        "activations": ranges,
    }
    return QuantizedModel(graph), record


def _dynamic(source: nn.Module) -> nn.Module:
    import_quietly("torchao.quantization")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    if not any(isinstance(module, nn.Linear) for module in source.modules()):
        raise ModelError("Dynamic quantization is for linear layers, and this model has none.", "Use mode='static'.")
    quantize_(source, Int8DynamicActivationInt8WeightConfig())
    return source.requires_grad_(False)


def _samples(data: Any, limit: int) -> Iterator[torch.Tensor]:
    """At most ``limit`` samples of ``data``, as batches (N, ...) of inputs on the CPU."""
    if data is None:
        return
    if not isinstance(data, torch.Tensor) and not isinstance(data, Iterable):
        raise DataError(f"Calibration data is a {type(data).__name__}.", "Pass a tensor (N, ...) or an iterable of batches.")
    for batch in torch.split(data, 64) if isinstance(data, torch.Tensor) else data:
        x = batch[0] if isinstance(batch, tuple | list) else batch
        if not isinstance(x, torch.Tensor):
            raise DataError(
                f"A calibration batch holds a {type(x).__name__}.",
                "Static quantization takes models of one tensor; use mode='dynamic'.",
            )
        yield x[:limit].detach().cpu()
        limit -= len(x)
        if limit <= 0:
            return


def _prepare(source: nn.Module, x: torch.Tensor, config: QuantConfig) -> GraphModule:
    """The model as a graph with observers at every value that becomes INT8; any batch size from 1."""
    import_quietly("torchao.quantization")
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    batch = torch.export.Dim("batch", min=1, max=65535)
    example = torch.cat([x, x])[:2]  # with one sample, export would fix the batch size to 1
    try:
        # strict: torchao's fusion partitioner rejects the graph that the default export gives for residual networks.
        exported = torch.export.export(source, (example,), dynamic_shapes=({0: batch},), strict=True).module()
    except Exception as error:
        raise ModelError(
            f"{type(source).__name__} can't be exported for static quantization{_where(error)}: {_first_line(error)}",
            "Rewrite that line without branches on tensor values and without a fixed batch size, or use mode='dynamic'.",
        ) from error
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(reduce_range=config.activation_bit == 7))
    with warnings.catch_warnings():
        # A pooling layer between float layers stays float: that's right, and not worth a page of settings.
        warnings.filterwarnings("ignore", message=".*is not quantized, skip annotate", category=UserWarning)
        return cast(GraphModule, prepare_pt2e(exported, quantizer))


def _convert(prepared: GraphModule) -> GraphModule:
    """The INT8 graph, with its weights under the layers' own names and no fp32 copies of them."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    owners = dict(_weight_owners(prepared))
    module: Any = convert_pt2e(prepared)
    renamed: dict[str, str] = {}
    for node in module.graph.nodes:
        if node.name not in owners or node.args[1].target is not _OPS.dequantize_per_channel.default:
            continue
        weight, scale, zero_point = node.args[1].args[:3]
        for attribute, suffix in ((weight, ""), (scale, "_scale"), (zero_point, "_zero_point")):
            renamed.setdefault(attribute.target, owners[node.name] + suffix)  # a weight used twice keeps one name
    attributes = [node for node in module.graph.nodes if node.op == "get_attr"]
    values = {node.target: operator.attrgetter(node.target)(module) for node in attributes}
    for name in [*dict(module.named_parameters(remove_duplicate=False)), *dict(module.named_buffers(remove_duplicate=False))]:
        if name not in values or name in renamed:
            owner, _, last = name.rpartition(".")
            delattr(module.get_submodule(owner), last)
    for node in attributes:
        if (new := renamed.get(node.target)) is not None:
            owner, _, last = new.rpartition(".")
            module.get_submodule(owner).register_buffer(last, values[node.target])
            node.target = new
    module.recompile()
    return cast(GraphModule, module)


def _weight_owners(prepared: Any) -> Iterator[tuple[str, str]]:
    """(node, name of its weight) for each node whose second argument is an observed parameter."""
    for node in prepared.graph.nodes:
        observer: Any = node.args[1] if node.op == "call_function" and len(node.args) > 1 else None
        if getattr(observer, "op", "") == "call_module" and observer.args[0].op == "get_attr":
            yield node.name, observer.args[0].target


def _activations(module: Any) -> Iterator[tuple[str, Node]]:
    """(name of the value, its quantize node) for each activation that becomes INT8, in the graph's order."""
    seen: Counter[str] = Counter()
    for node in module.graph.nodes:
        if node.target is _OPS.quantize_per_tensor.default:
            name = node.args[0].name
            seen[name] += 1
            yield (name if seen[name] == 1 else f"{name}#{seen[name]}"), node


def _where(error: BaseException) -> str:
    """`` at file.py:12`` of the reader's own code, as far as the error tells; else nothing."""
    libraries = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")
    frames: list[traceback.FrameSummary] = list(getattr(error, "real_stack", None) or traceback.extract_tb(error.__traceback__))
    own = [frame for frame in frames if not frame.filename.startswith(libraries)]
    return f" at {own[-1].filename}:{own[-1].lineno} ({own[-1].line})" if own else ""


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "torchao")}
