"""Read images, masks and arrays that come from outside: PNG, WebP, JPEG, npy, npz. Nothing in them is trusted.

Headers are checked before anything is decoded, so that memory is bounded by the shape that is wanted, or by
`MAX_PICTURE_PIXELS` where a picture may be fitted to it.
"""

from __future__ import annotations

import io
import math
from typing import IO, Any, Literal
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from diffusion.quoting import alternatives

Fit = Literal["crop", "pad", "resize"]
Shape = tuple[int, int, int]
"""Height, width, channels."""
Array = npt.NDArray[Any]

MAX_PICTURE_PIXELS = 1 << 24
"""Most pixels of a picture that is fitted to a model's shape."""
MAX_MEMBERS = 16
"""Most files in an npz, of which one is read."""
FITS: tuple[Fit, ...] = ("crop", "pad", "resize")
_PICTURES = ("PNG", "WEBP", "JPEG")
_FORMATS = "a PNG, WebP, JPEG, npy or npz file"
_WANTS_ALPHA = "must be a picture with an alpha channel: transparent where the image is made"
_DEEP_COLOUR = ("RGB;16", "RGBA;16", "LA;16")


class GivenFileError(ValueError):
    """A file cannot be read, or is not what is wanted; the message states the rule."""


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
        return _fitted(_as_values(_read_array(content, shape, most, fit)), shape, fit)
    return _fitted(_read_picture(content, shape, fit, drop_alpha=drop_alpha)[None], shape, fit)


def images_of(array: Array, shape: Shape, *, most: int, fit: Fit | None = None) -> Array:
    """Return an array that was sent as one, as `read_images` returns those of files."""
    check_shape(array.shape, shape, most, fit)
    return _fitted(_as_values(batched(array, shape)), shape, fit)


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
        masks = _read_array(content, single, most, fit)
    else:
        masks = _read_picture(content, single, fit, grey=True)[None]
    return _mask_levels(_fitted(masks, single, fit, nearest=True))


def masks_of(array: Array, shape: Shape, *, most: int, fit: Fit | None = None) -> npt.NDArray[np.float32]:
    """Return an array that was sent as one, as `read_masks` returns those of files."""
    single = (*shape[:2], 1)
    check_shape(array.shape, single, most, fit)
    return _mask_levels(_fitted(batched(array, single), single, fit, nearest=True))


def _mask_levels(masks: Array) -> npt.NDArray[np.float32]:
    levels = masks[..., 0].astype(np.float32)
    if masks.dtype == np.uint16:
        levels /= 65535
    elif masks.dtype == np.uint8 and masks.max(initial=0) > 1:
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
        raise GivenFileError(_WANTS_ALPHA)
    with _Picture(content) as image:
        _check_picture(image, (*shape[:2], 4), fit)
        if not image.has_transparency_data:
            raise GivenFileError(_WANTS_ALPHA)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        alpha = np.asarray(image.convert("RGBA"))[None, :, :, 3:]
    opaque = _fitted(alpha, (*shape[:2], 1), fit, nearest=True)[..., 0].astype(np.float32)
    return np.float32(1) - opaque / np.float32(255)


def may_be_transparent(content: bytes) -> bool:
    """Return whether a file is a picture whose header has an alpha channel; nothing is decoded.

    Raises:
        GivenFileError: the file cannot be read.
    """
    if _is_array(content):
        return False
    with _Picture(content) as image:
        return bool(image.has_transparency_data)


def check_shape(shape: tuple[int, ...], wanted: Shape, most: int, fit: Fit | None = None) -> None:
    """Check an array's shape: [H, W, C], [n, H, W, C], or either without C if that is 1.

    Raises:
        GivenFileError: it is another one; names the shapes that are wanted.
    """
    images = _with_all_axes(shape, wanted)
    if images is None or (fit is None and images[1:] != wanted) or images[3] != wanted[2] or 0 in images:
        cure = f"; or set fit to {alternatives(FITS)}" if images is not None and images[3] == wanted[2] else ""
        raise GivenFileError(
            f"must have shape {[*wanted]} (height, width, channels), or {['n', *wanted]} for one per image"
            f"{cure}; got {[*shape]}".replace("'", "")
        )
    if images[0] > most:
        raise GivenFileError(f"must hold at most {most} arrays; got {images[0]}")
    if images[0] * images[1] * images[2] > max(MAX_PICTURE_PIXELS, most * wanted[0] * wanted[1]):
        raise GivenFileError(f"must have at most {MAX_PICTURE_PIXELS} pixels; got shape {[*shape]}")


def batched(array: Array, wanted: Shape) -> Array:
    """Return an array that `check_shape` accepts as [n, H, W, C]."""
    return array.reshape(_with_all_axes(array.shape, wanted) or array.shape)


def _with_all_axes(shape: tuple[int, ...], wanted: Shape) -> tuple[int, int, int, int] | None:
    """Return a shape as n, H, W, C; None if it cannot be one."""
    if len(shape) == 4:
        return shape[0], shape[1], shape[2], shape[3]
    if len(shape) == 3 and (wanted[2] != 1 or shape[2] == 1):
        return 1, shape[0], shape[1], shape[2]
    if len(shape) == 3:
        return shape[0], shape[1], shape[2], 1
    return (1, *shape, 1) if len(shape) == 2 and wanted[2] == 1 else None


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
        raise GivenFileError(f"is damaged, or not {_FORMATS}") from error


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
    version = np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read_header:
        raise GivenFileError("must be an npy file of version 1 or 2")
    found, fortran_order, dtype = read_header[version](file)
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise GivenFileError(f"must hold numbers; got {dtype}")  # objects would need pickle
    check_shape(found, shape, most, fit)
    size = math.prod(found) * dtype.itemsize
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


