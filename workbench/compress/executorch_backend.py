"""XNNPACK, for phones, as a backend of quantization: the graph that ExecuTorch lowers to its kernels."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from workbench.compress import graph as graphs
from workbench.compress.compilation import import_quietly
from workbench.compress.graph import QuantizedModel, layer_of, layers_matching
from workbench.compress.quantization_config import QuantConfig
from workbench.errors import ConfigError, MissingDependency


def xnnpack(source: nn.Module, config: QuantConfig, given: Any) -> tuple[QuantizedModel, dict[str, Any]]:
    """An INT8 graph with XNNPACK's recipe; see :data:`~workbench.compress.quantization.METHODS`.

    Raises:
        MissingDependency: without the extra ``executorch``.
        ConfigError: an observer or scheme that its recipe doesn't have.
    """
    if (config.observer, config.quant_scheme, config.by_channel) != ("auto", "affine", True):
        raise ConfigError(
            f"XNNPACK's recipe leaves no choice of observer={config.observer!r}, quant_scheme={config.quant_scheme!r} or "
            f"granularity={config.granularity!r}.",
            "Leave them at 'auto', 'affine' and 'channel'.",
        )
    if isinstance(given, dict):
        x = torch.zeros(2, *given["input"]["shape"], dtype=getattr(torch, given["input"]["dtype"]))
        prepared = _prepare(source, x, config)
        graphs.calibrate(prepared, [x])
        return QuantizedModel(graphs.set_ranges(graphs.convert(prepared), given["activations"], given["versions"])), given
    prepared = _prepare(source, given[0], config)
    graphs.calibrate(prepared, given)
    graph = graphs.convert(prepared)
    return QuantizedModel(graph), {
        "input": {"shape": list(given[0].shape[1:]), "dtype": str(given[0].dtype).removeprefix("torch.")},
        "samples": sum(map(len, given)),
        "activations": graphs.ranges_of(graph),
        "versions": {"executorch": version("executorch")},
    }


def _prepare(source: nn.Module, x: Tensor, config: QuantConfig) -> GraphModule:
    try:
        recipe = import_quietly("executorch.backends.xnnpack.quantizer.xnnpack_quantizer")
    except ImportError:
        raise MissingDependency("executorch", "backend='xnnpack'", "executorch") from None
    prepare_pt2e = import_module("torchao.quantization.pt2e.quantize_pt2e").prepare_pt2e
    exported = graphs.export_graph(source, x)
    quantizer = recipe.XNNPACKQuantizer()
    quantizer.set_global(recipe.get_symmetric_quantization_config(is_per_channel=True))
    layers = {name for node in exported.graph.nodes if (name := layer_of(node)) is not None}
    kept = layers_matching(config.keep_float, layers)
    annotation = import_module("torchao.quantization.pt2e.quantizer").QuantizationAnnotation
    for node in exported.graph.nodes:
        if layer_of(node) in kept:
            node.meta["quantization_annotation"] = annotation(_annotated=True)  # so that the recipe passes it over
    prepared: GraphModule = prepare_pt2e(exported, quantizer)
    return prepared
