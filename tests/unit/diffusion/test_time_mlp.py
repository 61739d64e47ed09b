"""The time MLP without the network gives the network's own result, for both kinds of array."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from diffusion.time_mlp import WEIGHTS, TimeMLP
from diffusion.unet import timestep_embedding
from tests import golden
from tests.parity.test_networks import CLASSIFIERS, UNETS

TIMES = np.array([0, 0.25, 1, 7.5, 308.625, 999.75, 3999], dtype=np.float32)
FIRST, LAST = "time_embed.0.weight", "time_embed.2.bias"


def golden_weights(name: str) -> dict[str, npt.NDArray[np.float32]]:
    network = golden.network(name) if name in UNETS else golden.classifier(name)
    return {weight: network.state_dict()[weight].numpy() for weight in WEIGHTS}


def random_weights(narrow: int, wide: int) -> dict[str, npt.NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    shapes = {name: tuple((wide, narrow)[i] for i in dims) for name, dims in WEIGHTS.items()}
    return {name: (rng.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32) for name, shape in shapes.items()}


def exact_mlp(weights: Mapping[str, npt.NDArray[np.float32]], embedding: Tensor) -> npt.NDArray[np.float64]:
    """Compute the MLP of embedded timesteps in float64."""
    w0, b0, w2, b2 = (torch.from_numpy(weights[name]).double() for name in WEIGHTS)
    hidden = torch.nn.functional.silu(embedding.double() @ w0.T + b0)
    return (hidden @ w2.T + b2).numpy()


def largest_error(
    weights: Mapping[str, npt.NDArray[np.float32]], t: npt.NDArray[np.float32], out: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Bound the norm of the difference that two libraries' float32 exp, cos and sin make after an exact MLP.

    Each is off by a unit in the last place at most: a frequency f by 2^-23 of itself, so that an angle, a rounded
    product, is off by t f (2^-23 + 2^-24).
    """
    w0, _, w2, _ = (weights[name].astype(np.float64) for name in WEIGHTS)
    half = w0.shape[1] // 2
    frequencies = 10000.0 ** (-np.arange(half) / half)
    embedding = 1.5 * 2**-23 * t * np.linalg.norm(frequencies) + 2**-23 * np.sqrt(2 * half)
    norms = np.linalg.norm(w0, 2) * 1.1 * np.linalg.norm(w2, 2)
    return norms * embedding + 2**-23 * np.linalg.norm(out, axis=1)


@pytest.mark.parametrize("name", [*UNETS, *CLASSIFIERS])
def test_it_equals_the_network_s_own(name: str) -> None:
    network = golden.network(name) if name in UNETS else golden.classifier(name)
    expected = network.embed_timesteps(torch.from_numpy(TIMES)).numpy()

    actual = TimeMLP(golden_weights(name))(TIMES)

    assert actual.dtype == np.float32
    errors = np.linalg.norm(actual.astype(np.float64) - expected, axis=1) / np.linalg.norm(expected, axis=1)
    for largest, tolerance in golden.TIMESTEP_TOLERANCES.items():
        assert (errors[largest >= TIMES] < tolerance).all()
    assert len(np.unique(actual, axis=0)) == len(TIMES)


@pytest.mark.parametrize("narrow", [5, 32, 33])
def test_an_odd_width_ends_in_a_column_of_zeros(narrow: int) -> None:
    weights = random_weights(narrow, 4 * narrow)
    expected = exact_mlp(weights, timestep_embedding(torch.from_numpy(TIMES), narrow))

    errors = np.linalg.norm(TimeMLP(weights)(TIMES) - expected, axis=1)
    assert (errors <= largest_error(weights, TIMES, expected)).all()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_a_timestep_is_bit_identical_in_every_batch(size: int) -> None:
    mlp = TimeMLP(golden_weights("imp_cond_ls"))
    t = np.arange(0, 4000, 8.25, dtype=np.float32)
    together = mlp(t)
    apart = np.concatenate([mlp(t[start : start + size]) for start in range(0, len(t), size)])
    np.testing.assert_array_equal(apart, together)
    np.testing.assert_array_equal(mlp(t[::-1])[::-1], together)


def test_it_survives_a_round_trip_through_its_file(tmp_path: Path) -> None:
    mlp = TimeMLP(golden_weights("adm_superres"))
    mlp.write(tmp_path / "time_mlp.npz")
    np.testing.assert_array_equal(TimeMLP.read(tmp_path / "time_mlp.npz")(TIMES), mlp(TIMES))


@pytest.mark.parametrize(
    "weights",
    [
        {},
        {name: array for name, array in random_weights(32, 128).items() if name != LAST},
        {**random_weights(32, 128), "extra": np.zeros(1, dtype=np.float32)},
        {**random_weights(32, 128), LAST: np.zeros(127, dtype=np.float32)},
        {**random_weights(32, 128), FIRST: np.zeros((128, 0), dtype=np.float32)},
    ],
    ids=["empty", "missing", "unknown", "shape", "no columns"],
)
def test_other_weights_are_refused(weights: dict[str, npt.NDArray[np.float32]]) -> None:
    with pytest.raises(ValueError, match="a time MLP must have time_embed"):
        TimeMLP(weights)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "time_mlp.npz"
    TimeMLP(random_weights(32, 128)).write(path)
    whole = path.read_bytes()
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "pickled.npz", weight=np.array([object()]))
    contents = [
        b"",
        b"no archive",
        whole[:1000],
        whole[:-10],
        (tmp_path / "array.npy").read_bytes(),
        (tmp_path / "pickled.npz").read_bytes(),
    ]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"time_mlp\.npz holds no time MLP"):
            TimeMLP.read(path)
    with pytest.raises(ValueError, match="holds no time MLP"):
        TimeMLP.read(tmp_path / "nowhere.npz")