class _Picture:
    """Opens a picture; converts every exception until it is closed."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def __enter__(self) -> Image.Image:
        try:
            self._image = Image.open(io.BytesIO(self._content), formats=_PICTURES)
        except Exception as error:
            raise _unreadable(error) from error
        return self._image

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._image.close()
        # Decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error and more
        if isinstance(error, Exception) and not isinstance(error, GivenFileError):
            raise _unreadable(error) from error


def _unreadable(error: Exception) -> GivenFileError:
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return GivenFileError(f"must have at most {MAX_PICTURE_PIXELS} pixels")
    return GivenFileError(f"is damaged, truncated, or not {_FORMATS}")


def _read_picture(
    content: bytes, shape: Shape, fit: Fit | None, *, grey: bool = False, drop_alpha: bool = False
) -> Array:
    """Return a picture, uint8 or uint16 [H, W, C]; `grey` makes it grey even without `fit`."""
    with _Picture(content) as image:
        _check_picture(image, shape, fit)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        if shape[2] != 4 and image.has_transparency_data:
            if not drop_alpha and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
                raise GivenFileError("must have no transparent pixels")
            image = image.convert("RGB" if shape[2] == 3 or image.mode not in ("LA", "La") else "L")
        if image.mode.startswith("I;16"):
            deep = np.asarray(image).astype(np.uint16)[..., None]
            return np.repeat(deep, shape[2], axis=2) if shape[2] == 3 else deep
        mode = {1: "L", 3: "RGB", 4: "RGBA"}[shape[2]]
        if mode == "L" and image.mode not in ("1", "L"):
            colours = np.asarray(image.convert("RGB"))
            if (colours == colours[..., :1]).all():  # a WebP always has three channels
                return colours[..., :1]
            if fit is None and not grey:
                raise GivenFileError(f"must be grey, as the model's images; or set fit to {alternatives(FITS)}")
        pixels = np.asarray(image.convert(mode))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _check_picture(image: Image.Image, shape: Shape, fit: Fit | None) -> None:
    """Check what the header says, before anything is decoded."""
    if shape[2] not in (1, 3, 4):
        raise GivenFileError(f"must be an npy or npz: pictures have 1, 3 or 4 channels, the model's images {shape[2]}")
    if image.format != "JPEG" and getattr(image, "is_animated", False):
        raise GivenFileError("must not be animated")
    turned = image.getexif().get(274, 1) in (5, 6, 7, 8) if image.format != "PNG" or "exif" in image.info else False
    width, height = image.size[::-1] if turned else image.size
    if fit is None and (height, width) != shape[:2]:
        raise GivenFileError(
            f"must be {shape[1]} pixels wide and {shape[0]} high; or set fit to {alternatives(FITS)}; "
            f"got {width} x {height}"
        )
    if width * height > max(MAX_PICTURE_PIXELS, shape[0] * shape[1]):
        raise GivenFileError(f"must have at most {MAX_PICTURE_PIXELS} pixels; got {width} x {height}")
    tile = getattr(image, "tile", None)
    raw_mode = str(tile[0].args) if image.format == "PNG" and tile else ""
    if raw_mode.startswith(_DEEP_COLOUR):
        raise GivenFileError("of 16 bits must be grey, without an alpha channel; send other 16-bit images as npy")
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "I;16", "I;16B"):
        raise GivenFileError(f"must be grey or RGB; got colour mode {image.mode}")


def _fitted(arrays: Array, shape: Shape, fit: Fit | None, *, nearest: bool = False) -> Array:
    """Fit arrays [n, H, W, C] to a shape."""
    if fit is None or arrays.shape[1:] == shape:
        return arrays
    return np.stack([_fitted_one(array, shape, fit, nearest=nearest) for array in arrays])


def _fitted_one(array: Array, shape: Shape, fit: Fit, *, nearest: bool) -> Array:
    (height, width), (rows, columns) = shape[:2], array.shape[:2]
    if fit == "resize":
        return _resized(array, height, width, nearest=nearest)
    choose = max if fit == "crop" else min
    scale = choose(height / rows, width / columns)
    scaled = _resized(array, max(1, round(rows * scale)), max(1, round(columns * scale)), nearest=nearest)
    above, left = (height - scaled.shape[0]) // 2, (width - scaled.shape[1]) // 2
    if fit == "crop":
        return scaled[-above : height - above, -left : width - left]
    below, right = height - scaled.shape[0] - above, width - scaled.shape[1] - left
    return np.pad(scaled, ((above, below), (left, right), (0, 0)), mode="edge")


def _resized(array: Array, height: int, width: int, *, nearest: bool) -> Array:
    filtering = Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR
    channels = [
        np.asarray(Image.fromarray(array[..., k].astype(np.float32)).resize((width, height), filtering))
        for k in range(array.shape[2])
    ]
    resized = np.stack(channels, axis=-1)
    return resized if array.dtype.kind == "f" else np.rint(resized).astype(array.dtype)
