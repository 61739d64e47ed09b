"""Arrays in npy and npz files that are read in parts, so that they may be larger than the memory."""

from __future__ import annotations

import os
import struct
import weakref
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from trainer.data.cache import write_in
from trainer.data.dataset import DataError

IN_MEMORY_BYTES = 64 << 20
"""Arrays up to this size are loaded into memory."""
PART_BYTES = 16 << 20
"""Size of the parts in which larger arrays are read, checked and unpacked."""
BAR_DELAY_SECONDS = 2
LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Begin of a member of a zip file: signature, and the lengths of its name and of its extra field."""
Array = npt.NDArray[Any]


class Rows(Protocol):
    """An array whose rows, along the first axis, are read on access."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def rows(self, start: int, stop: int) -> Array:
        """Return rows start..stop-1."""
        ...


class MemoryRows:
    """Rows of an array in memory."""

    def __init__(self, array: Array) -> None:
        self._array = array
        self.shape = array.shape
        self.dtype = array.dtype

    def rows(self, start: int, stop: int) -> Array:
        """Return rows start..stop-1."""
        return self._array[start:stop]


class FileRows:
    """Rows of an array in C order in a file.

    They are read, not mapped: a page of a mapped file counts as memory of the process after it was touched, and a file
    that is shortened meanwhile would end the process.
    """

    def __init__(self, path: Path, begin: int, crc: int | None = None) -> None:
        """Read the header of the array.

        Args:
            path: of the file.
            begin: where the array's header begins in it.
            crc: CRC-32 of header and array; None: not known.

        Raises:
            ValueError: the array is not one of numbers in C order.
        """
        self._path = path
        self._crc = crc
        with path.open("rb") as file:
            file.seek(begin)
            version = np.lib.format.read_magic(file)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            if version not in read_header:
                raise ValueError(f"its header has version {version}")
            self.shape, fortran, self.dtype = read_header[version](file)
            self._offset = file.tell()
            file.seek(begin)
            self._header = file.read(self._offset - begin)
        if self.dtype.hasobject:
            raise ValueError("allow_pickle")
        if fortran and len(self.shape) > 1:
            raise ValueError("it is in Fortran order; save np.ascontiguousarray(images)")
        self._row_bytes = self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        if os.fstat(self._file).st_size < self._offset + self.shape[0] * self._row_bytes:
            raise ValueError("it is truncated")

    def rows(self, start: int, stop: int) -> Array:
        """Return rows start..stop-1.

        Raises:
            DataError: the file was shortened.
        """
        wanted = (stop - start) * self._row_bytes
        content = bytearray(wanted)
        view, position = memoryview(content), self._offset + start * self._row_bytes
        while view:
            count = os.preadv(self._file, [view], position)
            if count == 0:
                raise DataError(f"{self._path} was shortened while it was in use")
            view, position = view[count:], position + count
        return np.frombuffer(content, self.dtype).reshape(stop - start, *self.shape[1:])

    def check_crc(self, parts: Iterator[Array]) -> Iterator[Array]:
        """Pass on the parts of the array, and check at their end that they are those that were saved.

        Raises:
            DataError: the array is damaged.
        """
        crc = zlib.crc32(self._header)
        for part in parts:
            crc = zlib.crc32(part.data, crc)
            yield part
        if self._crc is not None and crc != self._crc:
            raise DataError(f"{self._path} is damaged: the checksum of its images is wrong")


def parts_of(array: Rows, title: str) -> Iterator[Array]:
    """Read an array from begin to end in parts, with a progress bar if that takes long."""
    row_bytes = array.dtype.itemsize * int(np.prod(array.shape[1:], dtype=np.int64))
    step = max(1, PART_BYTES // max(1, row_bytes))

    def parts() -> Iterator[Array]:
        with tqdm(total=array.shape[0], desc=title, unit="img", delay=BAR_DELAY_SECONDS, leave=False) as bar:
            for start in range(0, array.shape[0], step):
                part = array.rows(start, min(start + step, array.shape[0]))
                yield part
                bar.update(len(part))

    return array.check_crc(parts()) if isinstance(array, FileRows) else parts()


def open_npy(path: Path) -> Rows:
    """Open the array of an npy file.

    Raises:
        ValueError, OSError: it cannot be read.
    """
    if path.stat().st_size <= IN_MEMORY_BYTES:
        with path.open("rb") as file:
            return MemoryRows(np.lib.format.read_array(file, allow_pickle=False))
    return FileRows(path, 0)


def open_member(path: Path, archive: zipfile.ZipFile, name: str, sha256: str, cache: Path) -> tuple[Rows, Path | None]:
    """Open an array of an npz file.

    Args:
        path: of the npz file.
        archive: the same file, open.
        name: of the array.
        sha256: digest of the file.
        cache: folder for an array that has to be unpacked.

    Returns:
        The array, and the file into which it was unpacked; None: it was not.

    Raises:
        ValueError, OSError, zipfile.BadZipFile: it cannot be read, or not unpacked.
    """
    member = archive.getinfo(f"{name}.npy")
    if member.file_size <= IN_MEMORY_BYTES:
        with archive.open(member) as file:
            return MemoryRows(np.lib.format.read_array(file, allow_pickle=False)), None
    if member.compress_type == zipfile.ZIP_STORED:
        with path.open("rb") as file:
            file.seek(member.header_offset)
            signature, name_bytes, extra_bytes = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
        if signature != b"PK\x03\x04":
            raise zipfile.BadZipFile("a member does not begin where the table of contents says")
        return FileRows(path, member.header_offset + LOCAL_HEADER.size + name_bytes + extra_bytes, member.CRC), None
    unpacked = cache / f"{name}-{sha256[:16]}.npy"
    if not unpacked.is_file() or unpacked.stat().st_size != member.file_size:
        write_in(cache, unpacked.name, lambda temporary: _unpack(archive, member, temporary))
    return FileRows(unpacked, 0), unpacked


def _unpack(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    with (
        archive.open(member) as packed,  # checks the CRC at its end
        path.open("wb") as file,
        tqdm(total=member.file_size, desc="unpacking images", unit="B", unit_scale=True, leave=False) as bar,
    ):
        while part := packed.read(PART_BYTES):
            file.write(part)
            bar.update(len(part))
