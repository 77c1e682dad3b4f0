"""ONNX Runtime as a backend of quantization: the model as an ONNX file, quantized by its own tools and called like any module.

* :class:`OnnxModel` — the file's bytes as a buffer, so that it is saved like a weight.
* :func:`onnx_file` — a model as ONNX; :func:`nodes_of` — which of its nodes are a layer's.
"""

from __future__ import annotations

import copy
import io
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workbench.compress.compilation import first_line, where
from workbench.compress.file_model import FileModel
from workbench.compress.graph import layers_matching
from workbench.compress.quantization_config import QuantConfig
from workbench.errors import ConfigError, MissingDependency, ModelError


class OnnxModel(FileModel):
    """An ONNX file that is called like the model it came from, with as many threads as PyTorch has."""

    runtime = "An ONNX file"

    def __init__(self, content: bytes) -> None:
        super().__init__(file=content)

    def _open(self) -> Any:
        ort = required("onnxruntime")
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        return ort.InferenceSession(self._content("file"), options, providers=["CPUExecutionProvider"])

    def _run(self, opened: Any, x: Tensor) -> Tensor:
        (output,) = opened.run(None, {opened.get_inputs()[0].name: x.numpy()})
        return torch.from_numpy(output)


def onnxruntime(source: nn.Module, config: QuantConfig, given: Any) -> tuple[OnnxModel, dict[str, Any]]:
    """See :data:`~workbench.compress.quantization.METHODS`.

    Raises:
        MissingDependency: without the extra ``onnx``.
        ConfigError: an observer that ONNX Runtime doesn't have.
    """
    if isinstance(given, dict):
        return OnnxModel(bytes(given["bytes"])), given
    required("onnxruntime")
    options = _calibration(config) if config.mode == "static" else {}
    tools = import_module("onnxruntime.quantization")
    with tempfile.TemporaryDirectory() as folder:
        exported, prepared, result = (Path(folder) / f"{name}.onnx" for name in ("exported", "prepared", "result"))
        example = given[0] if given else example_for(source)
        exported.write_bytes(onnx_file(source, example))
        kept = nodes_of(exported.read_bytes(), config.keep_float)
        with quietly():
            import_module("onnxruntime.quantization.shape_inference").quant_pre_process(str(exported), str(prepared))
            common = {
                "per_channel": config.by_channel,
                "weight_type": tools.QuantType.QInt8,
                "nodes_to_exclude": kept,
            }
            if config.mode == "dynamic":
                tools.quantize_dynamic(str(prepared), str(result), **common)
            else:
                tools.quantize_static(
                    str(prepared),
                    str(result),
                    _Reader(given),
                    quant_format=tools.QuantFormat.QDQ,
                    activation_type=tools.QuantType.QUInt8,
                    **common,
                    **options,
                )
        content = result.read_bytes()
    found = {"bytes": len(content), "versions": {name: version(name) for name in ("onnxruntime", "onnx", "onnxscript")}}
    return OnnxModel(content), found | ({"samples": sum(map(len, given))} if given else {})


def onnx_file(source: nn.Module, example: Tensor) -> bytes:
    """``source`` as ONNX, for any number of samples like those of ``example`` (N, ...).

    Raises:
        ModelError: it can't be exported; the message names the line.
    """
    required("onnx")
    required("onnxscript")
    batch = torch.export.Dim("batch", min=1, max=65535)
    with tempfile.TemporaryDirectory() as folder, quietly():
        path = Path(folder) / "model.onnx"
        try:
            torch.onnx.export(
                source,
                (torch.cat([example, example])[:2],),
                str(path),
                input_names=["x"],
                dynamo=True,
                dynamic_shapes=({0: batch},),
                external_data=False,
                verbose=False,
            )
        except Exception as error:
            cause = error.__cause__ or error
            raise ModelError(
                f"{type(source).__name__} can't be exported to ONNX{where(cause)}: {first_line(cause)}",
                "Rewrite that line without branches on tensor values and without a fixed batch size, or use backend='cpu'.",
            ) from error
        return path.read_bytes()


def nodes_of(content: bytes, patterns: list[str]) -> list[str]:
    """Names of the nodes that multiply by the weights of the layers that ``patterns`` mean.

    Raises:
        ConfigError: a pattern matches no layer.
    """
    if not patterns:
        return []
    graph = required("onnx").load_from_string(content).graph
    owners = {node.name: i.removesuffix(".weight") for node in graph.node for i in node.input if i.endswith(".weight")}
    kept = layers_matching(patterns, owners.values())
    return [node for node, layer in owners.items() if layer in kept]


def required(module: str, extra: str = "onnx") -> Any:
    """The optional module, or an error that names the extra."""
    try:
        return import_module(module)
    except ImportError:
        raise MissingDependency(module, f"backend={module!r}", extra) from None


class _Reader:
    """Calibration samples as ONNX Runtime reads them."""

    def __init__(self, batches: list[Tensor]) -> None:
        self._batches: Iterator[Tensor] = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"x": batch.numpy()}


def _calibration(config: QuantConfig) -> dict[str, Any]:
    methods = import_module("onnxruntime.quantization").CalibrationMethod
    known: dict[str, tuple[Any, dict[str, Any]]] = {
        "auto": (methods.MinMax, {}),
        "minmax": (methods.MinMax, {}),
        "moving_average": (methods.MinMax, {"CalibMovingAverage": True}),
        "percentile": (methods.Percentile, {"CalibPercentile": config.percentile}),
        "entropy": (methods.Entropy, {}),
    }
    if config.observer not in known:
        raise ConfigError(f"ONNX Runtime has no observer {config.observer!r}.", f"It has {', '.join(known)}.")
    method, extra = known[config.observer]
    return {"calibrate_method": method, "extra_options": extra | {"ActivationSymmetric": config.quant_scheme == "symmetric"}}


def example_for(source: nn.Module) -> Tensor:
    """An input that ``source`` takes, inferred from its first layer."""
    from workbench.compress.sample import one_sample

    return one_sample(copy.deepcopy(source), None)


@contextmanager
def quietly() -> Iterator[None]:
    """Silence the exporters' remarks about themselves, and their progress."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
