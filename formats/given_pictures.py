"""Pixels of a picture that comes from outside: PNG, WebP, JPEG. Nothing in it is trusted.

The header is checked before anything is decoded.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

from diffusion.quoting import alternatives
from formats.given_shapes import FITS, MAX_PICTURE_PIXELS, Array, Fit, GivenFileError, Shape
from formats.picture_data import HAS_ALL_DATA

FORMATS = "a PNG, WebP, JPEG, npy or npz file"
WANTS_ALPHA = "must be a picture with an alpha channel: transparent where the image is made"
_PICTURES = ("PNG", "WEBP", "JPEG")
_JPEGS = ("JPEG", "MPO")
"""An MPO is a JPEG with more images behind it, as phones write for depth or brightness: it is its first image."""
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "I;16", "I;16B")
_SIXTEEN_BITS = ("I;16B", "LA;16B", "RGB;16B", "RGBA;16B")
"""Pillow's raw modes of PNG files with 16 bits per channel."""
_OPAQUE = 65535
PngImagePlugin.MAX_TEXT_MEMORY = 4 << 20  # characters of all texts of a file; Pillow takes 64 million
_GREY_WEIGHTS = np.array([19595, 38470, 7471], np.uint32)
"""Of red, green and blue, of 65536 (ITU-R BT.601): those of Pillow."""


def read_picture(
    content: bytes, shape: Shape, fit: Fit | None, *, grey: bool = False, drop_alpha: bool = False
) -> Array:
    """Read the pixels of a picture.

    Args:
        content: of the file.
        shape: the wanted one.
        fit: whether another shape is allowed, because the caller changes it.
        grey: makes it grey even without `fit`.
        drop_alpha: reads the colours of transparent pixels too, which are refused otherwise.

    Returns:
        uint8 or uint16 [height, width, C], of the picture's own size.

    Raises:
        GivenFileError: the file cannot be read, or is not what is wanted.
    """
    with _Picture(content) as image:
        _check_picture(image, content, shape, fit)
        pixels: Array
        if (deep := _deep_pixels(image, content)) is not None:
            pixels = _deep_channels(deep, shape[2], drop_alpha=drop_alpha, to_grey=grey or fit is not None)
        else:
            pixels = _eight_bit_pixels(image, shape[2], drop_alpha=drop_alpha, to_grey=grey or fit is not None)
    _check_size(pixels.shape[1], pixels.shape[0], shape, fit)  # what stands behind the pixels can turn them
    return pixels


def read_alpha(content: bytes, shape: Shape, fit: Fit | None) -> Array:
    """Read the alpha channel of a picture, uint8 or uint16 [height, width, 1].

    Args:
        content: of the file.
        shape: the wanted one; the channels are ignored.
        fit: as for `read_picture`.

    Raises:
        GivenFileError: the file cannot be read, has no alpha channel, or has another shape.
    """
    with _Picture(content) as image:
        _check_picture(image, content, (*shape[:2], 4), fit)
        if not image.has_transparency_data:
            raise GivenFileError(WANTS_ALPHA)
        if (deep := _deep_pixels(image, content)) is not None:
            alpha: Array = deep[..., -1:]
        else:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            alpha = np.asarray(image.convert("RGBA"))[..., 3:]
    _check_size(alpha.shape[1], alpha.shape[0], shape, fit)
    return alpha


def has_alpha(content: bytes) -> bool:
    """Return whether a picture's header has an alpha channel; nothing is decoded.

    Raises:
        GivenFileError: the file cannot be read.
    """
    with _Picture(content) as image:
        return bool(image.has_transparency_data)


