"""The forms of an answer that cannot hold its images are refused before any work."""

from __future__ import annotations

import pytest

from service.errors import InvalidRequest
from service.http.native.answers import Body, Form, refuse_large_grid
from service.requests.generate_request import ImageFormat
from tests.fakes import tiny_config


@pytest.mark.parametrize(
    ("body", "image_format", "count", "refused"),
    [
        ("file", "webp", 64, True),
        ("file", "webp", 49, False),
        ("file", "jpeg", 64, False),
        ("file", "png", 64, False),
        ("zip", "webp", 64, False),
        ("json", "webp", 64, False),
    ],
)
def test_a_grid_that_its_format_cannot_hold(body: Body, image_format: ImageFormat, count: int, refused: bool) -> None:
    model = tiny_config().model.replace(image_size=(8, 2048))
    form = Form(body, image_format, None, None)
    if not refused:
        refuse_large_grid(form, count, model)
        return
    with pytest.raises(InvalidRequest, match="webp files hold at most 16383 pixels per side") as error:
        refuse_large_grid(form, count, model)
    assert error.value.field == "format"
