"""OpenVINO as a backend of quantization: NNCF quantizes an ONNX export of the model, and the CPU plugin runs it."""

from __future__ import annotations

import re
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workbench.compress.compilation import import_quietly
from workbench.compress.file_model import FileModel
from workbench.compress.onnxruntime_backend import example_for, nodes_of, onnx_file, quietly, required
from workbench.compress.quantization_config import QuantConfig
from workbench.errors import ConfigError


class OpenVINOModel(FileModel):
    """An OpenVINO model, its description and its weights, called like the model it came from, with as many threads as PyTorch."""

    runtime = "An OpenVINO model"

    def __init__(self, xml: bytes, weights: bytes) -> None:
        super().__init__(xml=xml, weights=weights)

    def _open(self) -> Any:
        core = required("openvino", "openvino").Core()
        model = core.read_model(self._content("xml"), self._content("weights"))
        settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
        return core.compile_model(model, "CPU", settings).create_infer_request()

    def _run(self, opened: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(opened.infer({0: x.numpy()}, share_inputs=True)[0].copy())


def openvino(source: nn.Module, config: QuantConfig, given: Any) -> tuple[OpenVINOModel, dict[str, Any]]:
    """See :data:`~workbench.compress.quantization.METHODS`.

    Raises:
        MissingDependency: without the extra ``openvino``.
        ConfigError: an observer or a granularity that NNCF isn't asked for here.
    """
    if isinstance(given, dict):
        return OpenVINOModel(bytes(given["bytes"][0]), bytes(given["bytes"][1])), given
    if config.observer not in ("auto", "minmax") or not config.by_channel:
        raise ConfigError(
            f"backend='openvino' with observer={config.observer!r}, granularity={config.granularity!r}: NNCF chooses these.",
            "Leave observer='auto' and granularity='auto', or use backend='cpu'.",
        )
    ov, nncf = required("openvino", "openvino"), _nncf()
    content = onnx_file(source, given[0] if given else example_for(source))
    # A product with its bias becomes two nodes, the first named after it.
    kept = nncf.IgnoredScope(patterns=[f"^{re.escape(name)}(/.*)?$" for name in nodes_of(content, config.keep_float)])
    with tempfile.TemporaryDirectory() as folder, quietly():
        (Path(folder) / "model.onnx").write_bytes(content)
        model = ov.convert_model(str(Path(folder) / "model.onnx"))
        if config.mode == "weight_only":
            model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM, ignored_scope=kept)
        else:
            presets = nncf.QuantizationPreset
            model = nncf.quantize(
                model,
                nncf.Dataset([batch.numpy() for batch in given]),
                preset=presets.PERFORMANCE if config.quant_scheme == "symmetric" else presets.MIXED,
                subset_size=len(given),
                ignored_scope=kept,
            )
        ov.save_model(model, str(Path(folder) / "result.xml"), compress_to_fp16=False)
        files = [(Path(folder) / f"result.{kind}").read_bytes() for kind in ("xml", "bin")]
    found = {"bytes": [len(file) for file in files], "versions": {name: version(name) for name in ("openvino", "nncf", "onnx")}}
    return OpenVINOModel(*files), found | ({"samples": sum(map(len, given))} if given else {})


def _nncf() -> Any:
    import logging

    required("nncf", "openvino")
    nncf = import_quietly("nncf")
    nncf.set_log_level(logging.ERROR)
    return nncf
