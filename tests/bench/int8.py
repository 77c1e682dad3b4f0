"""INT8 on the CPU beside ONNX Runtime and OpenVINO: latency in turns, file size, error.

    python -m tests.bench.int8
    python -m tests.bench.int8 --models resnet18 --batches 1 --seconds 10
    python -m tests.bench.int8 --models bert_base

224² images at batch 1 and 32; BERT-base (dynamic) on 128 tokens. Random weights and inputs, so no accuracies: ``error`` is the
relative distance of the outputs from fp32's. Needs the extra ``bench``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from workbench import QuantConfig, quantize, save_model
from workbench.artefact import size_on_disk
from workbench.compress import compiled
from workbench.compress.latency import latency_of
from workbench.compress.onnxruntime_backend import OnnxModel, onnx_file, required
from workbench.models import ModelConfig, build_model

IMAGES = ("resnet18", "resnet50", "mobilenetv3_large_100")
TEXTS = ("bert_base",)


def built(name: str) -> tuple[nn.Module, Tensor]:
    """A model in evaluation mode, and 64 inputs for it."""
    torch.manual_seed(0)
    if name in TEXTS:
        return build_model(ModelConfig(name=name, num_classes=4)).eval(), torch.randint(1, 30000, (64, 128))
    model = build_model(ModelConfig(name=name, num_classes=1000)).eval()
    x = torch.randn(64, 3, 224, 224)
    with torch.no_grad():  # as after training: no branch that does nothing, and statistics so that values neither vanish nor grow
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
        model.train()(x[:16])
    return model.eval(), x


def variants(name: str, model: nn.Module, x: Tensor) -> dict[str, tuple[Callable[[Tensor], Any], int | None]]:
    """{name: (call, bytes of its file)}."""
    static = name not in TEXTS
    mode = "static" if static else "dynamic"
    int8 = quantize(model, QuantConfig(mode=mode), x if static else None)
    ort = quantize(model, QuantConfig(mode=mode, backend="onnxruntime"), x[:16])
    found: dict[str, tuple[Callable[[Tensor], Any], int | None]] = {
        "eager fp32": (model, saved(model)),
        "compiled fp32": (compiled(model), saved(model)),
        "compiled bf16": (compiled(model, torch.bfloat16), None),
        "INT8": (compiled(int8), saved(int8)),
        "onnxruntime INT8": (ort, saved(ort)),
    }
    if static:
        openvino = quantize(model, QuantConfig(backend="openvino"), x[:16])
        found["openvino INT8"] = (openvino, saved(openvino))
    content = onnx_file(model, x[:1])
    found["onnxruntime fp32"] = (OnnxModel(content), len(content))
    for precision in ("f32", "bf16"):
        found[f"openvino {precision.replace('f32', 'fp32')}"] = (openvino_call(content, precision), None)
    return found


def openvino_call(content: bytes, precision: str) -> Callable[[Tensor], Any]:
    ov = required("openvino", "openvino")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.onnx").write_bytes(content)
        model = ov.convert_model(str(Path(folder) / "model.onnx"))
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
    }
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    return lambda x: torch.from_numpy(np.array(request.infer({0: x.numpy()}, share_inputs=True)[0]))


def saved(model: nn.Module) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return size_on_disk(save_model(model, folder))


def measure(name: str, batches: list[int], seconds: float) -> pd.DataFrame:
    model, x = built(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calls = variants(name, model, x)
    rows = []
    for batch in batches:
        inputs = x[:batch].contiguous()
        with torch.no_grad():
            reference = model(inputs)
            outputs = {variant: call(inputs).float() for variant, (call, _) in calls.items()}
            taken = latency_of({variant: partial(call, inputs) for variant, (call, _) in calls.items()}, 10**6, seconds)
        medians = {variant: statistics.median(times) for variant, times in taken.items()}
        for variant, (_, size) in calls.items():
            rows.append(
                {
                    "model": name,
                    "batch": batch,
                    "variant": variant,
                    "ms": medians[variant],
                    "fastest ms": min(taken[variant]),
                    "× eager": medians["eager fp32"] / medians[variant],
                    "× compiled": medians["compiled fp32"] / medians[variant],
                    "file": (size or np.nan) / (calls["eager fp32"][1] or np.nan),
                    "error": ((outputs[variant] - reference).norm() / reference.norm()).item(),
                }
            )
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[*IMAGES, *TEXTS], choices=[*IMAGES, *TEXTS])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--seconds", type=float, default=20, help="of timing, for each model and batch size")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    tables = []
    for name in arguments.models:
        tables.append(measure(name, arguments.batches, arguments.seconds))
        print(tables[-1].to_string(index=False, float_format=lambda value: f"{value:.3g}"), flush=True)
    if arguments.csv:
        pd.concat(tables).to_csv(arguments.csv, index=False)


if __name__ == "__main__":
    main()
