"""Fewer bits: less to store, faster kernels, and a recipe that rebuilds the same model in another process.

* :func:`quantize` — a new, quantized model; :class:`Quantizer` is the same as a class.
* :data:`METHODS` — who quantizes, for each backend and mode, and who rebuilds; :func:`replay` rebuilds the quantized form of a
  fresh model, and the weights are loaded into it afterwards.

What *static* gives is an exported graph (:mod:`~workbench.compress.graph`); it runs on INT8 kernels once it is compiled: see
:func:`~workbench.compress.compilation.compiled`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from workbench.compress import graph as graphs
from workbench.compress import qat
from workbench.compress.correction import correct_biases
from workbench.compress.equalization import equalize, insert
from workbench.compress.graph import QuantizedModel, check_unquantized, our_versions
from workbench.compress.quantization_config import QuantConfig
from workbench.compress.rounding import FLOAT_OPERATIONS
from workbench.compress.sample import try_out
from workbench.compress.saturation import SATURATES, saturates
from workbench.errors import ConfigError, DataError, ModelError
from workbench.models.structure import count_parameters, structure_of
from workbench.registry import Registry

Found = dict[str, Any]
"""What a method adds to the record, beside the config: JSON values."""

METHODS = Registry(
    "quantization method",
    {
        "cpu static": "workbench.compress.quantization:static",
        "cpu qat": "workbench.compress.quantization:trained",
        "cpu dynamic": "workbench.compress.dynamic:dynamic",
        "cpu weight_only": "workbench.compress.dynamic:dynamic",
        "cuda static": "workbench.compress.gpu:on_gpu",
        "cuda dynamic": "workbench.compress.gpu:on_gpu",
        "cuda weight_only": "workbench.compress.gpu:on_gpu",
        "cuda fp8": "workbench.compress.gpu:on_gpu",
        "onnxruntime static": "workbench.compress.onnxruntime_backend:onnxruntime",
        "onnxruntime dynamic": "workbench.compress.onnxruntime_backend:onnxruntime",
        "openvino static": "workbench.compress.openvino_backend:openvino",
        "openvino weight_only": "workbench.compress.openvino_backend:openvino",
        "xnnpack static": "workbench.compress.executorch_backend:xnnpack",
    },
)
"""Who quantizes: a function from (a copy of the model, config, calibration batches) to (quantized module, what to record).

