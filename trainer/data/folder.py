"""Image files below a folder: listed and checked at the start, decoded on access."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from diffusion.config import ImageSize
from diffusion.quoting import printable
from trainer.data.checking import Examined, check_files
from trainer.data.dataset import IntArray
from trainer.data.decoder import Decoder
from trainer.data.encoded_images import EncodedImages
from trainer.data.image_file import mode_of
from trainer.data.listing import Listing, shorten
from trainer.data.options import DataConfig
from trainer.data.summary import Summary


class FolderDataset(EncodedImages):
    """Images that were listed below a folder."""

    def __init__(
        self,
        path: Path,
        listing: Listing,
        examined: Examined,
        kept: IntArray,
        image_size: ImageSize,
        channels: int,
        options: DataConfig,
        *,
        labelled: bool,
    ) -> None:
        """Describe the images.

        Args:
            path: of the folder.
            listing: its files.
            examined: what was found about them.
            kept: numbers of the files that are used, ascending.
            image_size: size of the images that the data set returns.
            channels: 1 for grey, 3 for RGB.
            options: how images are read.
            labelled: whether labels are used.
        """
        mode = mode_of(channels, options)
        summary = Summary(image_size, options, left_out=listing.left_out)
        summary.remarks += _remarks_on_classes(path, listing, options)
        checked = check_files(examined, kept, options, summary)
        files = [listing.files[number] for number in checked.kept.tolist()]
        self.labels: IntArray = np.array(listing.labels, dtype=np.int64)[checked.kept]
        self.class_names = listing.class_names
        self.sizes = checked.sizes
        self._names = files
        if labelled:
            summary.count_classes(self.class_names, self.labels)
        self.summary = summary.line()
        self.description: dict[str, str | int] = {
            "folder": path.name,
            "listing_sha256": _sha256_of_lines(files),
            "sizes_sha256": _sha256_of_lines(map(str, checked.bytes)),
            "content_sha256": checked.content_sha256,
            "images": len(files),
        }
        self._decoder = Decoder(lambda index: path / files[index], self.labels, image_size, mode, options)

    def name_of(self, index: int) -> str:
        """Return how an image is called in messages."""
        return printable(self._names[index])


def _sha256_of_lines(lines: Iterable[str]) -> str:
    return hashlib.sha256(os.fsencode("\n".join(lines))).hexdigest()


def _remarks_on_classes(path: Path, listing: Listing, options: DataConfig) -> list[str]:
    """Return a remark if classes are file names, or if the only class has subfolders that may be meant as classes."""
    if options.class_from == "name":
        return ["classes are the names before the first underscore (data.class_from)"] if listing.class_names else []
    if len(listing.class_names) != 1:
        return []
    below = Counter(parts[1] if len(parts := Path(file).parts) > 2 else "" for file in listing.files)
    if len(below) < 2 or "" in below:
        return []
    only = path / listing.class_names[0]
    return [f"subfolders of the only class are not classes: {shorten(below)}; use --data {only} to make them classes"]
