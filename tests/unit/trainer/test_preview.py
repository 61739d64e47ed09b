"""Sample grids during training: which classes they show, and their progress."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from diffusion.config import CheckpointConfig
from diffusion.unet import UNet
from tests.unit.trainer.test_trainer import tiny
from trainer import preview as module
from trainer.preview import preview, spread


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (3, [0, 1, 2]),
        (10, list(range(10))),
        (11, [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]),
        (1000, [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]),
    ],
)
def test_rows_are_spread_over_all_classes(count: int, expected: list[int]) -> None:
    assert list(spread(range(count))) == expected


class Bar:
    """Stands for tqdm's bar at a terminal."""

    def __init__(self, *, total: int, **options: Any) -> None:
        assert options["disable"] is None  # shown at a terminal only
        assert not options["leave"]
        self.total, self.count = total, 0

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self) -> None:
        self.count += 1


def test_a_grid_counts_its_steps_and_names_the_classes_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Bar] = []
    drawn: list[list[tuple[str, Any]]] = []

    def make(**options: Any) -> Bar:
        bars.append(Bar(**options))
        return bars[-1]

    monkeypatch.setattr(module, "tqdm", make)
    monkeypatch.setattr(module, "captioned_rows", drawn.append)
    base = tiny()
    names = tuple(f"class {k}" for k in range(37))
    config = CheckpointConfig(
        model=base.model.replace(num_classes=37).model_dump(),
        diffusion=base.diffusion.replace(num_timesteps=8),
        class_names=names,
    )
    network = UNet(config.model).eval()
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.1)  # an untrained network does not depend on the class
    preview(network, config, per_class=2, steps=3)
    (bar,), (rows,) = bars, drawn
    assert (bar.count, bar.total) == (30, 30)
    assert [name for name, _ in rows] == [names[k] for k in (0, 4, 8, 12, 16, 20, 24, 28, 32, 36)]
    assert all(images.shape == (2, 8, 8, 1) for _, images in rows)
    assert not np.array_equal(rows[0][1], rows[1][1])
