"""What is added up of tensors, against float64, for every type; histograms against numpy's; the CUDA kernels, interpreted."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workbench.probes.base import ACTIVATIONS, GRADIENTS
from workbench.probes.bins import Bins
from workbench.probes.kernels import ENOUGH, HEAD, Tally
from workbench.probes.sampling import Layout, layout_of

CPU = torch.device("cpu")
SPECIAL = [0.0, -0.0, 1e-45, -1e-40, 3e38, -3e38, 65504.0, 2.0**-24, -(2.0**-24), 1.0, -1.0, math.sqrt(2), -math.sqrt(2)]


def moments(value: Tensor) -> list[float]:
    """Count, sum, sum of squares, zeros, non-finite elements, smallest, largest, by numpy in float64."""
    wide = value.detach().double().numpy().reshape(-1)
    with np.errstate(invalid="ignore"):
        extremes = [float(wide.min()), float(wide.max())] if wide.size else [math.inf, -math.inf]
        return [wide.size, wide.sum(), (wide * wide).sum(), (wide == 0).sum(), (~np.isfinite(wide)).sum(), *extremes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 31, 2048, 2049, 100_003])
@pytest.mark.parametrize("planted", ["", "special", "nan", "inf"])
def test_moments_are_those_of_float64(dtype: torch.dtype, count: int, planted: str) -> None:
    value = torch.randn(count, generator=torch.Generator().manual_seed(count)) * 3
    if planted == "special":
        value[: len(SPECIAL)] = torch.tensor(SPECIAL)[:count]
    elif planted:
        value[count // 2] = float(planted)
        value[-1] = -float(planted)
    value = value.to(dtype)
    tally = Tally([0], 512, GRADIENTS, CPU)
    tally.record(0, value)
    found, expected = tally.finish()[0, :7].tolist(), moments(value)
    size = float(value.double().abs().sum())  # what a sum's rounding goes by
    assert found[1] == pytest.approx(expected[1], abs=1e-14 * size, nan_ok=True)
    np.testing.assert_allclose(found[2:] + found[:1], expected[2:] + expected[:1], rtol=1e-12)


def test_micro_batches_add_up_and_a_row_begins_anew_after_each_reading() -> None:
    parts = [torch.randn(7, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    tally = Tally([-1, -1], 64, ACTIVATIONS, CPU)
    for _ in range(2):
        for part in parts:
            tally.record(1, part)
        found = tally.finish()
        np.testing.assert_allclose(found[1, :7].numpy(), moments(torch.cat(parts)), rtol=1e-12)
        assert found[0, 0] == 0 and found[0, 7] == 0 and found[0, HEAD:].sum() == 0  # nothing was added to it


def test_moments_of_the_sample_alone() -> None:
    """They are those of the sampled elements, and as near the whole's as its size says."""
    torch.manual_seed(0)
    value = torch.randn(3000, 64) * 2 + 1
    tally = Tally([-1], 4096, ACTIVATIONS, CPU, exact=False)
    tally.record(0, value)
    count, total, square, zeros, broken, low, high, sampled = tally.finish()[0, :8].tolist()
    sample = tally.samples[0, :4096].double()
    assert count == sampled == 4096 and zeros == broken == 0
    assert (low, high) == (sample.min(), sample.max())
    assert total == pytest.approx(float(sample.sum()), rel=1e-12) and square == pytest.approx(
        float(sample.square().sum()), rel=1e-6
    )
    assert abs(total / count - 1) < 4 * 2 / math.sqrt(4096)


