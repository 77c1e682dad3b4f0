"""Gradients exchanged in pieces, rounded, as low-rank factors: against the exact mean, in one pair of processes."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from workbench import Run, TrainConfig, launch, launcher
from workbench.errors import ConfigError
from workbench.training.communication import check_communication
from workbench.training.lowrank import orthonormal

pytestmark = pytest.mark.usefixtures("forked")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found; see exchange.py."""
    out = tmp_path_factory.mktemp("exchange") / "found.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    program = Path(__file__).with_name("exchange.py")
    ran = subprocess.run([*command, str(program), str(out)], env=environment, timeout=280, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    ranks: list[dict[str, Any]] = json.loads(out.read_text())
    return ranks


def test_pieces_change_nothing_and_rounding_little(found: list[dict[str, Any]]) -> None:
    """In micro-steps, of which the last exchanges what all have gathered."""
    for rank in found:
        compared = rank["compare"]
        assert compared["whole"] == {"distance": 0, "payload": 4 * 74762, "buckets": 1}
        assert compared["small buckets"]["distance"] == 0 and compared["small buckets"]["buckets"] > 1
        assert 0 < compared["bf16"]["distance"] < 2**-8  # half of a bf16's last bit, and of another's
        assert compared["bf16"]["payload"] * 2 == compared["whole"]["payload"]
    assert found[0]["compare"] == found[1]["compare"]


def test_compiled_copies_exchange_gradients_within_the_backward_pass(found: list[dict[str, Any]]) -> None:
    """A matrix used twice, a frozen one, one without a gradient, odd sizes, channels last; DDP where there are several graphs."""
    for rank in found:
        compiled = rank["compiled"]
        for name, way, apart, part in [
            ("small buckets", "CompiledReplicas", 1e-6, 1),
            ("whole", "CompiledReplicas", 1e-6, 1),
            ("bf16", "CompiledReplicas", 2**-8, 2),
            ("in parts", "DDP", 1e-6, 1),
        ]:
            assert compiled[name]["names"] and compiled[name]["way"] == way
            assert compiled[name]["distance"] < apart, (name, compiled[name])
            assert way == "DDP" or compiled[name]["payload"] * part == compiled["whole"]["payload"]
        assert compiled["bf16"]["distance"] > 1e-5


def sent(model: nn.Module, x: torch.Tensor, bucket: float) -> list[str]:
    """Operators of the joint graph of ``model``, its gradients averaged in buckets of so many MiB."""
    from functorch.compile import default_partition, nop
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    from workbench.training.reduction import Averaging

    seen: list[str] = []

    def divide(joint: torch.fx.GraphModule, inputs: Any, **settings: Any) -> Any:
        Averaging("0", 2, bucket, None)(joint.graph)
        joint.graph.lint()
        seen.extend(str(node.target) for node in joint.graph.nodes)
        return default_partition(joint, inputs, **settings)

    backend = aot_autograd(fw_compiler=nop, bw_compiler=nop, partition_fn=divide, decompositions=select_decomp_table())
    torch.compiler.reset()
    torch.compile(model, backend=backend, fullgraph=True)(x)
    torch.compiler.reset()
    return seen


def test_what_a_compiled_pass_sends() -> None:
    """Buckets where their last gradient is there, smaller ones at the end; waits after everything else."""
    from workbench.training.reduction import cut

    single, half = torch.float32, torch.bfloat16
    assert cut([8, 8, 8, 8, 8, 3, 1, 1], [single] * 8, 16) == [[0], [1, 2], [3, 4], [5], [6, 7]]
    assert cut([1, 1, 1], [single, half, half], math.inf) == [[0], [1, 2]] and cut([], [], 1) == []
    seen = sent(nn.Sequential(*(nn.Linear(16, 16) for _ in range(4))), torch.randn(2, 16), 0.001)
    names = [name.split(".")[1] for name in seen if "c10d" in name]
    assert names == ["all_reduce"] * 8 + ["wait_tensor"] * 8
    # The last layer's gradients, which come first, have set out before those of the next are computed.
    assert any("mm" in name for name in seen[seen.index("_c10d_functional.all_reduce.default") :])
    assert seen.index("workbench.mark.default") == max(i for i, name in enumerate(seen) if "all_reduce" in name) - 1


def test_a_large_embedding_travels_while_other_gradients_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of matrices of twice its bytes, if there are so many, and no others: not vectors', nor what it needs itself."""
    from workbench.training import reduction

    def behind(layers: int) -> int:
        """Products computed when the embedding has set out, of a model with so many layers."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(64, 16), *(nn.Linear(16, 16) for _ in range(layers)))
        seen = sent(model, torch.tensor([[1, 2], [3, 4]]), 3.9 / 1024)  # of 4 KiB, with matrices of one
        return sum("mm" in name for name in seen[max(i for i, name in enumerate(seen) if "index_put" in name) :])

    assert behind(12) == 8 and behind(3) == 3
    monkeypatch.setattr(reduction, "SHADE", 0.0)
    assert behind(12) == 0


def test_low_rank_factors_keep_back_what_they_do_not_tell(found: list[dict[str, Any]]) -> None:
    """Exact steps are exact; a higher rank is nearer; in float64, what ten steps left out is the mean of what ranks hold."""
    for rank in found:
        compared = rank["compare"]
        assert compared["powersgd, exact steps"]["distance"] == 0
        assert 0 < compared["powersgd 16"]["distance"] < compared["powersgd 4"]["distance"] < 1
        assert compared["powersgd 4"]["payload"] < compared["whole"]["payload"] / 10
        assert rank["kept"]["left out"] > 0.1 and rank["kept"]["apart"] < 1e-13
        assert rank["kept"]["goes on"]
        assert rank["recovered"] < 1e-9  # a gradient of that rank, and one that is zero at first


def test_the_size_of_buckets_is_measured_once_and_nothing_is_changed_by_it(found: list[dict[str, Any]]) -> None:
    one, other = (rank["measured"] for rank in found)
    assert one == other and one["bucket"] in (5.0, 25.0, "whole")
    assert "5 MiB" in one["reason"] and "whole" in one["reason"]
    assert one["unchanged"] and one["reused"] and one["detached"] == 0


def test_columns_at_right_angles_without_those_that_add_nothing() -> None:
    torch.manual_seed(0)
    columns = torch.randn(3, 20, 4, dtype=torch.float64)
    columns[1, :, 2] = columns[1, :, 0] - 2 * columns[1, :, 1]
    columns[2] = 0
    made = orthonormal(columns)
    products = made.mT @ made
    expected = torch.stack([torch.eye(4), torch.diag(torch.tensor([1.0, 1.0, 0.0, 1.0])), torch.zeros(4, 4)]).double()
    torch.testing.assert_close(products, expected, atol=1e-7, rtol=0)
    torch.testing.assert_close(made @ (made.mT @ columns), columns)


def test_low_rank_errors_are_in_the_checkpoint(
    config: Callable[..., TrainConfig], until: Callable[..., Any], tmp_path: Path
) -> None:
    """From its last but one checkpoint, a run goes on to the same weights, bit for bit; it learns."""
    settings = {"model.args": {"dropout": 0.0, "width": 64}, "communication.compress": "powersgd", "communication.start": 2}
    chosen = config(**settings, **{"communication.rank": 2, "epochs": 2, "checkpoint.every_steps": 6})
    whole = launch(chosen, nproc=2, root=tmp_path).wait(timeout=120)
    until(lambda: launcher.at_work(whole.path) is None)
    shutil.copytree(whole.path, tmp_path / "again")
    again = Run.open(tmp_path / "again")
    shutil.rmtree(again.checkpoints[-1])
    assert again.checkpoints[-1].name == "step-12"
    launcher.spawn(again.path, 2)
    again.wait(timeout=120)
    np.testing.assert_array_equal(again.history["loss"], whole.history["loss"])
    assert (again.path / "model.safetensors").read_bytes() == (whole.path / "model.safetensors").read_bytes()
    assert whole.history["loss"].iloc[-3:].mean() < whole.history["loss"].iloc[:3].mean()


def test_what_does_not_go_together_is_refused_in_words() -> None:
    config = TrainConfig(communication={"compress": "powersgd"})
    with pytest.raises(ConfigError, match="mesh.shard=2 splits one"):
        check_communication(config, {"replicate": 1, "shard": 2}, "bf16")
    with pytest.raises(ConfigError, match="changes the scale"):
        check_communication(config, {"replicate": 2}, "fp16")
    check_communication(TrainConfig(), {"replicate": 1, "shard": 2}, "fp16")
    with pytest.raises(ConfigError, match="communication.bucket"):
        TrainConfig(communication={"bucket": 0})
