"""What is known about each file of a folder, and the index file that keeps it for the next start.

The index of a folder is valid per file: a file whose path, size and modification time are unchanged is not read again.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
from PIL import __version__ as pillow_version
from tqdm import tqdm

from trainer.data.cache import write_in
from trainer.data.image_file import Header, Mode, Trait
from trainer.data.options import DataConfig

BAR_DELAY_SECONDS = 2
VERSION = 2
"""Changes with the meaning of the content."""
TRAITS: tuple[Trait, ...] = get_args(Trait)
Array = npt.NDArray[Any]


@dataclass
class Index:
    """Facts about files, one entry per file in each array."""

    files: Sequence[str]
    """Paths below the folder."""
    sizes: Array
    """int64, bytes; -1: the file has no status."""
    modified: Array
    """int64, nanoseconds."""
    widths: Array
    """int32; 0: the header was not read yet, or cannot be read."""
    heights: Array
    traits: Array
    """uint16, a bit per entry of TRAITS."""
    digests: Array
    """uint64, of the content."""
    decoded: Array
    """bool: the whole file was decoded without an error."""

    @classmethod
    def of_files(cls, folder: Path, files: Sequence[str]) -> Index:
        """Return an index that contains the size and modification time of each file."""
        count = len(files)
        sizes, modified = np.full(count, -1, np.int64), np.zeros(count, np.int64)
        prefix = f"{folder}{os.sep}"
        bar = tqdm(files, desc="comparing files with the index", unit="file", delay=BAR_DELAY_SECONDS, leave=False)
        for number, file in enumerate(bar):
            try:
                status = os.stat(prefix + file)  # noqa: PTH116  # a Path per file takes as long as the call
            except OSError:
                continue
            sizes[number], modified[number] = status.st_size, status.st_mtime_ns
        return cls(
            files,
            sizes,
            modified,
            widths=np.zeros(count, np.int32),
            heights=np.zeros(count, np.int32),
            traits=np.zeros(count, np.uint16),
            digests=np.zeros(count, np.uint64),
            decoded=np.zeros(count, np.bool_),
        )

    def set_header(self, number: int, header: Header) -> None:
        """Record the header of a file."""
        self.widths[number], self.heights[number] = header.width, header.height
        self.traits[number] = sum(1 << TRAITS.index(trait) for trait in header.traits)
        self.digests[number] = header.digest

    def having(self, trait: Trait) -> Array:
        """Return the numbers of the files that have a trait."""
        return np.flatnonzero(self.traits >> TRAITS.index(trait) & 1)

    def kinds(self, kept: Array) -> list[tuple[int, int, tuple[Trait, ...], int]]:
        """Return width, height, traits and number of files of each kind, in the order of their first files.

        Args:
            kept: numbers of the files to count.
        """
        keys = np.stack([self.widths[kept], self.heights[kept], self.traits[kept]], axis=1)
        if len(keys) == 0:
            return []
        wide = np.ascontiguousarray(keys.astype(np.int64)).view([("", np.int64)] * 3)[:, 0]
        _, first, counts = np.unique(wide, return_index=True, return_counts=True)
        return [
            (int(keys[at, 0]), int(keys[at, 1]), _traits(int(keys[at, 2])), count)
            for at, count in sorted(zip(first.tolist(), counts.tolist(), strict=True))
        ]

    def recall(self, path: Path) -> None:
        """Copy what an index file knows about the files that have not changed since it was written."""
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
                names = os.fsdecode(saved["names"].tobytes()).split("\0")
                known = {name: saved[name] for name in ("sizes", "modified", *_COPIED)}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # there is none, or it is damaged
            return
        rows = np.arange(len(names))
        if names != self.files:
            position = {name: number for number, name in enumerate(names)}
            rows = np.array([position.get(file, -1) for file in self.files])
        same = (rows >= 0) & (known["sizes"][rows] == self.sizes) & (known["modified"][rows] == self.modified)
        for name in _COPIED:
            getattr(self, name)[same] = known[name][rows[same]]

    def save(self, path: Path) -> None:
        """Write the index file.

        Raises:
            OSError: it cannot be written.
        """
        names = np.frombuffer(os.fsencode("\0".join(self.files)), np.uint8)
        arrays = {name: getattr(self, name) for name in ("sizes", "modified", *_COPIED)}

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.savez(file, names=names, **arrays)

        write_in(path.parent, path.name, write)


_COPIED = ("widths", "heights", "traits", "digests", "decoded")


def index_name(folder: Path, mode: Mode, options: DataConfig) -> str:
    """Return the name of the index file of a folder: it depends on everything that the checks depend on."""
    parts = (VERSION, pillow_version, folder.resolve(), mode, options.value_range is None)
    return f"index-{hashlib.sha256(os.fsencode(chr(0).join(map(str, parts)))).hexdigest()[:16]}.npz"


def _traits(bits: int) -> tuple[Trait, ...]:
    return tuple(trait for number, trait in enumerate(TRAITS) if bits >> number & 1)
