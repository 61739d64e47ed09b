"""OpenAI's image edits: the unmodified SDK gets the pixels of native requests, and hostile forms get 4xx answers."""

from __future__ import annotations

import base64
import http.client
import io
import struct
import threading
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import openai
import pytest
from PIL import Image

from service.http.multipart import MAX_PARTS, read_form
from tests.integration.exact_service import MODEL, exact_app, serving
from tests.integration.in_process import running
from tests.pictures import deep_png
from tests.waiting import PATIENCE_S, runs

RNG = np.random.default_rng(3)
PIXELS = RNG.integers(0, 256, (8, 8), dtype=np.uint8)
MADE = np.zeros((8, 8), bool)
MADE[2:6, 3:] = True
OPTIONS: dict[str, Any] = {"steps": 5, "seed": 7, "cfg_scale": 1.5}


def file_of(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def with_alpha(made: npt.NDArray[np.bool_], grey: npt.NDArray[np.uint8] = PIXELS) -> bytes:
    """Return a picture that is transparent where it is to be made."""
    return file_of(Image.fromarray(np.dstack([grey, np.where(made, 0, 255).astype(np.uint8)])))


IMAGE = file_of(Image.fromarray(PIXELS))
MASK = with_alpha(MADE, np.zeros((8, 8), np.uint8))


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(exact_app()) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", timeout=PATIENCE_S, max_retries=0) as client:
        yield client


def pixels(b64_json: str | None) -> npt.NDArray[np.uint8]:
    assert b64_json is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64_json))))


