"""Read multipart forms (RFC 7578). Slow for large bodies: call it in the `EncodingPool`."""

from __future__ import annotations

from python_multipart import FormParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, parse_options_header

from diffusion.quoting import quoted
from service.errors import InvalidRequest, MalformedForm

MAX_PARTS = 64
"""Most parts of a form."""
MAX_NAME_BYTES = 100
MAX_CONTENT_TYPE = 300
"""Most characters of a Content-Type; a boundary has at most 70."""


def boundary_of(content_type: str) -> bytes:
    """Return the boundary between the parts that a Content-Type declares; b"" without one."""
    if len(content_type) > MAX_CONTENT_TYPE:  # parsing time grows with its square
        return b""
    return parse_options_header(content_type)[1].get(b"boundary", b"")


def read_form(content_type: str, body: bytes) -> dict[str, bytes]:
    """Return the content of each part of a form, fields and files alike, by its name. All are held in memory.

    The item of a list of one, whose part is named `image[]`, is called `image`.

    Args:
        content_type: of the body, with the boundary.
        body: all of it.

    Raises:
        MalformedForm: the body is not a form, is truncated, or has more than `MAX_PARTS` parts.
        InvalidRequest: a name is given twice.
    """
    parts: dict[str, bytes] = {}
    complete = False

    def keep(part: Field | File) -> None:
        if len(parts) == MAX_PARTS:
            raise MalformedForm(f"it must have at most {MAX_PARTS} parts")
        name = _name_of(part).removesuffix("[]")
        if name in parts:
            raise InvalidRequest(name, "is given twice")
        if isinstance(part, File):
            part.file_object.seek(0)
            parts[name] = part.file_object.read()
        else:
            parts[name] = part.value or b""

    def end() -> None:
        nonlocal complete
        complete = True

    try:
        parser = FormParser(
            "multipart/form-data",
            keep,
            keep,
            end,
            boundary_of(content_type) or None,
            config={"MAX_MEMORY_FILE_SIZE": len(body) + 1, "UPLOAD_ERROR_ON_BAD_CTE": True},  # no files on disk
        )
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise MalformedForm("it is damaged, or has no boundary in Content-Type") from error
    if not complete:
        raise MalformedForm("it ends before its last boundary")
    return parts


def _name_of(part: Field | File) -> str:
    name = part.field_name or b""
    try:
        text = name.decode()
    except UnicodeDecodeError as error:
        raise MalformedForm("names of parts must be UTF-8") from error
    if not 1 <= len(name) <= MAX_NAME_BYTES:
        raise MalformedForm(f"names of parts must have 1 to {MAX_NAME_BYTES} bytes; got {quoted(text)}")
    return text
