"""Every architecture through every compression: works, or refuses in words; never a crash, never a silent no-op.

    python -m tests.bench.matrix [--models resnet18,vit_small] [--size 96] [--out FILE]

Random weights, so there are no accuracies: the error is that of the logits, ‖y − reference‖ / ‖reference‖, of a quantized model
against the one that it was made from. Steps: prune 30 % of the parameters; INT8 (static, or dynamic for text); prune, then INT8;
torch.export of each and back; save each, and reload in a fresh process with bit-equal outputs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tests.fresh import answers_elsewhere
from workbench import PruneConfig, QuantConfig, prune, quantize
from workbench.artefact import WEIGHTS
from workbench.compress.graph import QuantizedModel
from workbench.errors import WorkbenchError
from workbench.models import ModelConfig, build_model

TEXT = {"bert_small", "bert_base", "lstm"}
MODELS: dict[str, dict[str, Any]] = {
    "resnet20": {"name": "resnet20"},
    "resnet18": {"name": "resnet18"},
    "resnet50": {"name": "resnet50"},
    "mobilenetv3": {"name": "mobilenetv3_large_100"},
    "efficientnet": {"name": "efficientnet_b0"},
    "convnext": {"name": "convnext_tiny"},
    "densenet": {"name": "densenet121"},
    "vit_small": {"name": "vit_small_patch16_224", "sized": True},
    "deit_small": {"name": "deit_small_patch16_224", "sized": True},
    "swin_tiny": {"name": "swin_tiny_patch4_window7_224", "sized": True},
    "bert_small": {"name": "bert_small"},
    "bert_base": {"name": "bert_base"},
    "lstm": {"name": "lstm"},
}


@dataclass
class Row:
    """One step on one model."""

    model: str
    step: str
    works: bool | None
    """True; None for a refusal in words; False for a crash or a silent no-op."""
    what: str
    """What came of it, or the reason."""
    seconds: float


class Failure(Exception):
    """A step that claimed to have worked and hadn't."""


def build(name: str, size: int) -> tuple[nn.Module, Tensor]:
    """The model with random weights, and four inputs."""
    torch.manual_seed(0)
    settings = MODELS[name]
    if name in TEXT:
        x = torch.randint(1, 1000, (4, 64))
        x[0, 40:] = 0
        return build_model(ModelConfig(name=settings["name"], num_classes=10)).eval(), x
    size = 224 if name == "swin_tiny" else size  # windows of seven patches
    args = {"img_size": size} if settings.get("sized") else {}
    config = ModelConfig(name=settings["name"], num_classes=10, in_channels=3, args=args)
    return build_model(config).eval(), torch.randn(4, 3, size, size)


def check(name: str, size: int, folder: Path) -> Iterator[Row]:
    """The steps, one row each; a step whose input isn't there is left out."""
    model, x = build(name, size)
    made: dict[str, nn.Module] = {"original": model}
    quantized_as = QuantConfig(mode="dynamic") if name in TEXT else QuantConfig(mode="static", calibration_samples=4)

    def pruned() -> str:
        made["pruned"] = prune(model, PruneConfig(ratio=0.3), x)
        before, after = (sum(p.numel() for p in m.parameters()) for m in (model, made["pruned"]))
        if not 0.3 <= 1 - after / before <= 0.31:
            raise Failure(f"{1 - after / before:.2%} of the parameters went, for 30 %")
        _forward(made["pruned"], x)
        return f"-{1 - after / before:.1%} parameters"

    def int8(source: str, target: str) -> str:
        made[target] = quantize(made[source], quantized_as, None if name in TEXT else [(x, torch.zeros(len(x)))])
        error = _error(_forward(made[target], x), _forward(made[source], x))
        return f"{quantized_as.mode}, logits off by {error:.3f}"

    def saved(key: str) -> str:
        (found,) = answers_elsewhere([(made[key], x)], folder)
        if not torch.equal(found, _forward(made[key], x)):
            raise Failure("in a fresh process, its outputs differ")
        weights = folder / "0" / WEIGHTS
        with safe_open(weights, "pt") as file:
            integers = [tensor for tensor in file.keys() if file.get_slice(tensor).get_dtype() in ("I8", "U8")]  # noqa: SIM118
        if "int8" in key and not integers:
            raise Failure("no INT8 weight in the file")
        size_mb = weights.stat().st_size / 1e6
        floats_mb = sum(t.numel() for t in made["pruned" if key.startswith("pruned") else "original"].parameters()) * 4e-6
        if "int8" in key and size_mb > 0.9 * floats_mb:
            raise Failure(f"the file has {size_mb:.1f} MB; as fp32 it would have {floats_mb:.1f}")
        return f"{size_mb:.1f} MB, bit-equal in a fresh process"

    def exported(key: str) -> str:
        source = made[key]
        source = source.graph if isinstance(source, QuantizedModel) else source  # the graph itself, as export names its parts
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(source, (x,), dynamic_shapes=({0: batch},), strict=True)
        torch.export.save(program, folder / f"{key}.pt2")
        again = torch.export.load(folder / f"{key}.pt2").module()
        with torch.no_grad():
            error = _error(again(x), _forward(source, x))
        if error > 1e-4:
            raise Failure(f"the exported program's logits are off by {error:.3g}")
        return f"{(folder / f'{key}.pt2').stat().st_size / 1e6:.1f} MB, logits off by {error:.1g}"

    steps: list[tuple[str, str, Callable[[], str]]] = [
        ("prune 30 %", "original", pruned),
        ("INT8", "original", lambda: int8("original", "int8")),
        ("prune → INT8", "pruned", lambda: int8("pruned", "pruned int8")),
        *((f"export {key}", key, lambda key=key: exported(key)) for key in ("original", "pruned", "int8", "pruned int8")),
        *((f"reload {key}", key, lambda key=key: saved(key)) for key in ("pruned", "int8", "pruned int8")),
    ]
    for step, needs, act in steps:
        if needs not in made:
            continue
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                what, works = act(), True
        except WorkbenchError as error:
            what, works = str(error), None
        except torch._dynamo.exc.Unsupported as error:  # torch.export's own refusal
            what, works = f"torch.export: {str(error).partition(chr(10) + chr(10))[0]}", None
        except Exception as error:  # a crash is a result here
            what, works = f"{type(error).__name__}: {error}", False
            if not isinstance(error, Failure):
                traceback.print_exc(limit=-3)
        yield Row(name, step, works, " ".join(what.split()), time.perf_counter() - start)


def _forward(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(x)
    return found


def _error(found: Tensor, reference: Tensor) -> float:
    return float((found.double() - reference.double()).norm() / reference.double().norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--size", type=int, default=224, help="pixels on a side")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    rows = []
    for name in options.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            for row in check(name, options.size, Path(folder)):
                rows.append(row)
                mark = {True: "works  ", None: "refuses", False: "FAILS  "}[row.works]
                print(f"{row.model:13} {row.step:20} {mark} {row.what[:150]} ({row.seconds:.0f} s)", flush=True)
        if options.out:
            options.out.write_text(json.dumps([asdict(row) for row in rows], indent=1, ensure_ascii=False), encoding="utf-8")
    failed = sum(row.works is False for row in rows)
    print(f"{sum(row.works is True for row in rows)} work, {sum(row.works is None for row in rows)} refuse, {failed} fail")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