@pytest.mark.parametrize("bins", [ACTIVATIONS, GRADIENTS, Bins(-3, 2), Bins(-2, 2, 2, signed=True)])
def test_histograms_count_what_numpy_counts(bins: Bins) -> None:
    edges = np.array(bins.edges)
    assert len(edges) == bins.count + 1 and (np.diff(edges) > 0).all()
    rounded = torch.tensor(bins.edges[1:-1], dtype=torch.float32)
    value = torch.cat([torch.randn(4000) * torch.logspace(-20, 20, 4000), rounded, torch.tensor([0.0, -0.0, math.inf])])
    value = torch.cat([value, torch.tensor([-math.inf, math.nan, -math.nan])])
    known = value[~value.isnan()]
    known = known if bins.signed else known.abs()
    expected, _ = np.histogram(known.double().numpy(), bins=np.array([*edges[:1], *rounded.double().tolist(), *edges[-1:]]))
    places = bins.place(value)
    assert places[value.isnan()].tolist() == [bins.count] * 2
    np.testing.assert_array_equal(np.bincount(places.numpy(), minlength=bins.count + 1)[: bins.count], expected)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4).filter(lambda shape: math.prod(shape) < 100_000),
    st.sampled_from([0, 1, -1]),
    st.booleans(),
)
def test_a_sample_has_every_unit_equally_often_and_no_element_twice(shape: list[int], dim: int, last: bool) -> None:
    if dim == 1 and len(shape) == 1:
        dim = 0
    value = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    if last and len(shape) == 4:
        value = value.to(memory_format=torch.channels_last)
    layout = layout_of(value, dim, 256)
    tally = Tally([dim], 256, ACTIVATIONS, CPU)
    tally.record(0, value)
    taken = layout.rows * layout.units
    sample = tally.samples[0, :taken].long()
    assert taken <= 256 and len(sample.unique()) == taken
    assert taken == value.numel() or taken > 128 or layout.rows == 1 or layout.units > 85
    if dim and len(shape) > 1 and shape[dim] <= 256:
        unit = torch.arange(shape[dim]).view([-1 if axis == dim % len(shape) else 1 for axis in range(len(shape))]).expand(shape)
        assert torch.equal(unit.reshape(-1)[sample].view(layout.rows, -1), torch.arange(shape[dim]).expand(layout.rows, -1))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_samples_histogram_is_as_near_the_whole_as_its_size_says(memory_format: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(64, 32, 16, 16, generator=generator).to(memory_format=memory_format)
    tally = Tally([1], 4096, ACTIVATIONS, CPU)
    tally.record(0, value)
    counts = tally.finish()[0, HEAD:].numpy()
    whole = np.histogram(value.double().numpy(), bins=np.array(ACTIVATIONS.edges))[0] / value.numel()
    assert counts.sum() == 4096
    deviation = np.sqrt(whole * (1 - whole) / 4096)
    assert np.abs(counts / 4096 - whole).max() < 0.008 * 4
    assert (np.abs(counts / 4096 - whole) <= 5 * deviation + 1 / 4096).all()


def test_a_unit_is_dead_once_it_was_seen_often_enough_and_alive_at_its_first_value() -> None:
    tally = Tally([-1], 4096, ACTIVATIONS, CPU, [(0.0, -math.inf, math.inf)])
    dead = torch.zeros(16, 10)
    dead[:, 5:] = 1.0
    for reading in range(1, 6):
        tally.record(0, dead)
        assert tally.finish()[0, 8] == (0.5 if 16 * reading >= ENOUGH else 0.0)
    dead[3, :2] = 0.1
    tally.record(0, dead)
    assert tally.finish()[0, 8] == 0.3


def test_positions_of_a_sample_spread_evenly() -> None:
    """The golden section: the largest gap between sampled positions stays within three times the even one."""
    for rows in (5, 32, 100):
        layout = Layout(100_000, 1, 1, 100_000, rows, layout_of(torch.empty(100_000), 0, 1).step)
        places = np.sort(layout.places(CPU).numpy())
        gaps = np.diff([*places, places[0] + 100_000])
        assert gaps.max() < 3 * 100_000 / rows


def test_the_cuda_kernels_give_the_same_numbers() -> None:
    """By Triton's interpreter, which computes them on a CPU; on a GPU tests/gpu holds them to float64."""
    pytest.importorskip("triton", reason="Triton comes with CUDA builds of PyTorch")
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("interpreted.py"))],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
