"""INT8 as an exported graph: export, observe, convert, and set ranges.

* :class:`QuantizedModel` — the graph as a module.
* :func:`check_unquantized` — whether a model can still become one.
* :func:`export_graph` — a model as a graph, or an error that names the line that can't become one.
* :func:`prepare`, :func:`calibrate`, :func:`convert` — observers in, ranges found, INT8 out; :func:`set_ranges` for a graph
  whose ranges are known.
"""

from __future__ import annotations

import fnmatch
import operator
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from workbench.compress.compilation import first_line, import_quietly, where
from workbench.compress.quantization_config import QuantConfig
from workbench.errors import ArtefactError, ConfigError, DataError, ModelError
from workbench.models.structure import Structure, check_module, structure_of

_OPS = torch.ops.quantized_decomposed
_ATEN = torch.ops.aten

LAYERS = (_ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.linear.default)
"""Operations that have a weight to quantize."""


class QuantizedModel(nn.Module):
    """An INT8 graph that is called like the model it came from: any batch size, no gradients, always in evaluation mode.

    ``state_dict`` keeps the layers' names: ``graph.conv1.weight`` (int8), ``graph.conv1.weight_scale``, ``graph.conv1.bias`` …
    To export it, pass ``.graph`` to :func:`torch.export.export`; the file loads where ``torchao.quantization.pt2e`` is imported.
    """

    def __init__(self, graph: GraphModule) -> None:
        super().__init__()
        self.graph = graph.requires_grad_(False)
        self.training = False
        self.structure = Structure()
        example = next(node for node in graph.graph.nodes if node.op == "placeholder").meta["val"]
        self._shape, self._dtype = tuple(example.shape[1:]), example.dtype

    def forward(self, x: Tensor) -> Any:
        """(N, ...) of the shape and type that the graph was made for, any N.

        Raises:
            DataError: of another shape or type.
        """
        if x.shape[1:] != self._shape or x.dtype != self._dtype:
            made = ", ".join(map(str, ("N", *self._shape)))
            raise DataError(
                f"This INT8 model was made for [{made}] of {str(self._dtype).removeprefix('torch.')}, and got {list(x.shape)} "
                f"of {str(x.dtype).removeprefix('torch.')}.",
                "Bring the input to that, or quantize again with samples of the other size and type.",
            )
        return self.graph(x)

    def train(self, mode: bool = True) -> QuantizedModel:
        """Evaluation mode is all there is: an exported graph can't switch."""
        if mode:
            raise ModelError(
                "An INT8 model doesn't train: its weights are integers.",
                "Fine-tune the model first, or with QuantAwareTraining, then quantize it.",
            )
        return self


def check_unquantized(model: Any) -> None:
    """Refuse what isn't a module, or is quantized.

    Raises:
        ModelError: it is.
    """
    check_module(model)
    if any(transform["kind"] == "quantize" for transform in structure_of(model).transforms):
        raise ModelError("This model is quantized already.", "Quantize the model that it came from.")


def export_graph(source: nn.Module, x: Tensor) -> GraphModule:
    """``source`` as a graph for inputs like ``x`` [N, ...], any N from 1.

    Raises:
        ModelError: it can't be exported; the message names the line. Or it has recurrent layers.
    """
    recurrent = [name or type(source).__name__ for name, module in source.named_modules() if isinstance(module, nn.RNNBase)]
    if recurrent:
        raise ModelError(
            f"The recurrent layers {', '.join(recurrent[:3])} have no INT8 form with fixed ranges.",
            "Use mode='dynamic', which has one for LSTMs.",
        )
    batch = torch.export.Dim("batch", min=1, max=65535)
    example = torch.cat([x, x])[:2]  # with one sample, export would fix the batch size to 1
    try:
        # strict: torchao's fusion partitioner rejects the graph that the default export gives for residual networks.
        return torch.export.export(source, (example,), dynamic_shapes=({0: batch},), strict=True).module()
    except Exception as error:
        raise ModelError(
            f"{type(source).__name__} can't be exported for static quantization{where(error)}: {first_line(error)}",
            "Rewrite that line without branches on tensor values (torch.where, torch.cond) and without a fixed batch size, or "
            "use mode='dynamic'.",
        ) from error


def prepare(exported: GraphModule, config: QuantConfig, left: Iterable[Any] = ()) -> GraphModule:
    """A copy of the graph with an observer at every value and weight that becomes INT8.

    Args:
        left: names of nodes, or operations, that stay in floating point beside the layers of ``config.keep_float``.

    Raises:
        ConfigError: a pattern of ``keep_float`` matches no layer.
    """
    recipe = import_quietly("workbench.compress.recipe")
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    layers = {name for node in exported.graph.nodes if (name := layer_of(node)) is not None}
    kept = layers_matching(config.keep_float, layers)
    left = frozenset(left)

    def stays(node: Node) -> bool:
        return layer_of(node) in kept or node.name in left or node.target in left

    with warnings.catch_warnings():
        # A pooling layer between float layers stays float: that's right, and not worth a page of settings.
        warnings.filterwarnings("ignore", message=".*is not quantized, skip annotate", category=UserWarning)
        return cast(GraphModule, prepare_pt2e(exported, recipe.Recipe(config, stays)))


def calibrate(prepared: GraphModule, batches: list[Tensor]) -> None:
    """Show the samples to the observers: once for the extremes, once more for the histograms."""
    with torch.no_grad():
        for batch in batches:
            prepared(batch)
        for module in prepared.modules():
            if hasattr(module, "count") and hasattr(module, "extremes"):
                cast(Any, module).count()
        for batch in batches:
            prepared(batch)