class _Picture:
    """Opens a picture; converts every exception until it is closed."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def __enter__(self) -> ImageFile.ImageFile:
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
    return GivenFileError(f"is damaged, truncated, or not {FORMATS}")


def _check_picture(image: ImageFile.ImageFile, content: bytes, shape: Shape, fit: Fit | None) -> None:
    """Check what the header says, and that a PNG or JPEG has the data for it, before all pixels are decoded."""
    if shape[2] not in (1, 3, 4):
        raise GivenFileError(f"must be an npy or npz: pictures have 1, 3 or 4 channels, the model's images {shape[2]}")
    if image.format not in _JPEGS and getattr(image, "is_animated", False):
        raise GivenFileError("must not be animated")
    turned = image.getexif().get(274, 1) in (5, 6, 7, 8) if image.format != "PNG" or "exif" in image.info else False
    width, height = image.size[::-1] if turned else image.size
    _check_size(width, height, shape, fit)
    if width * height > max(MAX_PICTURE_PIXELS, shape[0] * shape[1]):
        raise GivenFileError(f"must have at most {MAX_PICTURE_PIXELS} pixels; got {width} x {height}")
    if image.mode not in _MODES:
        raise GivenFileError(f"must be grey or RGB; got colour mode {image.mode}")
    has_all_data = HAS_ALL_DATA.get(image.format or "")
    if has_all_data is not None and not has_all_data(content):
        raise GivenFileError(f"is damaged or truncated: its header announces {image.width} x {image.height} pixels")


def _check_size(width: int, height: int, shape: Shape, fit: Fit | None) -> None:
    if fit is None and (height, width) != shape[:2]:
        raise GivenFileError(
            f"must be {shape[1]} pixels wide and {shape[0]} high; or set fit to {alternatives(FITS)}; "
            f"got {width} x {height}"
        )


def _refuse_transparent(alpha: npt.NDArray[Any], opaque: int) -> None:
    if alpha.min() < opaque:
        raise GivenFileError("must have no transparent pixels")


def _refuse_colours(*, allowed: bool) -> None:
    if not allowed:
        raise GivenFileError(f"must be grey, as the model's images; or set fit to {alternatives(FITS)}")


def _eight_bit_pixels(
    image: ImageFile.ImageFile, channels: int, *, drop_alpha: bool, to_grey: bool
) -> npt.NDArray[np.uint8]:
    """Decode a picture, with 1, 3 or 4 channels."""
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if channels != 4 and image.has_transparency_data:
        if not drop_alpha:
            _refuse_transparent(np.asarray(image.convert("RGBA"))[..., 3], 255)
        converted = image.convert("RGB" if channels == 3 or image.mode not in ("LA", "La") else "L")
    else:
        converted = image
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    if mode == "L" and converted.mode not in ("1", "L"):
        colours = np.asarray(converted.convert("RGB"))
        if (colours == colours[..., :1]).all():  # a WebP always has three channels
            return colours[..., :1]
        _refuse_colours(allowed=to_grey)
    pixels = np.asarray(converted.convert(mode))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _deep_pixels(image: ImageFile.ImageFile, content: bytes) -> npt.NDArray[np.uint16] | None:
    """Return the pixels of a PNG with 16 bits per channel, [height, width, 1..4]; None if it has less.

    Pillow has no mode for 16 bits in several channels: it decodes such files, and unpacks one byte of each value. So
    the other bytes come from decoding again, with the raw mode of the other order of bytes; grey and alpha fit into the
    four bytes of a pixel.
    """
    raw_mode = str(image.tile[0].args) if image.format == "PNG" and image.tile else ""
    if raw_mode not in _SIXTEEN_BITS:
        return None
    if raw_mode == "I;16B":
        pixels = _unpacked(image, raw_mode).astype(np.uint16)[..., None]
    elif raw_mode == "LA;16B":
        pixels = _unpacked(image, "RGBA").view(">u2").astype(np.uint16)
    else:
        pixels = _unpacked(image, raw_mode).astype(np.uint16) << np.uint16(8)
        with _Picture(content) as again:
            pixels |= _unpacked(again, raw_mode.removesuffix("B") + "L")
    transparent = image.info.get("transparency")
    if transparent is None:
        return pixels
    alpha = np.where((pixels == np.array(transparent)).all(axis=2, keepdims=True), np.uint16(0), np.uint16(_OPAQUE))
    return np.concatenate([pixels, alpha], axis=2)


def _unpacked(image: ImageFile.ImageFile, raw_mode: str) -> npt.NDArray[Any]:
    """Decode a picture whose bytes are unpacked as those of a raw mode."""
    image.tile = [tile._replace(args=raw_mode) for tile in image.tile]
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return np.asarray(image)


def _deep_channels(
    pixels: npt.NDArray[np.uint16], channels: int, *, drop_alpha: bool, to_grey: bool
) -> npt.NDArray[np.uint16]:
    """Return pixels with another number of channels, 1, 3 or 4, by the rules for eight bits."""
    has_alpha_channel = pixels.shape[2] in (2, 4)
    colours = pixels[..., :-1] if has_alpha_channel else pixels
    if has_alpha_channel and channels != 4 and not drop_alpha:
        _refuse_transparent(pixels[..., -1], _OPAQUE)
    if channels == 1 and colours.shape[2] == 3:
        if (colours == colours[..., :1]).all():
            return colours[..., :1]
        _refuse_colours(allowed=to_grey)
        weighted = colours.astype(np.uint32) @ _GREY_WEIGHTS + np.uint32(1 << 15)
        return (weighted >> 16).astype(np.uint16)[..., None]
    if channels != 1 and colours.shape[2] == 1:
        colours = np.repeat(colours, 3, axis=2)
    if channels != 4:
        return colours
    alpha = pixels[..., -1:] if has_alpha_channel else np.full_like(pixels[..., :1], _OPAQUE)
    return np.concatenate([colours, alpha], axis=2)
