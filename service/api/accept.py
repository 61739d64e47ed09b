"""The Accept header (RFC 9110, section 12.5.1): which of the media types that there are a client wants most."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_ELEMENT = re.compile(r'(?:[^,"]|"(?:\\.|[^"\\])*"?)+')
_PARAMETER = re.compile(r'(?:[^;"]|"(?:\\.|[^"\\])*"?)+')
_NAME = r"[!#$%&'*+.^_`|~0-9a-z-]+"
_RANGE = re.compile(rf"({_NAME})/({_NAME})")
_QUALITY = re.compile(r"0(\.\d*)?|\.\d+|1(\.0*)?")


@dataclass(frozen=True)
class MediaRange:
    """An element of the header: image/png, image/* or */*."""

    kind: str
    subtype: str
    quality: float

    @property
    def specificity(self) -> int:
        """How exactly it names a type: 0 for */*, 1 for image/*, 2 for image/png."""
        return (self.kind != "*") + (self.subtype != "*")

    def covers(self, media_type: str) -> bool:
        """Return whether it names a media type."""
        kind, _, subtype = media_type.partition("/")
        return self.kind in ("*", kind) and self.subtype in ("*", subtype)


def read_accept(header: str) -> list[MediaRange]:
    """Read the header; what is no media range is left out."""
    ranges = []
    for element in _ELEMENT.findall(header):
        name, *parameters = [part.strip().lower() for part in _PARAMETER.findall(element)] or [""]
        named = _RANGE.fullmatch("*/*" if name == "*" else name)  # "*" alone is Java's
        weights = [value.strip() for key, _, value in (p.partition("=") for p in parameters) if key.strip() == "q"]
        quality = weights[0] if weights else "1"
        if named is not None and _QUALITY.fullmatch(quality):
            ranges.append(MediaRange(named[1], named[2], float(quality)))
    return ranges


def preferred(header: str, plain: str, files: Sequence[str]) -> str | None:
    """Return the media type that a client wants most; None where it wants none of those that there are.

    `plain` wins unless the client prefers a file: names it with a higher quality, more exactly, or before. A header
    that wants something else just as much, such as text/html, is a program's default, and no wish for a file.

    Args:
        header: the value of Accept; empty: anything.
        plain: what most clients want.
        files: what else there is, the likeliest first.
    """
    ranges = read_accept(header)
    if not ranges:
        return plain
    weighed = {}
    for order, media_type in enumerate((plain, *files)):
        covering = [(r.specificity, r.quality, -position) for position, r in enumerate(ranges) if r.covers(media_type)]
        if covering and (best := max(covering))[1] > 0:
            specificity, quality, position = best
            weighed[media_type] = (quality, specificity, position, -order)
    if not weighed:
        return None
    wanted = max(weighed, key=lambda media_type: weighed[media_type])
    if wanted != plain and plain in weighed:
        offers = (plain, *files)
        for other in ranges:
            is_elsewhere = other.kind != "image" and not any(other.covers(media_type) for media_type in offers)
            if is_elsewhere and other.quality >= weighed[wanted][0]:
                return plain
    return wanted
