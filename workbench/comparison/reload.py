"""Whether what was saved comes back: each variant is loaded in a fresh process, and its outputs are compared bit by bit.

* :class:`Reload` — starts the process, and tells of each variant :data:`EQUAL` or what went wrong.
* ``python -m workbench.comparison.reload FOLDER`` — the process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from workbench.artefact import load_model
from workbench.comparison.forms import Variant
from workbench.errors import WorkbenchError

EQUAL = "bit-equal"
SAMPLES = 2
_REQUEST, _INPUT = "request.json", "input.safetensors"
_SECONDS = 900


class Reload:
    """The check of some variants, under way from when it is made.

    Args:
        loaded: the variants; those that the workbench didn't build can't be built again.
        x: inputs (N, ...), of which the first two are used.
        folder: an empty folder for what the processes tell each other.
    """

    def __init__(self, loaded: Mapping[str, Variant], x: Tensor, folder: Path) -> None:
        self._variants = loaded
        self._checked = [name for name, variant in loaded.items() if variant.structure.model is not None]
        self._x, self._folder = x[:SAMPLES].cpu().contiguous(), folder
        self._process: subprocess.Popen[bytes] | None = None
        if not self._checked:
            return
        folder.mkdir(parents=True, exist_ok=True)
        devices = {name: next((p.device.type for p in loaded[name].model.parameters()), "cpu") for name in self._checked}
        request = {
            "threads": torch.get_num_threads(),  # another number of threads sums in another order
            "variants": [{"path": str(loaded[name].folder.resolve()), "device": devices[name]} for name in self._checked],
        }
        (folder / _REQUEST).write_text(json.dumps(request), encoding="utf-8")
        safetensors.torch.save_file({"x": self._x}, folder / _INPUT)
        paths = [os.getcwd(), str(Path(__file__).resolve().parents[2]), *filter(None, sys.path)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "workbench.comparison.reload", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))},
        )

    def result(self) -> dict[str, str]:
        """By variant: :data:`EQUAL`, or why not; waits for the process."""
        words = dict.fromkeys(self._variants, "weights only: nothing says how to build it")
        try:
            for index, name in enumerate(self._checked):
                expected = outputs_of(self._variants[name].model, self._x)
                words[name] = self._verdict(index, expected)
        finally:
            self.close()
        return words

    def close(self) -> None:
        """End the process if it still runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _verdict(self, index: int, expected: Tensor) -> str:
        assert self._process is not None
        try:
            self._process.wait(_SECONDS)
        except subprocess.TimeoutExpired:
            return f"not loaded within {_SECONDS} s"
        file = self._folder / f"{index}.safetensors"
        if not file.exists():
            said = self._folder / f"{index}.txt"
            return f"fails: {said.read_text(encoding='utf-8')}" if said.exists() else "fails: the process ended without a word"
        found = safetensors.torch.load_file(file)["y"]
        if found.shape != expected.shape or found.dtype != expected.dtype:
            return f"differs: {list(found.shape)} instead of {list(expected.shape)}"
        if torch.equal(found.view(torch.uint8), expected.view(torch.uint8)):
            return EQUAL
        return f"differs by {(found.double() - expected.double()).abs().max().item():.1e}"


def outputs_of(model: nn.Module, x: Tensor) -> Tensor:
    """What a model gives for ``x``, on the CPU; its mode is left as it is."""
    parameter = next((p for p in model.parameters()), None)
    modes = {module: module.training for module in model.modules()}
    x = x.to(parameter.device) if parameter is not None else x
    if parameter is not None and parameter.dtype in (torch.bfloat16, torch.float16) and x.is_floating_point():
        x = x.to(parameter.dtype)
    try:
        for module in modes:
            module.training = False
        with torch.no_grad():
            output: Tensor = model(x)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return output.cpu().contiguous()


def main(folder: Path) -> None:
    """Load what the request names, and write down what it gives."""
    request: dict[str, Any] = json.loads((folder / _REQUEST).read_text(encoding="utf-8"))
    torch.set_num_threads(request["threads"])
    x = safetensors.torch.load_file(folder / _INPUT)["x"]
    for index, variant in enumerate(request["variants"]):
        try:
            y = outputs_of(load_model(variant["path"], variant["device"]), x)
            safetensors.torch.save_file({"y": y}, folder / f"{index}.safetensors")
        except Exception as error:  # of whatever kind, it is what the user would meet tomorrow
            words = error.what if isinstance(error, WorkbenchError) else f"{type(error).__name__}: {error}"
            (folder / f"{index}.txt").write_text(words[:500], encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
