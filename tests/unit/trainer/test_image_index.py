"""An image's index has the same limit in every interface: that of the noise's counter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from cli.split_requests import split_requests
from diffusion.noise import MAX_IMAGE_INDEX, STREAM_X_T, draw_class, normal
from service.errors import InvalidRequest
from service.http.kserve.routes import INPUTS
from service.http.openai.schemas import ImagesRequest
from service.models.registry import served_model
from service.requests.completion import complete
from service.requests.generate_request import GenerateRequest
from tests.denoisers import ExactDenoiser
from tests.fakes import tiny_config

LIMIT = 2**32 - 1


def indices(**fields: Any) -> list[int]:
    model = served_model("m", ExactDenoiser(tiny_config()), "id")
    body = GenerateRequest.model_validate({"seed": 1, "steps": 2, **fields})
    return [image.image_index for image in complete(body, model, "r", max_row_steps=1000).images]


def test_the_last_image_may_have_the_largest_index() -> None:
    assert MAX_IMAGE_INDEX == LIMIT
    assert indices(image_index=LIMIT) == [LIMIT]
    assert indices(image_index=LIMIT - 2, n=3) == [LIMIT - 2, LIMIT - 1, LIMIT]
    assert [fields["image_index"] for fields in split_requests({"image_index": LIMIT - 4}, 5, 2, list)] == [
        LIMIT - 4,
        LIMIT - 2,
        LIMIT,
    ]
    seed, index = np.array([1]), np.array([LIMIT])
    assert np.isfinite(normal(seed, index, 0 * seed, STREAM_X_T, (1, 2, 2))).all()
    assert draw_class(1, LIMIT, 10) < 10


def test_a_larger_index_is_refused_everywhere() -> None:
    assert "image_index" in INPUTS  # of KServe; converted to the native field
    assert ImagesRequest.model_validate({"prompt": "cat", "image_index": LIMIT}).image_index == LIMIT
    with pytest.raises(ValidationError, match="less than or equal to 4294967295"):
        ImagesRequest.model_validate({"prompt": "cat", "image_index": LIMIT + 1})
    with pytest.raises(ValidationError, match="less than or equal to 4294967295"):
        indices(image_index=LIMIT + 1)
    with pytest.raises(InvalidRequest, match="image_index: must be at most 4294967293 with 3 images; got 4294967294"):
        indices(image_index=LIMIT - 1, n=3)
    with pytest.raises(ValueError, match="image_index must be at most 4294967291 with 5 images; got 4294967292"):
        next(split_requests({"image_index": LIMIT - 3}, 5, 2, list))
    with pytest.raises(ValueError, match=r"must be in 0\.\.4294967295; got 4294967296"):
        draw_class(1, LIMIT + 1, 10)
