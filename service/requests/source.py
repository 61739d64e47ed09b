"""What a field of given images holds: a file in base64, a file, or an array. Slow to read."""

from __future__ import annotations

import base64
import binascii
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from formats.given_files import (
    images_of,
    masks_of,
    read_images,
    read_masks,
    read_values,
    values_of,
)
from formats.given_shapes import Fit, GivenFileError, Shape

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]


class Source(ABC):
    """Where the images, masks or arrays of a field come from. Every method raises `GivenFileError`."""

    @abstractmethod
    def images(self, shape: Shape, *, most: int, fit: Fit | None = None) -> Array:
        """Return images as `formats.given_files.read_images` does."""

    @abstractmethod
    def masks(self, shape: Shape, *, most: int, fit: Fit | None = None) -> FloatArray:
        """Return masks as `formats.given_files.read_masks` does."""

    @abstractmethod
    def values(self, shape: Shape, *, most: int) -> FloatArray:
        """Return float arrays as `formats.given_files.read_values` does."""


@dataclass(frozen=True)
class FileSource(Source):
    """A file."""

    content: bytes
    drop_alpha: bool = False
    """Reads the colours of transparent pixels too, which are refused otherwise."""

    def images(self, shape: Shape, *, most: int, fit: Fit | None = None) -> Array:
        return read_images(self.content, shape, most=most, fit=fit, drop_alpha=self.drop_alpha)

    def masks(self, shape: Shape, *, most: int, fit: Fit | None = None) -> FloatArray:
        return read_masks(self.content, shape, most=most, fit=fit)

    def values(self, shape: Shape, *, most: int) -> FloatArray:
        return read_values(self.content, shape, most=most)


@dataclass(frozen=True)
class Base64Source(Source):
    """A file in base64."""

    text: str

    def images(self, shape: Shape, *, most: int, fit: Fit | None = None) -> Array:
        return self._file().images(shape, most=most, fit=fit)

    def masks(self, shape: Shape, *, most: int, fit: Fit | None = None) -> FloatArray:
        return self._file().masks(shape, most=most, fit=fit)

    def values(self, shape: Shape, *, most: int) -> FloatArray:
        return self._file().values(shape, most=most)

    def _file(self) -> FileSource:
        try:
            return FileSource(base64.b64decode(self.text, validate=True))
        except binascii.Error as error:
            raise GivenFileError("must be a file in base64 (RFC 4648, without line breaks)") from error
        except ValueError as error:  # characters beyond ASCII
            raise GivenFileError("must be a file in base64") from error


@dataclass(frozen=True, eq=False)
class ArraySource(Source):
    """An array that was sent as one."""

    array: Array

    def images(self, shape: Shape, *, most: int, fit: Fit | None = None) -> Array:
        return images_of(self.array, shape, most=most, fit=fit)

    def masks(self, shape: Shape, *, most: int, fit: Fit | None = None) -> FloatArray:
        return masks_of(self.array, shape, most=most, fit=fit)

    def values(self, shape: Shape, *, most: int) -> FloatArray:
        return values_of(self.array, shape, most=most)


class _InBase64:
    """Annotation of a field that holds a source, and in JSON a file in base64."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return the schema that validates a value."""
        return core_schema.no_info_wrap_validator_function(
            lambda value, check: value if isinstance(value, Source) else Base64Source(check(value)),
            core_schema.str_schema(strict=True, min_length=1),
        )


File = Annotated[Source, _InBase64]
"""A file in base64; the other interfaces have sources of their own."""
