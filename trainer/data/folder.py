"""Image files below a folder: listed and checked at the start, decoded on access."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from trainer.data.checking import check_files
from trainer.data.dataset import DataError, IntArray, Uint8Array
from trainer.data.fitting import fit_image
from trainer.data.image_file import Mode, decode
from trainer.data.listing import Listing, list_images, shorten
from trainer.data.options import DataConfig
from trainer.data.summary import Summary

LOADER_THREADS = 8


class FolderDataset:
    """A folder with one subfolder per class, or without classes."""

    def __init__(
        self,
        path: Path,
        image_size: int,
        channels: int,
        options: DataConfig,
        *,
        labelled: bool,
        decode_all: bool,
    ) -> None:
        if channels not in (1, 3):
            raise DataError(
                f"image files can be read as 1 (grey) or 3 (RGB) channels; model.image_channels is {channels}: "
                "choose --set model.image_channels=3, or use an npz of arrays with that number of channels"
            )
        listing = list_images(path, labelled=labelled)
        self._folder = path
        self._files = listing.files
        self._image_size = image_size
        self._options = options
        self._mode: Mode = "L" if channels == 1 else "RGB"
        self._threads = ThreadPoolExecutor(LOADER_THREADS, thread_name_prefix="decode")
        self.labels: IntArray = np.array(listing.labels, dtype=np.int64)
        self.class_names = listing.class_names
        summary = Summary(image_size, options, left_out=listing.left_out)
        if labelled:
            summary.count_classes(self.class_names, self.labels)
        summary.remarks += _remarks_on_levels(path, listing)
        check_files(path, self._files, self._mode, options, summary, decode_all=decode_all)
        self.summary = summary.line()
        self.description: dict[str, str | int] = {
            "folder": path.name,
            "listing_sha256": _sha256_of_lines(self._files),
            "sizes_sha256": _sha256_of_lines(str((path / file).stat().st_size) for file in self._files),
            "images": len(self._files),
        }

    def images(self, indices: IntArray, draws: npt.NDArray[np.floating] | None = None) -> Uint8Array:
        """Decode the images at these indices; crop with `draws` [N, 3] if random crops are enabled."""
        crops = [None] * len(indices) if draws is None or not self._options.random_crop else draws.tolist()
        return np.stack(list(self._threads.map(self._image, indices.tolist(), crops)))

    def _image(self, index: int, draws: Sequence[float] | None) -> Uint8Array:
        def fit(image: Image.Image) -> Uint8Array:
            return fit_image(image, self._image_size, self._options.small_images, draws)

        try:
            return decode(self._folder / self._files[index], self._mode, self._options, fit)
        except DataError as error:
            raise DataError(f"{error}; repair it; --decode-all lists all such files before the first step") from error


def _sha256_of_lines(lines: Iterable[str]) -> str:
    return hashlib.sha256(os.fsencode("\n".join(lines))).hexdigest()


def _remarks_on_levels(path: Path, listing: Listing) -> list[str]:
    """Return a remark if the only class has subfolders that may be meant as classes."""
    if len(listing.class_names) != 1:
        return []
    below = Counter(parts[1] if len(parts := Path(file).parts) > 2 else "" for file in listing.files)
    if len(below) < 2 or "" in below:
        return []
    only = path / listing.class_names[0]
    return [f"subfolders of the only class are not classes: {shorten(below)}; use --data {only} to make them classes"]
