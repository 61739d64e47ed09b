"""Images that are files below a folder: listed and checked at the start, decoded when they are asked for."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from trainer.data.dataset import DataError, IntArray, Uint8Array
from trainer.data.fitting import fit_image
from trainer.data.image_file import Header, Mode, decode, grey_values, inspect
from trainer.data.listing import Listing, list_images, shorten
from trainer.data.options import DataConfig
from trainer.data.summary import Summary

LOADER_THREADS = 8
FILES_PER_TASK = 128
BAR_DELAY_SECONDS = 2
BAD_FILES_SHOWN = 20
DECODED_FILES, DECODED_PIXELS = 10_000, 200_000_000
"""A data set within both limits is decoded whole before the first step: that takes seconds."""
DEEP_FILES_LOOKED_AT = 16
Result = TypeVar("Result")


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
                "choose --set model.image_channels=3, or give an npz of arrays with that many channels"
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
        digest = hashlib.sha256(os.fsencode("\n".join(self._files))).hexdigest()
        self.description: dict[str, str | int] = {
            "folder": path.name,
            "listing_sha256": digest,
            "images": len(self._files),
        }
        summary = Summary(image_size, channels, options, left_out=listing.left_out)
        deep = self._check(summary, decode_all=decode_all)
        if labelled:
            counts = np.bincount(self.labels, minlength=len(self.class_names)).tolist()
            summary.classes = dict(zip(self.class_names, counts, strict=True))
        summary.remarks = [*self._remarks_on_deep_files(deep), *_remarks_on_levels(path, listing)]
        self.summary = summary.line()

    def images(self, indices: IntArray) -> Uint8Array:
        """Decode the images at these indices."""
        return np.stack(list(self._threads.map(self._image, indices.tolist())))

    def _image(self, index: int) -> Uint8Array:
        try:
            image = decode(self._folder / self._files[index], self._mode, self._options)
        except DataError as error:
            raise DataError(f"{error}; mend it; --decode-all lists all such files before the first step") from error
        return fit_image(image, self._image_size, self._options.small_images)

    def _check(self, summary: Summary, *, decode_all: bool) -> list[str]:
        """Read every header, decode every file if asked to or if that is quick, and refuse all bad files at once.

        Returns:
            The files of more than 8 bits.
        """
        bad: dict[str, DataError] = {}
        deep: list[str] = []
        pixels = 0

        def header(file: str) -> Header:
            return inspect(self._folder / file, self._mode, self._options)

        for file, found in self._each(header, "checking images"):
            if isinstance(found, DataError):
                bad[file] = found
                continue
            summary.add(*found)
            pixels += found.width * found.height
            if "deep" in found.traits:
                deep.append(file)

        def whole(file: str) -> None:
            decode(self._folder / file, self._mode, self._options)

        if decode_all or (len(self._files) <= DECODED_FILES and pixels <= DECODED_PIXELS):
            bad |= {file: found for file, found in self._each(whole, "decoding images") if found is not None}
        if bad:
            raise DataError(_describe_bad(list(bad.values()), len(self._files)))
        return deep

    def _each(self, work: Callable[[str], Result], title: str) -> Iterator[tuple[str, Result | DataError]]:
        """Do something with each file in threads; yield the results in the order of the files."""

        def several(files: Sequence[str]) -> list[Result | DataError]:
            results: list[Result | DataError] = []
            for file in files:
                try:
                    results.append(work(file))
                except DataError as error:
                    results.append(DataError(str(error)))  # without the traceback, which holds the image
            return results

        tasks = [self._files[start : start + FILES_PER_TASK] for start in range(0, len(self._files), FILES_PER_TASK)]
        bar = tqdm(total=len(self._files), desc=title, unit="file", delay=BAR_DELAY_SECONDS, leave=False)
        with bar:
            for files, results in zip(tasks, self._threads.map(several, tasks), strict=True):
                yield from zip(files, results, strict=True)
                bar.update(len(files))

    def _remarks_on_deep_files(self, deep: list[str]) -> list[str]:
        """Say so if the values of 16-bit images use a small part of their range: 12-bit data would be nearly black."""
        if not deep or self._options.value_range is not None:
            return []
        looked_at = deep[:: max(1, len(deep) // DEEP_FILES_LOOKED_AT)][:DEEP_FILES_LOOKED_AT]
        highest = max(int(grey_values(self._folder / file).max()) for file in looked_at)
        bits = max(8, highest.bit_length())
        if bits > 14:
            return []
        return [
            f"the {len(looked_at)} looked at of more than 8 bits reach {highest}, so they become dark: "
            f"--set data.value_range=0,{2**bits - 1} makes {2**bits - 1} white"
        ]


def _remarks_on_levels(path: Path, listing: Listing) -> list[str]:
    """Say so if the only class has subfolders that may have been meant as classes."""
    if len(listing.class_names) != 1:
        return []
    below = Counter(parts[1] if len(parts := Path(file).parts) > 2 else "" for file in listing.files)
    if len(below) < 2 or "" in below:
        return []
    only = path / listing.class_names[0]
    return [f"the subfolders of the only class are no classes: {shorten(below)}; --data {only} makes them classes"]


def _describe_bad(errors: Sequence[DataError], files: int) -> str:
    lines = [str(error) for error in errors[:BAD_FILES_SHOWN]]
    if len(errors) > BAD_FILES_SHOWN:
        lines.append(f"and {len(errors) - BAD_FILES_SHOWN} more")
    if len(errors) == 1:
        return f"{lines[0]} (the other {files - 1:,} files can be read); mend or remove it"
    return "\n  ".join([f"{len(errors):,} of {files:,} image files cannot be read; mend or remove them:", *lines])
