"""Augmentations against their definitions and against torchvision's, one image at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import TrivialAugmentWide, _apply_op

from workbench.data.augment import Draw, color_jitter, random_erasing, reflect_crop
from workbench.data.trivial import OPERATIONS, apply


def draw(total: int, seed: int = 0) -> Draw:
    return Draw(torch.Generator().manual_seed(seed), total, slice(0, total))


class Offsets(Draw):
    """Whole numbers that a test chose."""

    def __init__(self, *drawn: list[int]) -> None:
        self.drawn = [torch.tensor(values) for values in drawn]

    def integers(self, low: int, high: int) -> Tensor:
        found = self.drawn.pop(0)
        assert found.min() >= low and found.max() <= high
        return found


def test_a_reflecting_crop_is_cut_from_the_image_padded_by_its_mirror_image() -> None:
    x = torch.randint(0, 256, (3, 2, 16, 24), dtype=torch.uint8)
    top, left = [-2, 0, 2], [2, -2, 1]
    found = reflect_crop(x, Offsets(top, left))
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), mode="reflect")
    for sample in range(3):
        row, column = top[sample] + 2, left[sample] + 2
        np.testing.assert_array_equal(found[sample], padded[sample, :, row : row + 16, column : column + 24])


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (10, 14)])
def test_erasing_blanks_a_rectangle_within_the_image_by_its_mean(size: tuple[int, int]) -> None:
    x = torch.randint(0, 256, (400, 3, *size), dtype=torch.uint8)
    found = random_erasing(x, draw(400))
    changed = (found != x).any(1)  # [B, H, W]
    touched = changed.flatten(1).any(1)
    assert 150 < int(touched.sum()) < 250
    for sample in torch.where(touched)[0].tolist():
        rows, columns = torch.where(changed[sample])
        box = found[sample, :, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert torch.equal(box, x[sample].float().mean((1, 2)).to(torch.uint8)[:, None, None].expand_as(box))
        assert box[0].numel() <= 0.4 * x[0, 0].numel() + max(size)


def test_brightness_and_contrast_change_by_their_factors() -> None:
    class Given(Draw):
        def __init__(self, *drawn: float) -> None:
            self.drawn = list(drawn)

        def uniform(self) -> Tensor:
            return torch.tensor([self.drawn.pop(0)])

    x = torch.randint(0, 100, (1, 3, 8, 8)).float()
    same = color_jitter(x, Given(0.5, 0.5))
    torch.testing.assert_close(same, x)
    torch.testing.assert_close(color_jitter(x, Given(1.0, 0.5)), x * 1.4, rtol=1e-5, atol=1e-4)
    flat = color_jitter(x, Given(0.5, 0.0), strength=1.0)
    torch.testing.assert_close(flat, x.mean().expand_as(x), rtol=1e-5, atol=1e-4)


# -- TrivialAugment -------------------------------------------------------------------------------------------------

NAMES = {
    "shift_x": "TranslateX",
    "shift_y": "TranslateY",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "autocontrast": "AutoContrast",
}


def photo(channels: int = 3) -> Tensor:
    """Smooth, with some noise: uint8 [channels, 32, 32]."""
    torch.manual_seed(0)
    coarse = torch.nn.functional.interpolate(torch.rand(1, channels, 8, 8), size=(32, 32), mode="bilinear")
    return (coarse[0] * 200 + 20 + torch.rand(channels, 32, 32) * 20).to(torch.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_is_torchvisions_at_every_strength(operation: str, channels: int) -> None:
    """All 31 strengths both ways as one batch, against torchvision one image at a time; blends may round by one value."""
    image = photo(channels)
    name = NAMES.get(operation, operation.capitalize())
    magnitudes, signed = TrivialAugmentWide()._augmentation_space(31)[name]
    steps = torch.arange(31).repeat(2)
    sign = torch.ones(62)
    sign[31:] = -1 if signed else 1
    chosen = torch.full((62,), OPERATIONS.index(operation))
    found = apply(image.expand(62, -1, -1, -1), chosen, steps.float() / 30, sign)
    for sample in range(62):
        # In float32 some whole pixels are a little less, which it would cut off.
        magnitude = round(float(magnitudes[steps[sample]] if magnitudes.ndim else 0) * float(sign[sample]), 4)
        expected = _apply_op(image, name, magnitude, InterpolationMode.NEAREST, None)
        assert int((found[sample].int() - expected.int()).abs().max()) <= 1, (sample, magnitude)


def test_every_sample_of_a_batch_takes_its_own_operation() -> None:
    image = photo()
    chosen, strength, sign = torch.arange(14), torch.full((14,), 0.7), torch.ones(14)
    together = apply(image.expand(14, -1, -1, -1), chosen, strength, sign)
    for index in range(14):
        one = slice(index, index + 1)
        assert torch.equal(apply(image[None], chosen[one], strength[one], sign[one])[0], together[index])


def test_beta_draws_have_the_moments_of_their_distribution() -> None:
    for alpha in (0.2, 1.0, 4.0):
        values = draw(40_000).beta(alpha).double()
        assert float(values.min()) >= 0 and float(values.max()) <= 1
        assert float(values.mean()) == pytest.approx(0.5, abs=0.01)
        assert float(values.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)