def native(address: str, **fields: Any) -> list[npt.NDArray[np.uint8]]:
    """Generate with files in base64."""
    files = {name: base64.b64encode(file).decode() for name, file in fields.items() if isinstance(file, bytes)}
    answer = httpx.post(f"http://{address}/v1/generate", json=OPTIONS | fields | files, timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    return [pixels(image["b64_json"]) for image in answer.json()["images"]]


DEEP = np.random.default_rng(1).integers(0, 65536, (8, 8, 1), dtype=np.uint16)
WHITE = file_of(Image.fromarray(MADE.astype(np.uint8) * 255))
"""The mask in the native convention."""


@pytest.mark.parametrize(
    ("asked", "extra", "fields"),
    [
        ({"image": IMAGE, "mask": MASK}, {}, {"image": IMAGE, "mask": WHITE}),
        ({"image": with_alpha(MADE)}, {}, {"image": IMAGE, "mask": WHITE}),
        ({"image": [("a.png", IMAGE, "image/png")], "mask": MASK}, {}, {"image": IMAGE, "mask": WHITE}),
        ({"image": IMAGE}, {"strength": 0.6}, {"image": IMAGE, "strength": 0.6}),
        (
            {"image": deep_png(np.dstack([DEEP, ~MADE * np.uint16(65535)]))},
            {},
            {"image": deep_png(DEEP), "mask": WHITE},
        ),
        # Opaque everywhere: nothing of it is a mask
        ({"image": with_alpha(MADE & False)}, {"start_timestep": 500}, {"image": IMAGE, "start_timestep": 500}),
        (
            {"image": IMAGE, "mask": MASK},
            {"sampler": "ddim", "eta": 0.3, "resample": {"times": 2, "jump": 2}, "strength": 1},
            {"image": IMAGE, "mask": WHITE, "sampler": "ddim", "eta": 0.3, "resample": {"times": 2, "jump": 2}},
        ),
    ],
    ids=["mask", "alpha of the image", "list of one", "strength", "16 bits", "opaque alpha", "options"],
)
def test_the_sdk_gets_the_pixels_of_a_native_request(
    client: openai.OpenAI, address: str, asked: Any, extra: dict[str, Any], fields: dict[str, Any]
) -> None:
    answer = client.images.edit(
        **asked, prompt="bee", n=2, size="8x8", response_format="b64_json", input_fidelity="high",
        extra_body=OPTIONS | extra,
    )  # fmt: skip
    assert answer.data is not None
    found = [pixels(image.b64_json) for image in answer.data]
    wanted = native(address, **{"class": "bee", "n": 2, **fields})
    assert [image.tobytes() for image in found] == [image.tobytes() for image in wanted]
    assert answer.data[1].model_extra is not None
    assert (answer.data[1].model_extra["seed"], answer.data[1].model_extra["class"]) == (7, "Bee")
    if "mask" in fields and fields["image"] == IMAGE:
        assert np.array_equal(found[0][~MADE], PIXELS[~MADE])
        assert not np.array_equal(found[0][MADE], PIXELS[MADE])


def test_a_stream_has_the_events_of_edits(client: openai.OpenAI, address: str) -> None:
    stream = client.images.edit(image=IMAGE, mask=MASK, prompt="1", stream=True, partial_images=2, extra_body=OPTIONS)
    *partial, completed = list(stream)
    assert {event.type for event in partial} <= {"image_edit.partial_image"}
    assert completed.type == "image_edit.completed"
    assert np.array_equal(pixels(completed.b64_json), native(address, **{"class": 1}, image=IMAGE, mask=WHITE)[0])


def lying_png() -> bytes:
    """Return a PNG whose header claims 100,000 x 100,000 pixels."""
    png = bytearray(MASK)
    png[16:24] = struct.pack(">II", 100_000, 100_000)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    return bytes(png)


def animated() -> bytes:
    frames = [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)]
    return file_of(frames[0], "WEBP", save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("asked", "param", "message"),
    [
        ({}, "mask", "is required, because `image` has no transparent pixels; or set `strength`"),
        ({"image": with_alpha(MADE & False)}, "mask", "is required"),
        ({"mask": IMAGE}, "mask", "must be a picture with an alpha channel"),
        ({"mask": b"\x93NUMPY"}, "mask", "must be a picture with an alpha channel"),
        ({"mask": b""}, "mask", "is damaged, truncated"),
        ({"mask": MASK[:60]}, "mask", "is damaged or truncated: its header announces 8 x 8 pixels"),
        ({"mask": lying_png()}, "mask", "at most 16777216 pixels"),
        ({"mask": lying_png(), "fit": "crop"}, "mask", "at most 16777216 pixels"),
        ({"image": lying_png()}, "image", "at most 16777216 pixels"),
        ({"image": animated(), "strength": 0.5}, "image", "must not be animated"),
        ({"image": IMAGE[:60], "strength": 0.5}, "image", "is damaged or truncated"),
        ({"image": with_alpha(MADE), "mask": MASK}, "image", "must have no transparent pixels"),
        ({"image": file_of(Image.new("L", (9, 8))), "strength": 0.5}, "image", "8 pixels wide and 8 high"),
        ({"image": [IMAGE, IMAGE], "strength": 0.5}, "image", "is given twice"),
        ({"mask": MASK, "cond": "not a picture"}, "cond", "must be absent"),
        ({"mask": MASK, "prompt": "dog"}, "prompt", "must be one of Ape, Bee"),
        ({"mask": MASK, "size": "1024x1024"}, "size", "must be 8x8 or auto"),
        ({"mask": MASK, "n": 65}, "n", "less than or equal to 64; got 65"),
        ({"mask": MASK, "steps": "many"}, "steps", 'valid integer; got "many"'),
        ({"mask": MASK, "steps": 1.5}, "steps", "valid integer; got 1.5"),
        ({"mask": MASK, "steps": "[" * 1000}, "steps", "valid integer"),
        ({"mask": MASK, "eta": "NaN", "sampler": "ddim"}, "eta", "got NaN"),
        ({"mask": MASK, "stream": "perhaps"}, "stream", "must be true or false"),
        (
            {"mask": MASK, "resample": {"times": 2, "jump": 1, "a": "a longer object is one too, not text"}},
            "resample.a",
            "unknown field; allowed: times, jump",
        ),
        ({"mask": MASK, "resample": {"times": "x", "jump": 1}}, "resample.times", "valid integer"),
        ({"mask": MASK, "strength": 2}, "strength", "less than or equal to 1"),
        ({"mask": MASK, "complexity": "low"}, "complexity", "unknown field; allowed: "),
        ({"mask": MASK, "response_format": "url"}, "response_format", 'must be "b64_json"'),
    ],
)
def test_a_wrong_field_is_a_bad_request_that_names_it(
    client: openai.OpenAI, asked: dict[str, Any], param: str, message: str
) -> None:
    known = {name: value for name, value in asked.items() if name in ("image", "mask", "prompt")}
    others = {name: value for name, value in asked.items() if name not in known}
    with pytest.raises(openai.BadRequestError) as error:
        client.images.edit(**{"image": IMAGE, "prompt": "bee"} | known, extra_body=OPTIONS | others)
    assert message in error.value.message
    assert (error.value.param, error.value.type) == (param, "invalid_request_error")


def form(*parts: tuple[str, bytes], end: bytes = b"\r\n--B--\r\n") -> bytes:
    return b"\r\n".join(
        b'--B\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s' % (name.encode(), content)
        for name, content in parts
    ) + end  # fmt: skip