def observe_weights(prepared: GraphModule) -> None:
    """Show each weight to its observer, and no sample to any."""
    for node in prepared.graph.nodes:
        if node.op == "call_module" and node.args[0].op == "get_attr":
            observer: Any = prepared.get_submodule(node.target)
            observer(operator.attrgetter(node.args[0].target)(prepared))


def convert(prepared: GraphModule) -> GraphModule:
    """The INT8 graph, with its weights under the layers' own names and no fp32 copies of them.

    Of a weight that something else reads too, as of an embedding tied to the output layer, the integers are ``…weight_int8``.
    """
    from torchao.quantization.pt2e import quantize_pt2e

    owners = dict(_weight_owners(prepared))
    # Where a batch normalization stands alone, torchao would look for patterns of its own QAT, for minutes; there are none.
    with patch.object(quantize_pt2e, "_fold_conv_bn_qat", lambda graph: graph):
        module: Any = quantize_pt2e.convert_pt2e(prepared)
    attributes = [node for node in module.graph.nodes if node.op == "get_attr"]
    values = {node.target: operator.attrgetter(node.target)(module) for node in attributes}
    renamed: dict[str, str] = {}
    for node in module.graph.nodes:
        if node.name not in owners or node.args[1].target is not _OPS.dequantize_per_channel.default:
            continue
        original = owners[node.name]
        integers = f"{original}_int8" if original in values else original
        weight, scale, zero_point = node.args[1].args[:3]
        for attribute, suffix in ((weight, ""), (scale, "_scale"), (zero_point, "_zero_point")):
            renamed.setdefault(attribute.target, integers + suffix)  # a weight used twice keeps one name
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


def ranges_of(graph: GraphModule) -> dict[str, list[float]]:
    """{value: [scale, zero point]} of each activation that becomes INT8, in the graph's order.

    Raises:
        ModelError: there is none.
    """
    found = {name: [float(node.args[1]), int(node.args[2])] for name, node in _activations(graph)}  # type: ignore[arg-type]
    if not found:
        raise ModelError(
            "Nothing in this model can be quantized: it has no convolution or linear layer, or all are kept.", "Keep it as it is."
        )
    return found


def set_ranges(graph: GraphModule, ranges: Mapping[str, list[float]], versions: Mapping[str, str]) -> GraphModule:
    """Give the graph's activations their recorded scales and zero points.

    Raises:
        ArtefactError: the graph has other activations than those recorded, by ``versions`` of torch and torchao.
    """
    found = dict(_activations(graph))
    if list(found) != list(ranges):
        raise ArtefactError(
            f"The quantized graph differs from the saved one: {len(found)} activation ranges where {len(ranges)} were saved.",
            f"It was saved with {dict(versions)}, and this is {our_versions()}: install those versions, or quantize again.",
        )
    for name, node in found.items():
        for quantized in (node, *node.users):
            quantized.args = (quantized.args[0], *ranges[name], *quantized.args[3:])
    graph.recompile()
    return graph


def layer_of(node: Node) -> str | None:
    """The layer whose weight a node multiplies by, e.g. ``layer1.0.conv1``; None for other nodes."""
    if node.op != "call_function" or node.target not in LAYERS:
        return None
    weight: Any = node.args[1]
    if weight.op == "call_module":  # an observer of it
        weight = weight.args[0]
    return str(weight.target).removesuffix(".weight") if weight.op == "get_attr" else None


def layers_matching(patterns: Iterable[str], layers: Iterable[str]) -> set[str]:
    """Layers that a name or pattern means: ``layer1`` means all below it too.

    Raises:
        ConfigError: a pattern matches none.
    """
    layers, found = sorted(layers), set()
    for pattern in patterns:
        matching = [n for n in layers if fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(n, f"{pattern}.*")]
        if not matching:
            raise ConfigError(f"keep_float={pattern!r} matches no layer.", f"Layers here: {', '.join(layers[:8])} …")
        found.update(matching)
    return found


def numbered(nodes: Iterable[Node]) -> Iterator[tuple[str, Node]]:
    """(name of the value, the node that quantizes or observes it): ``relu``, ``relu#2`` when it is so twice."""
    seen: Counter[str] = Counter()
    for node in nodes:
        name = cast(Node, node.args[0]).name
        seen[name] += 1
        yield (name if seen[name] == 1 else f"{name}#{seen[name]}"), node


def observed(prepared: GraphModule) -> Iterator[tuple[str, Node]]:
    """(name of the value, its observer's node) for each activation that will become INT8, in the graph's order."""
    return numbered(n for n in prepared.graph.nodes if n.op == "call_module" and cast(Node, n.args[0]).op != "get_attr")


def our_versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "torchao")}


def _activations(graph: Any) -> Iterator[tuple[str, Node]]:
    return numbered(node for node in graph.graph.nodes if node.target is _OPS.quantize_per_tensor.default)


def _weight_owners(prepared: Any) -> Iterator[tuple[str, str]]:
    """(node, name of its weight) for each node whose second argument is an observed parameter."""
    for node in prepared.graph.nodes:
        observer: Any = node.args[1] if node.op == "call_function" and len(node.args) > 1 else None
        if getattr(observer, "op", "") == "call_module" and observer.args[0].op == "get_attr":
            yield node.name, observer.args[0].target
