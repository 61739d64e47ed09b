"""The media type of an answer: JSON, unless a client requests a file."""

from __future__ import annotations

import pytest

from service.http.native.accept import preferred, read_accept

JSON, FILES = "application/json", ["image/png", "image/webp", "image/jpeg", "application/x-npz", "application/zip"]


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        ("", JSON),
        ("*/*", JSON),
        ("application/*", JSON),
        ("application/json, text/plain, */*", JSON),
        ("image/png", "image/png"),
        ("image/*", "image/png"),
        ("application/zip", "application/zip"),
        ("IMAGE/WebP;Q=1", "image/webp"),
        ("image/png;level=1;q=0.5", "image/png"),
        # qualities
        ("image/png;q=0, application/json", JSON),
        ("image/png;q=0.4, application/json;q=0.5", JSON),
        ("image/png;q=0.5, application/json;q=0.4", "image/png"),
        ("image/png;q=0.5, image/webp;q=0.501", "image/webp"),
        ("image/png, */*;q=0.1", "image/png"),
        ("application/json;q=0, */*", "image/png"),
        # a more specific range takes precedence over a less specific one, in any order
        ("image/*, image/png;q=0", "image/webp"),
        ("image/png;q=0, image/*", "image/webp"),
        ("*/*, image/*;q=0", JSON),
        ("image/*;q=0, */*", JSON),
        ("image/*, application/json", JSON),
        ("*/*;q=0, image/jpeg;q=0.1", "image/jpeg"),
        # equal qualities: the first one
        ("image/png, application/json", "image/png"),
        ("application/json, image/png", JSON),
        ("image/jpeg, image/webp", "image/jpeg"),
        # default headers of programs do not request an image
        ("text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2", JSON),  # java.net
        ("text/html, image/gif, image/jpeg, */*; q=0.2", JSON),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8", JSON),  # browsers
        ("image/avif,image/webp,image/apng,image/svg+xml,image/*,*/*;q=0.8", "image/webp"),  # <img> sends this
        ("text/html, image/png", "image/png"),  # JSON is excluded
        # no supported type
        ("text/html", None),
        ("image/gif", None),
        ("application/json;q=0", None),
        ("*/*;q=0", None),
        ("application/json;q=0.000, image/*;q=0", None),
        # an invalid media range is ignored
        ("garbage", JSON),
        ("image/png;q=abc", JSON),
        ("image/png;q=1.5, ,;,/,image/", JSON),
        ('image/png;title="a, image/webp;q=1";q=0.1, application/json;q=0.2', JSON),
    ],
)
def test_the_media_type_for_a_header(header: str, wanted: str | None) -> None:
    assert preferred(header, JSON, FILES) == wanted


@pytest.mark.parametrize(
    ("header", "ranges"),
    [('"' * 30_000, 0), ("a/b;" * 8_000, 1), ("image/png," * 3_000, 3_000), (";q=" * 10_000, 0), ('"\\' * 15_000, 0)],
    ids=range(5),
)
def test_a_long_header_is_read_without_backtracking(header: str, ranges: int) -> None:
    assert len(read_accept(header)) == ranges  # backtracking would take hours