FORM = {"Content-Type": "multipart/form-data; boundary=B"}
PARTS = [("image", IMAGE), ("strength", b"0.5"), ("steps", b"2"), ("seed", b"1")]
DAMAGED = [
    (b"", "it ends before its last boundary"),
    (form(("image", IMAGE), end=b"\r\n"), "it ends before its last boundary"),
    (b"no form at all", "it is damaged"),
    (form(("", b"x")), "names of parts must have 1 to 100 bytes"),
    (form(("x" * 101, b"x")), "names of parts must have 1 to 100 bytes"),
    (b"--B\r\nContent-Type: text/plain\r\n\r\nx\r\n--B--\r\n", "it is damaged"),
    (b"--B\r\n" + b"X: y\r\n" * 1000 + b"\r\nx\r\n--B--\r\n", "it is damaged"),
    (form(*((f"f{k}", b"") for k in range(MAX_PARTS + 1))), f"at most {MAX_PARTS} parts"),
    (form(("image", IMAGE), ("image[]", IMAGE)), "image: is given twice"),
    (form(("prompt", b"\xff")), "prompt: must be UTF-8"),
    (form(("prompt", b"bee")), "image: field required"),
    (form(("image", IMAGE), ("resample", b"1"), ("resample[times]", b"2")), "resample: is given twice"),
    (form(("image", IMAGE), ("seed", b"9" * 5000)), "seed: input should be a valid integer"),
    (form(("image", IMAGE), ("a\r\nb", b"x")), "it is damaged"),
]


@runs
async def test_damaged_forms_get_400_and_cause_no_work() -> None:
    async with running() as service:
        calls = len(service.denoiser.calls)
        for body, message in DAMAGED:
            answer = await service.ask("POST", "/v1/images/edits", content=body, headers=FORM)
            assert answer.status_code == 400, answer.text
            assert message in answer.json()["error"]["message"], body[:60]
        assert len(service.denoiser.calls) == calls


ORIGINS = [
    ({}, 200),
    ({"Origin": "http://localhost"}, 200),
    ({"Origin": "https://localhost", "Sec-Fetch-Site": "same-origin"}, 200),
    ({"Origin": "http://evil.example"}, 403),
    ({"Origin": "http://localhost:81"}, 403),
    ({"Origin": "null"}, 403),
    ({"Origin": "http://localhost", "Sec-Fetch-Site": "cross-site"}, 403),
    ({"Sec-Fetch-Site": "same-site"}, 403),
    ({"Sec-Fetch-Site": "none"}, 403),
    ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ({"Content-Type": "text/plain"}, 415),
    ({"Content-Type": "application/json"}, 415),
    ({"Content-Type": "multipart/form-data"}, 400),
    ({"Host": "evil.example"}, 421),
]


@runs
async def test_a_page_of_another_origin_cannot_post_a_form() -> None:
    """A browser sends a form of any page without asking."""
    async with running() as service:
        for headers, status in ORIGINS:
            answer = await service.ask("POST", "/v1/images/edits", content=form(*PARTS), headers=FORM | headers)
            assert answer.status_code == status, (headers, answer.text)
            assert "access-control-allow-origin" not in answer.headers


@runs
async def test_forms_and_pictures_are_read_in_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []

    def noting(function: Any) -> Any:
        def noted(*args: Any, **options: Any) -> Any:
            threads.append(threading.current_thread().name)
            return function(*args, **options)

        return noted

    monkeypatch.setattr("service.http.openai.edit_form.read_form", noting(read_form))
    monkeypatch.setattr(Image, "open", noting(Image.open))
    async with running() as service:
        threads.clear()
        parts = [("image", with_alpha(MADE)), *PARTS[1:]]
        assert (await service.ask("POST", "/v1/images/edits", content=form(*parts), headers=FORM)).status_code == 200
    assert len(threads) == 4  # the form; the header, the alpha channel and the colours of the picture
    assert all(name.startswith("encode") for name in threads)


@runs
async def test_a_retry_with_an_idempotency_key_may_have_another_boundary() -> None:
    async with running() as service:
        key = {"Idempotency-Key": "k"}
        path = "/v1/images/edits"
        first = await service.ask("POST", path, content=form(*PARTS), headers=FORM | key)
        again_form = form(*PARTS).replace(b"--B", b"--Other")
        other = {"Content-Type": "multipart/form-data; boundary=Other"}
        again = await service.ask("POST", path, content=again_form, headers=other | key)
        assert (first.status_code, first.content) == (200, again.content)
        assert again.headers["idempotent-replayed"] == "true"
        changed = [*PARTS[:-1], ("seed", b"2")]
        refused = await service.ask("POST", path, content=form(*changed), headers=FORM | key)
        assert (refused.status_code, "another request" in refused.text) == (400, True)


def test_a_form_beyond_what_the_shapes_need_is_refused_before_it_is_read(address: str) -> None:
    connection = http.client.HTTPConnection(address)
    connection.putrequest("POST", "/v1/images/edits")
    connection.putheader("Content-Type", FORM["Content-Type"])
    connection.putheader("Content-Length", str(65536 + (8 << 20) + 1))
    connection.endheaders()  # and no body
    answer = connection.getresponse()
    assert answer.status == 413
    assert f"at most {65536 + (8 << 20)} bytes" in answer.read().decode()
    connection.close()
    assert httpx.get(f"http://{address}/v1/models/{MODEL}").status_code == 200
