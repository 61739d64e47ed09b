"""Conditioning images: low-resolution images are enlarged as OpenAI's models do."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diffusion.conditioning import enlarged
from diffusion.unet import UNet
from tests.fakes import tiny_config, tiny_network


@pytest.mark.parametrize(("size", "wanted"), [((4, 4), (8, 8)), ((3, 5), (8, 12)), ((1, 7), (16, 7)), ((8, 8), (8, 8))])
def test_images_are_enlarged_as_pytorch_does_with_either_array_library(
    size: tuple[int, int], wanted: tuple[int, int]
) -> None:
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, *size)).astype(np.float32)
    expected = F.interpolate(torch.from_numpy(images), wanted, mode="bilinear", align_corners=False)
    found, of_torch = enlarged(images, *wanted), enlarged(torch.from_numpy(images), *wanted)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(found, of_torch.numpy())


def test_enlarging_takes_little_more_memory_than_its_result() -> None:
    """The engine's thread does it between the stages of a cascade, and new pages are most of its time."""
    images = np.zeros((2, 3, 64, 64), np.float32)
    enlarged(images, 256, 256)
    tracemalloc.start()
    try:
        result = enlarged(images, 256, 256)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < result.nbytes + 5 * result[0, 0].nbytes


def test_a_network_needs_its_conditioning_image_and_takes_no_other() -> None:
    x_t, t, y = torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    with torch.no_grad():
        conditioned = tiny_network(tiny_config(cond_channels=2))
        pictures = torch.zeros(2, 2, 8, 8)
        pictures[1] = 1
        first, second = conditioned(x_t, t, y, pictures)
        assert not torch.allclose(first, second)
    for network, cond in ((conditioned, None), (UNet(tiny_config().model), pictures)):
        with pytest.raises(ValueError, match="cond must be given to a model with conditioning channels, and only"):
            network(x_t, t, y, cond)
