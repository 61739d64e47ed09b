"""Inspect an image file and decode it to 8-bit grey or RGB as an image viewer shows it, or raise an error."""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import IO, Literal, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from diffusion.quoting import printable
from formats.given_shapes import GivenFileError
from formats.picture_data import HAS_ALL_DATA
from trainer.data.dataset import DataError, Uint8Array
from trainer.data.options import DataConfig

Result = TypeVar("Result")
Mode = Literal["L", "RGB"]
Trait = Literal["colour", "grey", "deep", "cmyk", "transparent", "rotated", "frames"]
"""Properties of an image because of which its pixels depend on the reading options."""

# Pillow's other formats start external programs (EPS), are not pictures (HDF5, GRIB), or have no
# signature (TGA), so that any damaged file may be mistaken for one.
_WANTED = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
Image.init()
FORMATS = tuple(name for name in _WANTED if name in Image.OPEN)
SUFFIXES = frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in (*FORMATS, "MPO"))

EIGHT_BIT_MODES = frozenset({"1", "L", "P", "LA", "La", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"})
GREY_MODES = frozenset({"1", "L", "LA", "La"})

LARGE_PIXELS = 16 << 20
"""Larger images are decoded one at a time."""
ROWS_AT_ONCE = 256
"""Operations that need more memory than the image before and after them are done in strips."""
READ_AT_ONCE_BYTES = 1 << 20
"""Files up to this size are read with one call."""
DIGESTED_WHOLE_BYTES = 64 << 10
DIGESTED_PARTS, DIGESTED_PART_BYTES = 16, 4 << 10
"""Of larger files, this number of parts of this size is digested."""
TAIL_BYTES = 64
TAILS = {"PNG": b"IEND", "JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "GIF": b";"}
"""Content of the last bytes of a complete file."""
TIFF_BITS_PER_SAMPLE, TIFF_PHOTOMETRIC, TIFF_SAMPLE_FORMAT = 258, 262, 339
EXIF_ORIENTATION = 274
QUARTER_TURNS = frozenset({5, 6, 7, 8})
"""Values of the EXIF orientation that exchange width and height."""

# Always in the same thread: the C library keeps freed memory for the thread that allocated it.
_large_images = ThreadPoolExecutor(1, thread_name_prefix="decode-large")

# Viewers also ignore these: a corrupt EXIF block in an intact image, an image above the size at which
# Pillow starts to warn (it refuses twice that size).
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Encoded(NamedTuple):
    """The content of an image file that is part of a larger file."""

    name: str
    """Shown in errors."""
    content: bytes


Source = Path | str | Encoded


class Header(NamedTuple):
    """Properties of a file that are known without decoding it."""

    width: int
    """Width and height as shown, EXIF orientation applied."""
    height: int
    traits: tuple[Trait, ...]
    digest: int
    """`content_digest` of the file."""


def mode_of(channels: int, options: DataConfig) -> Mode:
    """Return the mode for a number of channels.

    Raises:
        DataError: image files cannot be read with that number, or with a range per channel.
    """
    field = options.channels_field
    if channels not in (1, 3):
        raise DataError(
            f"image files can be read as 1 (grey) or 3 (RGB) channels; {field} is {channels}: "
            f"choose --set {field}=3, or use an npz of arrays with that number of channels"
        )
    if options.value_range is not None and isinstance(options.value_range[0], tuple):
        raise DataError(
            f"{options.range_field} must be one range, [low, high], for image files; several, one per channel, are for "
            "arrays (npz, npy)"
        )
    return "L" if channels == 1 else "RGB"


def inspect(source: Source, mode: Mode, options: DataConfig) -> Header:
    """Read a file's header; decode the file too if it looks truncated.

    Raises:
        DataError: the file cannot be read, or not as an image viewer shows it.
    """
    with _opened(source) as (file, image):
        _check(image, options)
        if 0 in image.size:
            raise ValueError("it has no pixels")
        traits = tuple(_traits(image, mode))
        file.seek(-min(TAIL_BYTES, file.seek(0, 2)), 2)
        whole = TAILS.get(image.format or "", b"") in file.read()
        header = Header(*_size_as_shown(image, traits), traits, content_digest(file))
    if not whole:
        check_whole(source, mode, options)
    return header


def content_digest(file: IO[bytes]) -> int:
    """Return a 64-bit digest of a file's size and content; of a large file, only evenly spread parts are read."""
    size = file.seek(0, 2)
    digest = blake2b(str(size).encode(), digest_size=8)
    if size <= DIGESTED_WHOLE_BYTES:
        file.seek(0)
        digest.update(file.read())
    else:
        for part in range(DIGESTED_PARTS):
            file.seek((size - DIGESTED_PART_BYTES) * part // (DIGESTED_PARTS - 1))
            digest.update(file.read(DIGESTED_PART_BYTES))
    return int.from_bytes(digest.digest(), "little")


def check_whole(source: Source, mode: Mode, options: DataConfig) -> None:
    """Check that a file can be decoded.

    Raises:
        DataError: it cannot.
    """
    decode(source, mode, options, lambda image: None)


def decode(
    source: Source,
    mode: Mode,
    options: DataConfig,
    then: Callable[[Image.Image], Result],
    *,
    all_data: bool = True,
) -> Result:
    """Decode an image as an image viewer shows it, to 8-bit grey or RGB, and return the result of `then`.

    EXIF orientation is applied; transparent pixels show the background; 16-bit grey is scaled to 8 bits; of several
    frames or pages the first is used.

    Args:
        source: path of the file, or its content.
        mode: `L` for grey, `RGB`.
        options: how it is read.
        then: computes the result from the decoded image, which takes much memory and is not kept.
        all_data: whether to check that the file has data for all pixels of its header; Pillow fills up the others.

    Raises:
        DataError: the file cannot be read, or not as an image viewer shows it.
    """
    with _opened(source) as (file, image):
        _check(image, options)

        def read() -> Result:
            if all_data:
                _check_data(file, image)
            return then(_as_shown(image, mode, options))

        return _large_images.submit(read).result() if image.width * image.height > LARGE_PIXELS else read()


def highest_grey(source: Source) -> tuple[int, int]:
    """Return the highest value in a grey image of more than 8 bits, and the highest possible value in its file.

    Raises:
        DataError: the file cannot be read, or its values have no limit.
    """
    with _opened(source) as (_, image):
        limits = _container_range(image)
        if limits is None:
            raise ValueError(f"values of mode {image.mode} have no limit")
        return int(np.asarray(image).max()), limits[1]


@contextmanager
def _opened(source: Source) -> Iterator[tuple[IO[bytes], Image.Image]]:
    """Open an image; convert exceptions until it is closed to an error that names the file."""
    try:
        with io.BytesIO(source.content) if isinstance(source, Encoded) else _opened_file(source) as file:
            try:
                image = Image.open(file, formats=FORMATS)
            except UnidentifiedImageError:
                file.seek(0)
                raise ValueError(_what_it_is(file.read(64))) from None
            with image:
                yield file, image
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise DataError(f"{name_of_source(source)}: it has more than {most:,} pixels; shrink it") from error
    except Exception as error:  # decoders raise SyntaxError, struct.error, IndexError, zlib.error and more
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"{name_of_source(source)}: {' '.join(reason.split()) or type(error).__name__}") from error


def name_of_source(source: Source) -> str:
    """Return how an image is called in messages."""
    return printable(source.name if isinstance(source, Encoded) else source)


def _opened_file(path: Path | str) -> IO[bytes]:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a named pipe would wait for a writer
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        if status.st_size > READ_AT_ONCE_BYTES:
            return os.fdopen(os.dup(descriptor), "rb")
        content = os.read(descriptor, status.st_size)
        while len(content) < status.st_size and (more := os.read(descriptor, status.st_size - len(content))):
            content += more
        return io.BytesIO(content)
    finally:
        os.close(descriptor)


def _what_it_is(head: bytes) -> str:
    if not head:
        return "the file is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the image: run git lfs pull"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "it is a web page, not an image"
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "it is a damaged TIFF, or one of an unsupported kind; save it as grey or RGB of 8 or 16 bits"
    return f"it is damaged, or not an image in a supported format ({', '.join(FORMATS)})"


def _check(image: Image.Image, options: DataConfig) -> None:
    """Check that the image can be decoded without changing its meaning."""
    if "transparency" in image.info and _raw_mode(image) == "RGB;16B":
        raise ValueError("a transparent colour in a 16-bit RGB image is not supported; save it with an alpha channel")
    if image.mode in EIGHT_BIT_MODES:
        if 2 in _tiff_tag(image, TIFF_SAMPLE_FORMAT):
            raise ValueError("signed 8-bit pixels are not supported; save it as unsigned 8-bit")
    elif not _is_deep(image):
        raise ValueError(f"colour mode {image.mode} is not supported; save it as 8-bit grey or RGB")
    elif options.value_range is None and _container_range(image) is None:
        kind, example = (
            ("floating-point values", "0,1") if image.mode == "F" else ("32 bits or signed values", "0,4095")
        )
        raise ValueError(
            f"grey of {kind} has no values that "
            f"are black and white by convention; set them, for example --set {options.range_field}={example}"
        )


def _check_data(file: IO[bytes], image: Image.Image) -> None:
    """Check that a PNG, or a JPEG that can be checked, has data for all pixels that its header announces."""
    has_all_data = HAS_ALL_DATA.get(image.format or "")
    if has_all_data is None or image.mode == "CMYK":  # of which libjpeg makes no grey
        return
    position = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(position)
    try:
        whole = has_all_data(content)
    except GivenFileError:  # a kind of JPEG that Pillow reads and the check does not
        return
    if not whole:
        raise ValueError(f"it is damaged or truncated: its header announces {image.width}x{image.height} pixels")


def _traits(image: Image.Image, mode: Mode) -> Iterator[Trait]:
    grey = image.mode in GREY_MODES or _is_deep(image)
    if mode == "L" and not grey:
        yield "colour"
    if mode == "RGB" and grey:
        yield "grey"
    if _is_deep(image):
        yield "deep"
    if image.mode == "CMYK":
        yield "cmyk"
    if image.has_transparency_data:
        yield "transparent"
    # Reading the EXIF block of a PNG without one would decode the entire file.
    if (image.format != "PNG" or "exif" in image.info) and image.getexif().get(EXIF_ORIENTATION, 1) != 1:
        yield "rotated"
    if getattr(image, "is_animated", False):
        yield "frames"


def _size_as_shown(image: Image.Image, traits: Sequence[Trait]) -> tuple[int, int]:
    turned = "rotated" in traits and image.getexif().get(EXIF_ORIENTATION) in QUARTER_TURNS
    return image.size[::-1] if turned and image.format != "TIFF" else image.size  # Pillow turns the size of TIFF files


def _as_shown(image: Image.Image, mode: Mode, options: DataConfig) -> Image.Image:
    _scale_transparent_grey(image)
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if _is_deep(image):
        return _deep_as_shown(image, options).convert(mode)
    if image.has_transparency_data:
        return _on_background(image, mode, options.background)
    return image if image.mode == mode else image.convert(mode)


def _on_background(image: Image.Image, mode: Mode, background: str) -> Image.Image:
    shown = Image.new(mode, image.size)
    for top in range(0, image.height, ROWS_AT_ONCE):
        strip = image.crop((0, top, image.width, min(top + ROWS_AT_ONCE, image.height)))
        canvas = Image.new("RGBA", strip.size, background)
        canvas.alpha_composite((strip.convert("LA") if strip.mode == "La" else strip).convert("RGBA"))
        shown.paste(canvas.convert(mode), (0, top))
    return shown


def _is_deep(image: Image.Image) -> bool:
    """Return whether the image is grey with more than 8 bits."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _container_range(image: Image.Image) -> tuple[int, int] | None:
    """Return the values of black and white in a grey image of more than 8 bits; None: not defined."""
    if image.mode in ("I", "F") and not (image.mode == "I" and image.format == "PPM"):  # Pillow scales PGM to 16 bits
        return None
    white = 4095 if 12 in _tiff_tag(image, TIFF_BITS_PER_SAMPLE) else 65535
    return 0, white


def _deep_as_shown(image: Image.Image, options: DataConfig) -> Image.Image:
    values = np.asarray(image)
    black, white = options.single_range or _container_range(image) or (0, 65535)
    if 0 in _tiff_tag(image, TIFF_PHOTOMETRIC):  # WhiteIsZero
        black, white = white, black
    pixels: Uint8Array = np.empty(values.shape, np.uint8)
    for top in range(0, len(values), ROWS_AT_ONCE):
        rows = values[top : top + ROWS_AT_ONCE].astype(np.float64)
        if not np.isfinite(rows).all():
            raise ValueError("it contains values that are not finite numbers")
        pixels[top : top + ROWS_AT_ONCE] = np.floor(((rows - black) / (white - black)).clip(0, 1) * 255 + 0.5)
    if "transparency" in image.info:
        pixels[values == image.info["transparency"]] = ImageColor.getcolor(options.background, "L")
    return Image.fromarray(pixels)


def _scale_transparent_grey(image: Image.Image) -> None:
    """Scale the transparent grey of PNG files of 2 and 4 bits to 8 bits: Pillow scales only their pixels."""
    factor = {"L;2": 85, "L;4": 17}.get(_raw_mode(image))
    if factor and isinstance(key := image.info.get("transparency"), int):
        image.info["transparency"] = key * factor


def _raw_mode(image: Image.Image) -> str:
    tile = getattr(image, "tile", None)
    return str(tile[0].args) if image.format == "PNG" and tile else ""


def _tiff_tag(image: Image.Image, tag: int) -> tuple[int, ...]:
    value = getattr(image, "tag_v2", {}).get(tag, ())
    return value if isinstance(value, tuple) else (value,)
