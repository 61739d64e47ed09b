"""The Accept header (RFC 9110, section 12.5.1): choose the available media type that a client prefers."""

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
        """Specificity of the range: 0 for */*, 1 for image/*, 2 for image/png."""
        return (self.kind != "*") + (self.subtype != "*")

    def covers(self, media_type: str) -> bool:
        """Return whether the range includes a media type."""
        kind, _, subtype = media_type.partition("/")
        return self.kind in ("*", kind) and self.subtype in ("*", subtype)


def read_accept(header: str) -> list[MediaRange]:
    """Parse the header; elements that are not media ranges are ignored."""
    ranges = []
    for element in _ELEMENT.findall(header):
        name, *parameters = [part.strip().lower() for part in _PARAMETER.findall(element)] or [""]
        named = _RANGE.fullmatch("*/*" if name == "*" else name)  # Java sends "*" alone
        weights = [value.strip() for key, _, value in (p.partition("=") for p in parameters) if key.strip() == "q"]
        quality = weights[0] if weights else "1"
        if named is not None and _QUALITY.fullmatch(quality):
            ranges.append(MediaRange(named[1], named[2], float(quality)))
    return ranges


def preferred(header: str, plain: str, files: Sequence[str]) -> str | None:
    """Return the media type that a client prefers; None if it accepts none of them.

    `plain` wins unless the client prefers a file: by a higher quality, else a more specific range, else an earlier one.
    It also wins where it is accepted, and a type that is neither available nor an image, such as text/html, has at
    least the quality of the file: such a header is a program's default and does not ask for a file.

    Args:
        header: the value of Accept; empty: anything is accepted.
        plain: the media type for clients without a preference.
        files: the other available media types; of equal ones the first is preferred.
    """
    ranges = read_accept(header)
    if not ranges:
        return plain
    ranked = {}
    for order, media_type in enumerate((plain, *files)):
        covering = [(r.specificity, r.quality, -position) for position, r in enumerate(ranges) if r.covers(media_type)]
        if covering and (best := max(covering))[1] > 0:
            specificity, quality, position = best
            ranked[media_type] = (quality, specificity, position, -order)
    if not ranked:
        return None
    wanted = max(ranked, key=lambda media_type: ranked[media_type])
    if wanted != plain and plain in ranked:
        unavailable = [r for r in ranges if r.kind != "image" and not any(map(r.covers, (plain, *files)))]
        if any(r.quality >= ranked[wanted][0] for r in unavailable):
            return plain
    return wanted
