"""A process of its own, as tomorrow's reader has it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from workbench.artefact import save_model

_LOAD_AND_CALL = """
import sys
import torch
from workbench.artefact import load_model

folder = sys.argv[1]
torch.set_num_threads(int(sys.argv[2]))
with torch.no_grad():
    answers = [load_model(f"{folder}/{number}")(x) for number, x in enumerate(torch.load(f"{folder}/inputs.pt"))]
torch.save(answers, f"{folder}/answers.pt")
assert "torch_pruning" not in sys.modules, "loading takes no pruning library"
"""


def answers_elsewhere(cases: Sequence[tuple[nn.Module, Tensor]], folder: Path) -> list[Tensor]:
    """Save each model in ``folder``, load it in a fresh process of as many threads, and give what it answers there.

    Args:
        cases: (model, its input).

    Raises:
        RuntimeError: the process failed; the last line that it wrote.
    """
    for number, (model, _) in enumerate(cases):
        save_model(model, folder / str(number))
    torch.save([x for _, x in cases], folder / "inputs.pt")
    command = [sys.executable, "-c", _LOAD_AND_CALL, str(folder), str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    answers: list[Tensor] = torch.load(folder / "answers.pt")
    return answers
