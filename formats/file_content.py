"""Recognise files with wrong content: Git LFS pointers, web pages, empty files, truncated downloads."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

HEAD_BYTES = 512
LONGEST_QUOTE = 60
MAX_HEADER_BYTES = 100 << 20
"""Longest header of a safetensors file; the library's own limit."""

_ARCHIVES = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"7z\xbc\xaf": "7-Zip",
    b"Rar!": "RAR",
    b"\x28\xb5\x2f\xfd": "Zstandard",
}


def describe_wrong_content(path: Path, *, may_be_text: bool = False) -> str | None:
    """Describe content that cannot be weights, a graph or a configuration.

    Args:
        path: the file.
        may_be_text: whether a short text may be valid content.

    Returns:
        The predicate of a sentence about the file, such as "is empty"; None if no wrong content was recognised.

    Raises:
        OSError: the file cannot be read.
    """
    if path.exists() and not path.is_file():
        return "is not a regular file"  # opening a named pipe would block until it has a writer
    with path.open("rb") as file:
        head, size = file.read(HEAD_BYTES), os.fstat(file.fileno()).st_size
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head:
        return "is empty"
    if text.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer: run git lfs pull in its repository to get the file"
    if text[:1] == b"<":
        return "is a web page (HTML or XML), perhaps an error of the download: open it to see why, and download again"
    for magic, name in _ARCHIVES.items():
        if head.startswith(magic):
            return f"is packed ({name}): unpack it first"
    if head[257:262] == b"ustar":
        return "is packed (tar): unpack it first"
    if head.startswith(b"PK\x03\x04"):
        return _wrong_zip(path, size)
    if (wanted := safetensors_size(path)) is not None:
        return None if size == wanted else f"is truncated or damaged: it has {size} bytes instead of {wanted}"
    if size < HEAD_BYTES and not may_be_text and _is_text(head):
        quote = " ".join(head.decode("utf-8", "replace").split())[:LONGEST_QUOTE]
        return f"holds only a short text: {quote!r}"
    return None


def safetensors_size(path: Path) -> int | None:
    """Return the size in bytes that a safetensors file must have according to its header; None for other files."""
    with path.open("rb") as file:
        start = file.read(9)
        length = int.from_bytes(start[:8], "little")
        if len(start) < 9 or start[8:] != b"{" or length > MAX_HEADER_BYTES:
            return None
        header = b"{" + file.read(length - 1)
    if len(header) < length:
        return 8 + length  # a lower bound; the header is cut off
    try:
        entries: dict[str, Any] = json.loads(header)
        ends = [int(entry["data_offsets"][1]) for name, entry in entries.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return None
    return 8 + length + max(ends, default=0)


def damaged_part(path: Path) -> str | None:
    """Return the first part of a zip archive whose checksum is wrong, or None; `torch.load` does not check them.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError) as error:
        return str(error)


def _wrong_zip(path: Path, size: int) -> str | None:
    if not zipfile.is_zipfile(path):
        return f"is truncated: its end is missing after {size} bytes; download it again"
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return "is a damaged zip archive; download it again"
    if any(name.endswith(("/data.pkl", ".npy")) for name in names):  # written by torch.save, or numpy's npz
        return None
    return f"is a zip archive of {len(names)} files ({', '.join(names[:2])}, ...): unpack it first"


def _is_text(head: bytes) -> bool:
    return head.isascii() and all(byte >= 32 or byte in b"\t\r\n\f" for byte in head)
