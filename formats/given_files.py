"""Read images, masks and arrays that come from outside: PNG, WebP, JPEG, npy, npz. Nothing in them is trusted.

Headers are checked before anything is decoded, so that memory is bounded by the shape that is wanted, or by
`MAX_PICTURE_PIXELS` where a picture may be fitted to it.
"""

from __future__ import annotations

import io
import math
from typing import IO
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import numpy as np
import numpy.typing as npt

from formats.given_pictures import FORMATS, WANTS_ALPHA, has_alpha, read_alpha, read_picture
from formats.given_shapes import Array, Fit, GivenFileError, Shape, batched, check_shape, fitted

MAX_MEMBERS = 16
MAX_ITEM_BYTES = 8
"""Of a number in an array."""
MAX_ARRAY_BYTES = 64 << 20
"""Memory of an array that is fitted, unless the images that are wanted take more as float64."""
"""Most files in an npz, of which one is read."""


def read_images(content: bytes, shape: Shape, *, most: int, fit: Fit | None = None, drop_alpha: bool = False) -> Array:
    """Read one or several images.

    Args:
        content: of the file. A picture is one image; an npy or npz holds [H, W, C], [H, W] if C is 1, or [n, H, W, C].
        shape: the wanted one.
        most: images in the file, at most.
        fit: changes images of another shape: `crop` enlarges or shrinks them to cover the shape and takes the middle,
            `pad` to fit into it and repeats the border, `resize` changes the proportions. None: they are refused.
        drop_alpha: reads the colours of transparent pixels too, which are refused otherwise.

    Returns:
        uint8 or uint16 [n, H, W, C], where 0 is the lowest value and 255 or 65535 is the highest; or float32, in the
        units of the data. Pictures and uint8 arrays are the former, all other arrays the latter.

    Raises:
        GivenFileError: the file cannot be read, or has another shape.
    """
    if _is_array(content):
        return fitted(_as_values(_read_array(content, shape, most, fit)), shape, fit)
    return fitted(read_picture(content, shape, fit, drop_alpha=drop_alpha)[None], shape, fit)


def images_of(array: Array, shape: Shape, *, most: int, fit: Fit | None = None) -> Array:
    """Return an array that was sent as one, as `read_images` returns those of files."""
    check_shape(array.shape, shape, most, fit)
    return fitted(_as_values(batched(array, shape)), shape, fit)


def read_values(content: bytes, shape: Shape, *, most: int) -> npt.NDArray[np.float32]:
    """Read float arrays, [H, W, C] or [n, H, W, C], from an npy or npz; return float32 [n, H, W, C].

    Raises:
        GivenFileError: the file cannot be read, or has another shape.
    """
    if not _is_array(content):
        raise GivenFileError("must be an npy or npz file of floating-point numbers")
    return _float_values(_read_array(content, shape, most, None))


def values_of(array: Array, shape: Shape, *, most: int) -> npt.NDArray[np.float32]:
    """Return an array that was sent as one, as `read_values` returns those of files."""
    check_shape(array.shape, shape, most)
    return _float_values(batched(array, shape))


def read_masks(content: bytes, shape: Shape, *, most: int, fit: Fit | None = None) -> npt.NDArray[np.float32]:
    """Read masks: white or 1 where an image is made, black or 0 where it is kept.

    Args:
        content: as for `read_images`; of a picture, the grey level counts. Arrays: bool; numbers in 0..1; or uint8 in
            0..255, which may also hold 0 and 1 only.
        shape: of the images; the channels are ignored.
        most: masks in the file, at most.
        fit: as for `read_images`; pixels are repeated or left out, not averaged.

    Returns:
        float32 [n, H, W], in 0..1.

    Raises:
        GivenFileError: the file cannot be read, or has another shape.
    """
    single = (*shape[:2], 1)
    if _is_array(content):
        return _mask_levels(fitted(_read_array(content, single, most, fit), single, fit, nearest=True))
    grey = fitted(read_picture(content, single, fit, grey=True)[None], single, fit, nearest=True)
    if grey.dtype == np.uint16:  # of a picture of 16 bits; numbers in an array are levels themselves
        return grey[..., 0].astype(np.float32) / np.float32(65535)
    return _mask_levels(grey)


def masks_of(array: Array, shape: Shape, *, most: int, fit: Fit | None = None) -> npt.NDArray[np.float32]:
    """Return an array that was sent as one, as `read_masks` returns those of files."""
    single = (*shape[:2], 1)
    check_shape(array.shape, single, most, fit)
    return _mask_levels(fitted(batched(array, single), single, fit, nearest=True))


