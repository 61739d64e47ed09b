"""Batches are a function of (seed, position): of no batch size, no number of processes, no order of drawing."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
import torch

from diffusion.noise import STREAM_AUGMENTATION, uniform
from tests.unit.trainer.test_resume import write_npz
from tests.unit.trainer.test_trainer import tiny
from trainer.batches import Batch, Batches, seed_dropout
from trainer.config import TrainConfig
from trainer.data import Dataset, open_dataset
from trainer.look_ahead import DEPTH, looking_ahead
from trainer.loop import resolve
from trainer.timestep_sampler import StratifiedSampler


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_dataset(write_npz(tmp_path_factory.mktemp("batches") / "toy.npz"), 8, 1)


def batches(config: TrainConfig, dataset: Dataset, rank: int = 0, world: int = 1) -> Batches:
    return Batches(resolve(config, dataset), dataset, StratifiedSampler(100), rank=rank, world=world)


def rows(batch: Batch) -> list[tuple[bytes, ...]]:
    assert batch.y is not None
    tensors = (torch.from_numpy(batch.positions), batch.x0, batch.y, batch.noise, *batch.conditions.values())
    return [tuple(tensor[row].numpy().tobytes() for tensor in tensors) for row in range(len(batch))]


def test_an_images_noise_flip_and_label_depend_on_its_position_only(dataset: Dataset) -> None:
    config = tiny(batch_size=12, label_dropout=0.5)
    whole = rows(batches(config, dataset).draw(24))
    assert len(set(whole)) == 12
    smaller = batches(config.replace(batch_size=4), dataset)
    assert [row for first in (24, 28, 32) for row in rows(smaller.draw(first))] == whole
    assert rows(batches(config, dataset).draw(36)) != whole
    assert rows(batches(config.replace(seed=1), dataset).draw(24)) != whole


@pytest.mark.parametrize("world", [2, 3])
def test_the_processes_share_the_batch_of_one(dataset: Dataset, world: int) -> None:
    config = tiny(batch_size=12)
    alone = batches(config, dataset).draw(48)
    parts = [batches(config, dataset, rank, world).draw(48) for rank in range(world)]
    for rank, part in enumerate(parts):
        assert rows(part) == rows(alone)[rank::world]
        assert torch.equal(part.t, alone.t[rank::world])
        assert torch.equal(part.weights, alone.weights[rank::world])


def test_super_resolution_gets_the_image_downsampled_by_area(dataset: Dataset) -> None:
    config = tiny(model={**tiny().model.model_dump(), "low_res_size": 4})
    batch = batches(config, dataset).draw(0)
    low_res = batch.x0.reshape(4, 1, 4, 2, 4, 2).mean(dim=(3, 5))
    cond = batch.conditions["cond"]
    assert torch.allclose(cond, torch.nn.functional.interpolate(low_res, (8, 8), mode="bilinear"))
    assert torch.equal(batch.rows(slice(1, 3)).conditions["cond"], cond[1:3])


def test_dropout_is_seeded_by_the_position_of_the_first_image(dataset: Dataset) -> None:
    batch = batches(tiny(), dataset).draw(8)
    drawn = []
    for part in (batch, batch.rows(slice(0, 2)), batch.rows(slice(2, 4))):
        seed_dropout(3, part)
        drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_uniform_numbers_are_in_the_open_interval_and_depend_on_their_row_only() -> None:
    positions, zeros = np.arange(1000, dtype=np.int64), np.zeros(1000, dtype=np.int64)
    drawn = uniform(7, positions, zeros, STREAM_AUGMENTATION, 6)
    assert drawn.shape == (1000, 6)
    assert drawn.min() > 0
    assert drawn.max() < 1
    assert abs(drawn.mean() - 0.5) < 0.02
    assert np.array_equal(uniform(7, positions[5:7], zeros[5:7], STREAM_AUGMENTATION, 6), drawn[5:7])
    assert not np.array_equal(uniform(7, positions, zeros + 1, STREAM_AUGMENTATION, 6), drawn)


def test_drawing_ahead_is_bounded_and_raises_where_the_value_is_due() -> None:
    drawn: list[int] = []
    ready = threading.Event()

    def draw(position: int) -> int:
        drawn.append(position)
        if position == 3:
            raise ValueError(position)
        if position >= DEPTH:
            ready.set()
        return position * 10

    with looking_ahead(draw, itertools.count(1)) as ahead:
        assert ahead.take() == 10
        assert ready.wait(10)
        assert max(drawn) <= 1 + DEPTH
        assert ahead.take() == 20
        with pytest.raises(ValueError, match="3"):
            ahead.take()
        assert ahead.take() == 40
    with looking_ahead(lambda position: position, iter(range(1))) as ahead:
        assert ahead.take() == 0
        with pytest.raises(IndexError):
            ahead.take()