A copy is on the CPU, in evaluation mode, and may be changed. With a record in place of the batches, the function rebuilds what it
recorded; the weights are loaded afterwards.
"""


class Quantizer:
    """Quantize a model: ``Quantizer(model, config, data).quantize()``; the given model stays as it is."""

    def __init__(self, model: nn.Module, config: QuantConfig | None = None, data: Any = None) -> None:
        self.model, self.config, self.data = model, config, data

    def quantize(self) -> nn.Module:
        return quantize(self.model, self.config, self.data)


def quantize(model: nn.Module, config: QuantConfig | None = None, data: Any = None) -> nn.Module:
    """A quantized copy of ``model``; the given model stays as it is.

    Args:
        model: takes one tensor (N, ...). One that :class:`~workbench.compress.qat.QuantAwareTraining` prepared and that was
            trained becomes INT8 with the ranges that it learned. A static INT8 model takes any number of samples, of the shape
            that it was calibrated with.
        config: by default static, 8 bits for weights and activations.
        data: calibration samples, typical of what the model will see: a tensor (N, ...), a batch (x, y), or an iterable of
            such tensors or batches. Needed in static mode; elsewhere, onnxruntime and openvino export with it.

    Raises:
        ModelError: the model can't be exported (the message names the line), or has nothing to quantize.
        DataError: static mode without samples, or samples that the model doesn't take, that differ in shape, or aren't finite.
        ConfigError: settings that don't go with this model.
        MissingDependency: the backend's extra isn't installed.

    Exports to ``.pt2`` files: :func:`torch.export.load` must know the operations in them, so import before it
    ``torchao.quantization.pt2e`` for a static model, of which ``.graph`` is exported, and ``workbench.compress.int8_lstm`` for a
    dynamic one with LSTMs.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference" (2018).
    """
    check_unquantized(model)
    if config is not None:
        QuantConfig.checked(config)
    if qat.is_prepared(model):
        recorded = QuantConfig(**qat.qat_record(model)["config"])
        if config is not None and config != recorded:
            raise ConfigError(
                f"This model was trained for other settings: {recorded.changes_from(config)}.",
                "Call quantize(model) without any.",
            )
        config = recorded
    config = config or QuantConfig()
    if config.mode in ("static", "dynamic", "qat") and config.backend == "cpu" and config.activation_bit == 8 and saturates():
        logging.getLogger("workbench").warning(SATURATES)
    if config.mode == "qat" and not qat.is_prepared(model):
        raise ModelError(
            "Quantization-aware training isn't a single call: it trains.",
            "Call QuantAwareTraining(model, config, example).prepare(), train what it gives, then quantize that; or use "
            "mode='static' with calibration data.",
        )
    wanted = config.mode in ("static", "fp8") or config.backend in ("onnxruntime", "openvino")
    batches = list(calibration_batches(data, config.calibration_samples)) if wanted else []
    if config.mode == "static" and not batches:
        raise DataError(
            "Static quantization needs samples to take activation ranges from, and got none.",
            "Pass data=: a tensor (N, ...), or batches of typical inputs; or use mode='dynamic', which needs no data.",
        )
    source = copy.deepcopy(model).cpu().eval()
    _check_weights(source, config)
    if batches:
        try_out(source, batches[0][:2], "the calibration samples")
    quantized, found = _method(config)(source, config, batches)
    record = {
        "kind": "quantize",
        "config": config.model_dump(mode="json"),
        "parameters": count_parameters(model),
        **found,
        "versions": our_versions() | found.get("versions", {}),
    }
    quantized.structure = structure_of(model).then(record)
    return quantized


def replay(model: nn.Module, record: dict[str, Any]) -> nn.Module:
    """The quantized form of a freshly built ``model``, as ``record`` describes it; its weights are yet to be loaded.

    Raises:
        ArtefactError: this version of torch or torchao builds another graph than the one recorded.
    """
    config = QuantConfig(**record["config"])
    return _method(config)(model.eval(), config, record)[0]


def static(source: nn.Module, config: QuantConfig, given: list[torch.Tensor] | Found) -> tuple[QuantizedModel, Found]:
    """An INT8 graph for Inductor; see :data:`METHODS`."""
    if isinstance(given, dict):
        return _rebuilt(source, config, given), given
    prepared, equalized = calibrated(source, config, given)
    if config.correct_bias:
        correct_biases(prepared, given)
    graph = graphs.convert(prepared)
    found = {"input": _kind(given[0]), "samples": sum(map(len, given)), "activations": graphs.ranges_of(graph)}
    return QuantizedModel(graph), found | {"equalized": equalized}


def calibrated(source: nn.Module, config: QuantConfig, batches: list[torch.Tensor]) -> tuple[GraphModule, list[str]]:
    """The graph of ``source``, whose weights may change, with observers that have seen the samples; and the equalized layers."""
    exported = graphs.export_graph(source, batches[0])
    equalized = equalize(exported, batches, config.keep_float) if config.equalize else []
    prepared = graphs.prepare(exported, config)
    graphs.calibrate(prepared, batches)
    return prepared, equalized


def trained(source: nn.Module, config: QuantConfig, given: list[torch.Tensor] | Found) -> tuple[QuantizedModel, Found]:
    """The INT8 graph of a model whose rounding was learned; see :data:`METHODS`."""
    if isinstance(given, dict):
        return _rebuilt(qat.plain_copy(source), config, given), given
    learned = qat.current_record(source)
    ranges = qat.learned_ranges(source, learned)
    found = {"input": learned["input"], "activations": ranges, "left": learned["left"], "versions": learned["versions"]}
    return _rebuilt(qat.plain_copy(source), config, found), found


def calibration_batches(data: Any, limit: int) -> Iterator[torch.Tensor]:
    """At most ``limit`` samples of ``data``, as batches (N, ...) of inputs on the CPU.

    Raises:
        DataError: they aren't tensors, differ in shape or type, or aren't finite.
    """
    first: torch.Tensor | None = None
    for batch in as_batches(data):
        x = batch[0] if isinstance(batch, tuple | list) else batch
        if not isinstance(x, torch.Tensor):
            raise DataError(
                f"A calibration batch holds a {type(x).__name__}.",
                "Pass tensors (N, ...), or batches (x, y) of which x is one; models of other inputs take mode='dynamic'.",
            )
        first = x if first is None else first
        if x.shape[1:] != first.shape[1:] or x.dtype != first.dtype:
            raise DataError(
                f"Calibration samples differ: {list(first.shape[1:])} of {first.dtype}, then {list(x.shape[1:])} of {x.dtype}.",
                "Bring them to one shape and type: a static model is made for one.",
            )
        if not x[:limit].isfinite().all():
            raise DataError("Calibration samples hold NaN or infinite values.", "Clean them: ranges can't be taken from those.")
        yield x[:limit].detach().cpu()
        limit -= len(x)
        if limit <= 0:
            return


def as_batches(data: Any) -> Iterable[Any]:
    """Calibration data as batches, whatever these are.

    Raises:
        DataError: it has none.
    """
    if data is None:
        return ()
    if isinstance(data, torch.Tensor):
        return torch.split(data, 64)
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, torch.Tensor) for part in data):
        return [data]
    if not isinstance(data, Iterable):
        raise DataError(f"Calibration data is a {type(data).__name__}.", "Pass a tensor (N, ...) or an iterable of batches.")
    return data


def _check_weights(source: nn.Module, config: QuantConfig) -> None:
    kernels = (torch.float32, torch.bfloat16) if config.backend == "cpu" and config.mode in ("static", "qat") else ()
    for name, parameter in source.named_parameters():
        if not parameter.isfinite().all():
            raise ModelError(f"The weight {name!r} holds NaN or infinite values.", "Train again, from before they appeared.")
        if kernels and parameter.is_floating_point() and parameter.dtype not in kernels:
            raise ModelError(
                f"The weight {name!r} is {parameter.dtype}; INT8 kernels on CPUs stand beside float32 and bfloat16 alone.",
                "Quantize model.float().",
            )


def _rebuilt(source: nn.Module, config: QuantConfig, record: Found) -> QuantizedModel:
    """The INT8 graph of ``source`` with the ranges that ``record`` holds."""
    x = torch.zeros(2, *record["input"]["shape"], dtype=getattr(torch, record["input"]["dtype"]))
    left = (*FLOAT_OPERATIONS, *record["left"]) if "left" in record else ()
    exported = graphs.export_graph(source, x)
    insert(exported, record.get("equalized", ()))
    prepared = graphs.prepare(exported, config, left)
    graphs.observe_weights(prepared)
    return QuantizedModel(graphs.set_ranges(graphs.convert(prepared), record["activations"], record["versions"]))


def _kind(x: torch.Tensor) -> dict[str, Any]:
    return {"shape": list(x.shape[1:]), "dtype": str(x.dtype).removeprefix("torch.")}


def _method(config: QuantConfig) -> Callable[..., tuple[Any, Found]]:
    return METHODS.factory(f"{config.backend} {config.mode}")
