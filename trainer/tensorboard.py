"""TensorBoard: scalars of the log lines and grids of samples, if the configuration asks for it and it is installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from formats.extras import install_command
from trainer.errors import TrainError

FOLDER = "tensorboard"
"""In the run's folder."""


class Board(Protocol):
    """Where a run shows its progress."""

    def scalars(self, images: int, values: Mapping[str, float]) -> None:
        """Show the values of a log line, after a number of training images."""
        ...

    def grid(self, images: int, png: Path) -> None:
        """Show a grid of samples, if the file exists."""
        ...


class NoBoard:
    """Shows nothing."""

    def scalars(self, images: int, values: Mapping[str, float]) -> None:
        """Do nothing."""

    def grid(self, images: int, png: Path) -> None:
        """Do nothing."""


class TensorBoard:
    """Writes event files into a folder; entries of a killed run after `images_seen` are hidden.

    Raises:
        TrainError: the package tensorboard is not installed.
    """

    def __init__(self, folder: Path, images_seen: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise TrainError(f"--tensorboard needs {error.name}: {install_command('train,tensorboard')}") from error
        self._writer = SummaryWriter(str(folder), purge_step=images_seen + 1)

    def scalars(self, images: int, values: Mapping[str, float]) -> None:
        """Write values; quartiles of a loss come under one heading."""
        for name, value in values.items():
            if name != "images":
                self._writer.add_scalar(_tag(name), value, images)
        self._writer.flush()  # a killed run loses nothing

    def grid(self, images: int, png: Path) -> None:
        """Write a PNG file as an image."""
        if png.exists():
            with Image.open(png) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            self._writer.add_image("samples", pixels, images, dataformats="HWC")
            self._writer.flush()


def _tag(name: str) -> str:
    term, quartile, number = name.rpartition("_q")
    if quartile and number.isdecimal():
        return f"{term} by quartile of t/{number}"
    return name


def open_board(wanted: bool, run: Path, images_seen: int) -> Board:
    """Return the board of a run, which shows nothing unless it is wanted."""
    return TensorBoard(run / FOLDER, images_seen) if wanted else NoBoard()