def _mask_levels(masks: Array) -> npt.NDArray[np.float32]:
    levels = masks[..., 0].astype(np.float32)
    if masks.dtype == np.uint8 and masks.max(initial=0) > 1:
        levels /= 255
    if not ((levels >= 0) & (levels <= 1)).all():
        raise GivenFileError("must hold values in 0..1 (1: made, 0: kept)")
    return levels


def read_transparency(content: bytes, shape: Shape, *, fit: Fit | None = None) -> npt.NDArray[np.float32]:
    """Read a mask in OpenAI's convention: transparent pixels of a picture are made, opaque ones are kept.

    Args:
        content: of the file.
        shape: of the images; the channels are ignored.
        fit: as for `read_masks`.

    Returns:
        float32 [1, H, W], in 0..1.

    Raises:
        GivenFileError: the file is not a picture with an alpha channel, or has another shape.
    """
    if _is_array(content):
        raise GivenFileError(WANTS_ALPHA)
    alpha = read_alpha(content, shape, fit)[None]
    opaque = fitted(alpha, (*shape[:2], 1), fit, nearest=True)[..., 0].astype(np.float32)
    return np.float32(1) - opaque / np.float32(np.iinfo(alpha.dtype).max)


def may_be_transparent(content: bytes) -> bool:
    """Return whether a file is a picture whose header has an alpha channel; nothing is decoded.

    Raises:
        GivenFileError: the file cannot be read.
    """
    return not _is_array(content) and has_alpha(content)


def _is_array(content: bytes) -> bool:
    return content.startswith((b"\x93NUMPY", b"PK"))


def _read_array(content: bytes, shape: Shape, most: int, fit: Fit | None) -> Array:
    try:
        if content.startswith(b"PK"):
            return batched(_from_npz(content, shape, most, fit), shape)
        return batched(_from_npy(io.BytesIO(content), shape, most, fit), shape)
    except GivenFileError:
        raise
    except Exception as error:  # zipfile and numpy raise many kinds for damaged files
        raise GivenFileError(f"is damaged, or not {FORMATS}") from error


def _from_npz(content: bytes, shape: Shape, most: int, fit: Fit | None) -> Array:
    if content.count(b"PK\x01\x02") > MAX_MEMBERS:
        raise GivenFileError(f"must hold at most {MAX_MEMBERS} arrays with names")
    with ZipFile(io.BytesIO(content)) as archive:
        members = {info.filename: info for info in archive.infolist()}
        info = members.get("arr_0.npy") or (next(iter(members.values())) if len(members) == 1 else None)
        if info is None:
            raise GivenFileError("must hold an array named arr_0, or one array only")
        if info.flag_bits & 1 or info.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
            raise GivenFileError("must be an npz as numpy writes it: not encrypted, stored or deflated")
        with archive.open(info) as file:
            return _from_npy(file, shape, most, fit)


def _from_npy(file: IO[bytes], shape: Shape, most: int, fit: Fit | None) -> Array:
    # Later versions are for records with many fields, and may announce headers of 4 GiB, which numpy would read
    if np.lib.format.read_magic(file) != (1, 0):
        raise GivenFileError("must be an npy file of version 1, as numpy writes numbers")
    found, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.kind not in "biuf" or dtype.itemsize > MAX_ITEM_BYTES:
        raise GivenFileError(f"must hold numbers; got {dtype}")  # objects would need pickle
    check_shape(found, shape, most, fit)
    size = math.prod(found) * dtype.itemsize
    if size > max(MAX_ARRAY_BYTES, most * math.prod(shape) * MAX_ITEM_BYTES):  # only with `fit`
        raise GivenFileError(f"must take at most {MAX_ARRAY_BYTES} bytes of memory to be fitted; takes {size}")
    content = file.read(size + 1)
    if len(content) != size:
        raise GivenFileError(f"must hold {size} bytes behind the header, as its shape and type say")
    flat: Array = np.frombuffer(content, dtype)
    return flat.reshape(found[::-1]).T if fortran_order else flat.reshape(found)


def _as_values(array: Array) -> Array:
    return array if array.dtype == np.uint8 else _checked_values(array)


def _float_values(array: Array) -> npt.NDArray[np.float32]:
    if array.dtype.kind != "f":
        raise GivenFileError(f"must hold floating-point numbers; got {array.dtype}")
    return _checked_values(array)


def _checked_values(array: Array) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):
        values: npt.NDArray[np.float32] = array.astype(np.float32)
    if not np.isfinite(values).all():
        raise GivenFileError("must hold finite numbers only, in the range of float32")
    return values
