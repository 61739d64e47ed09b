"""Pixels and time embeddings compared with OpenAI's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffusion.unet import timestep_embedding
from diffusion.update import from_uint8, to_uint8
from tests import golden

GOLDEN = golden.load("misc")


def test_pixels_truncate_like_the_reference() -> None:
    x = GOLDEN.tensor("to_uint8.x")

    np.testing.assert_array_equal(to_uint8(x[None, None, None]).ravel(), GOLDEN["to_uint8.y"])


@pytest.mark.parametrize("source", ["dataset", "superres"])
def test_images_come_from_pixels_like_the_reference(source: str) -> None:
    levels = np.arange(256, dtype=np.uint8)[None, None, :, None]

    np.testing.assert_array_equal(from_uint8(levels).ravel(), GOLDEN[f"from_uint8.{source}"])


@pytest.mark.parametrize(
    ("key", "dim", "max_period"),
    [
        ("temb.dim128", 128, 10000),
        ("temb.dim32", 32, 10000),
        ("temb.dim33", 33, 10000),
        ("temb.dim6", 6, 10000),
        ("temb.dim5", 5, 10000),
        ("temb.maxperiod100_dim32", 32, 100),
    ],
)
def test_time_embeddings_equal_the_reference(key: str, dim: int, max_period: int) -> None:
    t = GOLDEN.tensor("temb.t")
    embedding = timestep_embedding(t, dim, max_period)

    for largest, tolerance in golden.TIMESTEP_TOLERANCES.items():
        some = t <= largest
        torch.testing.assert_close(embedding[some], GOLDEN.tensor(key)[some], rtol=0, atol=tolerance)


def test_whole_timesteps_embed_like_the_reference() -> None:
    embedding = timestep_embedding(GOLDEN.tensor("temb.int_t"), 32)

    torch.testing.assert_close(
        embedding, GOLDEN.tensor("temb.int_dim32"), rtol=0, atol=golden.TIMESTEP_TOLERANCES[4000]
    )
