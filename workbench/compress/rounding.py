"""Where an INT8 graph rounds, in terms of the modules that it was exported from: :func:`rounding_points`."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from workbench.compress.graph import export_graph, layer_of, observed, prepare
from workbench.compress.quantization_config import QuantConfig
from workbench.errors import ModelError

_ATEN = torch.ops.aten

FLOAT_OPERATIONS = (
    _ATEN.avg_pool2d.default,
    _ATEN.adaptive_avg_pool2d.default,
    _ATEN.cat.default,
    _ATEN.flatten.using_ints,
    _ATEN.mul.Tensor,
    _ATEN.matmul.default,
)
"""Left in floating point where ranges are learned: modules have no place to round their inputs."""


def rounding_points(source: nn.Module, x: Tensor, config: QuantConfig) -> dict[str, Any]:
    """The modules of ``source`` that must round so that it computes what its INT8 graph will.

    Returns:
        ``layers``: round their weight; ``inputs``: those of them that round their input too; ``outputs``: modules that round
        their output; ``norms``: {layer: batch normalization folded into it}; ``ranges``: {value of the graph: the module that
        follows its range}; ``left``: nodes of the graph that stay in floating point.

    Raises:
        ModelError: it can't be exported, or has no layer to quantize.
    """
    exported = export_graph(source, x)
    plain = _single_operations(source, exported)
    outputs = _module_outputs(source, x, exported)
    left = {node.name for node in exported.graph.nodes if (layer := layer_of(node)) is not None and layer not in plain}
    while True:
        prepared = prepare(copy.deepcopy(exported), config, (*FLOAT_OPERATIONS, *left))
        found = _points(exported, prepared, outputs)
        if not found["unplaced"]:
            break
        left |= set(found["unplaced"])
    if not found["layers"]:
        raise ModelError("This model has no convolution or linear layer whose rounding could be learned.", "Use mode='static'.")
    del found["unplaced"]
    return found | {"left": sorted(left)}


def _points(exported: GraphModule, prepared: GraphModule, outputs_of: dict[str, str]) -> dict[str, Any]:
    norms = _folded_norms(exported, prepared)
    groups: dict[int, list[tuple[str, Node]]] = defaultdict(list)  # observers shared by values are one range
    for value, observer in observed(prepared):
        groups[id(prepared.get_submodule(str(observer.target)))].append((value, observer))
    inputs: list[str] = []
    outputs: list[str] = []
    ranges: dict[str, str] = {}
    unplaced: list[str] = []
    for group in groups.values():
        first: Any = group[0][1].args[0]
        origin = norms[name][1] if (name := layer_of(first)) in norms else first.name
        module = outputs_of.get(origin) if set(first.users) <= {observer for _, observer in group} else None
        layers = [layer for _, o in group for user in o.users if user.args[0] is o and (layer := layer_of(user)) is not None]
        if module is not None:
            outputs.append(module)
            path = f"{module}.output_range"
        elif layers:
            inputs += layers
            path = f"{layers[0]}.input_range"
        else:
            unplaced += [user.name for _, o in group for user in o.users]
            continue
        ranges |= {value: path for value, _ in group}
    order = [value for value, _ in observed(prepared)]
    return {
        "layers": sorted({layer for node in prepared.graph.nodes if _is_quantized(node) and (layer := layer_of(node))}),
        "inputs": sorted(set(inputs)),
        "outputs": sorted(set(outputs)),
        "norms": {layer: norm for layer, (norm, _) in norms.items()},
        "ranges": {value: ranges[value] for value in order if value in ranges},
        "unplaced": unplaced,
    }


def _single_operations(source: nn.Module, exported: GraphModule) -> set[str]:
    """Layers that compute nothing but the product with their own weight."""
    names = dict(source.named_modules())
    within: dict[str, set[str | None]] = defaultdict(set)
    for node in exported.graph.nodes:
        for module in _path(node, names):
            within[module].add(layer_of(node))
    plain = (nn.Conv1d, nn.Conv2d, nn.Linear)
    return {name for name, layers in within.items() if layers == {name} and isinstance(names[name], plain)}


def _is_quantized(node: Node) -> bool:
    weight: Any = node.args[1] if node.op == "call_function" and len(node.args) > 1 else None
    return getattr(weight, "op", "") == "call_module"


def _folded_norms(exported: GraphModule, prepared: GraphModule) -> dict[str, tuple[str, str]]:
    """{layer: (batch normalization, its node)} for each that is folded into the layer's weight."""
    remaining = {node.name for node in prepared.graph.nodes}
    found: dict[str, tuple[str, str]] = {}
    for node in exported.graph.nodes:
        if node.target is _ATEN.batch_norm.default and node.name not in remaining:
            layer = layer_of(node.args[0])
            if layer is not None:
                found[layer] = (str(node.args[3].target).removesuffix(".running_mean"), node.name)
    return found


def _module_outputs(source: nn.Module, x: Tensor, exported: GraphModule) -> dict[str, str]:
    """{node: innermost module that returns that node's value, and nothing else}."""
    names = dict(source.named_modules())
    returns_one = _returning_tensors(source, x)
    leaving: dict[str, set[str]] = defaultdict(set)
    paths = {node: _path(node, names) for node in exported.graph.nodes}
    for node, path in paths.items():
        for module in path:
            if any(module not in paths[user] for user in node.users):
                leaving[module].add(node.name)
    found: dict[str, str] = {}
    for node, path in paths.items():
        for module in reversed(path):
            if leaving[module] == {node.name} and module in returns_one:
                found[node.name] = module
                break
    return found


def _returning_tensors(source: nn.Module, x: Tensor) -> set[str]:
    """Modules, but no sequences of others, that return a tensor by itself."""
    found: set[str] = set()

    def watch(name: str) -> Any:
        def see(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not isinstance(module, nn.Sequential):
                found.add(name)

        return see

    hooks = [module.register_forward_hook(watch(name)) for name, module in source.named_modules()]
    try:
        with torch.no_grad():
            source(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _path(node: Node, names: dict[str, nn.Module]) -> list[str]:
    """Modules within which a node was computed, the outermost first; the model itself isn't named."""
    stack = node.meta.get("nn_module_stack", {}) if node.op == "call_function" else {}
    return [name for name, _ in stack.values() if name and name in names]
