"""Streams of events over the complete app: their content, readers that are slow, and readers that disconnect."""

from __future__ import annotations

import asyncio
import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.types import Message

from service.engine import event_stream
from service.http import event_source
from service.http.native.event_schemas import EVENT_SCHEMA, PreviewEvent, ProgressEvent, QueuedEvent
from service.http.native.schemas import GenerateResponse, Problem
from tests.fakes import tiny_config
from tests.integration.in_process import WIDTH, Overflowing, PausedDenoiser, Service, running
from tests.integration.streams import SentEvent, StreamClient, streaming
from tests.waiting import runs

BODY: dict[str, Any] = {"class": [1, 3], "steps": 6, "seed": 7, "cfg_scale": 1}


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send rounds of progress without a pause between them."""
    monkeypatch.setattr(event_stream, "ROUND_EVERY_S", 0.0)


def pixels(b64: str) -> bytes:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64)))).tobytes()


def names(events: list[SentEvent]) -> list[str | None]:
    return [event.name for event in events]


async def take(client: StreamClient) -> SentEvent:
    event = await client.take()
    assert event is not None
    return event


async def idle(service: Service) -> bool:
    return await service.metric("iddpm_remaining_row_steps") == 0


@runs
async def test_a_fast_reader_sees_every_step_and_gets_the_usual_pixels() -> None:
    async with running() as service:
        plain = (await service.generate(**BODY)).json()
        service.denoiser.let.clear()
        async with streaming(service.app, **BODY, preview_every=2) as client:
            events = [await take(client)]
            for step in range(1, 6):
                service.denoiser.let_steps(1)
                events += [await take(client) for _ in range(4 if step % 2 == 0 else 2)]
            service.denoiser.let_steps(1)
            events += await client.rest()
    assert client.status == 200
    assert client.headers["content-type"].startswith("text/event-stream")
    assert (client.headers["cache-control"], client.headers["x-accel-buffering"]) == ("no-store", "no")
    assert "x-request-id" in client.headers
    assert [event.number for event in events] == [str(k + 1) for k in range(len(events))]
    assert names(events)[0] == "queued"
    assert names(events)[-1] == "completed"
    queued = QueuedEvent.model_validate(events[0].data)
    assert (queued.images_ahead, queued.predicted_wait_s) == (0, 0)
    assert queued.eta_s > 0
    progress = [ProgressEvent.model_validate(event.data) for event in events if event.name == "progress"]
    assert sorted((p.position, p.step) for p in progress) == [(k, step) for k in range(2) for step in range(1, 7)]
    assert all(p.eta_s >= 0 for p in progress)
    assert progress[-1].eta_s == 0
    previews = [PreviewEvent.model_validate(event.data) for event in events if event.name == "preview"]
    assert sorted((p.position, p.step) for p in previews) == [(0, 2), (0, 4), (1, 2), (1, 4)]
    assert {p.format for p in previews} == {"png"}
    assert len({pixels(p.b64_json) for p in previews}) == 4
    completed = GenerateResponse.model_validate(events[-1].data)
    assert [image.b64_json for image in completed.images] == [image["b64_json"] for image in plain["images"]]
    assert completed.numerics_id == plain["numerics_id"]
    assert completed.timing.finish_s > 0


@runs
async def test_previews_that_no_picture_can_hold_are_arrays() -> None:
    denoiser = PausedDenoiser()
    denoiser.config = tiny_config(image_channels=2)
    async with running(denoiser) as service:
        service.denoiser.let.clear()
        async with streaming(service.app, **BODY, format="npy", preview_every=2) as client:
            service.denoiser.let_steps(3)
            events = [await take(client)]
            while events[-1].name != "preview":
                events.append(await take(client))
            service.denoiser.let.set()
            events += await client.rest()
    preview = PreviewEvent.model_validate(next(event.data for event in events if event.name == "preview"))
    assert preview.format == "npy"
    assert np.load(io.BytesIO(base64.b64decode(preview.b64_json))).shape == (1, 8, 8, 2)
    assert names(events)[-1] == "completed"


@runs
async def test_a_slow_reader_gets_fewer_previews_and_delays_no_other() -> None:
    steps = 200
    async with running() as service:
        slow: dict[str, Any] = {"class": 2, "n": 1, "steps": steps, "seed": 3, "cfg_scale": 1}
        alone = (await service.generate(**slow)).json()
        calls = await service.metric("iddpm_network_calls_total", model="m")
        async with streaming(service.app, **slow, preview_every=1) as client:
            events = [await take(client)]
            other = await service.generate(steps=steps, cfg_scale=1, seed=4)
            await service.until(lambda: idle(service))  # both are done, and nothing was read
            assert other.status_code == 200
            assert await service.metric("iddpm_network_calls_total", model="m") - calls <= 2 * steps
            events += await client.rest()
    previews = [event for event in events if event.name == "preview"]
    assert len(previews) < 10
    assert events[-1].name == "completed"
    assert events[-1].data["images"][0]["b64_json"] == alone["images"][0]["b64_json"]


class NeverWritten(StreamClient):
    """A client whose connection takes not even the head of the answer."""

    def __init__(self, app: Any, body: dict[str, Any]) -> None:
        super().__init__(app, body)
        self.is_answered = asyncio.Event()

    async def _send(self, message: Message) -> None:
        self.is_answered.set()
        await asyncio.Event().wait()


@runs
async def test_a_reader_that_goes_away_before_the_head_was_written_frees_its_rows() -> None:
    async with running() as service:
        service.denoiser.let.clear()
        client = NeverWritten(service.app, {"stream": True, "n": 1, "steps": 1000, "cfg_scale": 1})
        await client.is_answered.wait()
        client.go_away()
        await asyncio.wait([client.answering])
        service.denoiser.let.set()
        await service.until(lambda: idle(service))
        assert await service.metric("iddpm_row_steps_total") < 1000


@runs
async def test_a_disconnected_reader_frees_its_rows_within_one_step() -> None:
    async with running() as service:
        service.denoiser.let.clear()
        async with streaming(service.app, n=WIDTH, steps=1000, cfg_scale=1, preview_every=1) as client:
            await take(client)
            service.denoiser.let_steps(1)
            await take(client)
            client.go_away()
            await asyncio.wait([client.answering])
            taken = await service.metric("iddpm_row_steps_total")
            service.denoiser.let_steps(1)  # the step that had begun
            await service.until(lambda: idle(service))
            assert await service.metric("iddpm_row_steps_total") - taken <= WIDTH
        assert await service.metric("iddpm_images_running") == 0
        assert await service.metric("iddpm_requests_total", outcome="cancelled") == 1
        assert await service.metric("iddpm_requests_total", outcome="ok") == 0
        assert not service.app.state.service.engine.ledger.requests


@runs
async def test_a_reader_that_disconnects_while_no_event_is_sent_is_noticed() -> None:
    async with running() as service:
        service.denoiser.let.clear()
        async with streaming(service.app, n=WIDTH, steps=1000, cfg_scale=1):
            first = await service.generate(steps=1001)  # a refused request gets an error status
            assert first.status_code == 422
            async with streaming(service.app, steps=5, cfg_scale=1) as waiting:
                await take(waiting)
                waiting.go_away()
                await asyncio.wait([waiting.answering])
                assert await service.metric("iddpm_requests_total", outcome="cancelled") == 1


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"stream": True, "class": "Dog"}, "class"),
        ({"stream": True, "preview_every": 0}, "preview_every"),
        ({"preview_every": 5}, "preview_every"),
        ({"stream": 1}, "stream"),
    ],
)
def test_errors_before_acceptance_have_their_status_and_form(body: dict[str, Any], field: str) -> None:
    @runs
    async def check() -> None:
        async with running() as service:
            refused = await service.generate(**body)
            assert refused.status_code == 422
            assert refused.headers["content-type"] == "application/problem+json"
            assert {error["field"] for error in refused.json()["errors"]} == {field}

    check()


@runs
async def test_an_image_that_fails_ends_the_stream_with_a_problem_and_frees_its_siblings() -> None:
    async with running(Overflowing()) as service:
        async with streaming(service.app, **BODY | {"steps": 900}) as client:
            events = await client.rest()
        assert names(events)[-1] == "failed"
        assert "completed" not in names(events)
        problem = Problem.model_validate(events[-1].data)
        assert (client.status, problem.status, problem.title) == (200, 500, "Image failed")
        assert problem.detail == "image 1: its numbers overflowed while sampling"
        assert problem.instance == f"urn:iddpm:request:{client.headers['x-request-id']}"
        await service.until(lambda: idle(service))
        assert await service.metric("iddpm_requests_total", outcome="failed") == 1
        assert await service.metric("iddpm_row_steps_total") < 2 * 900


@runs
async def test_a_stream_that_takes_too_long_ends_with_a_problem() -> None:
    async with running(max_request_s=0.5) as service:
        service.denoiser.let.clear()
        async with streaming(service.app, steps=10, cfg_scale=1) as client:
            last = (await client.rest())[-1]
        assert (last.name, last.data["status"], last.data["title"]) == ("failed", 504, "Took too long")
        service.denoiser.let.set()
        await service.until(lambda: idle(service))


@runs
async def test_the_time_limit_frees_the_rows_of_a_client_that_does_not_read() -> None:
    async with running(max_request_s=1.0) as service:
        service.denoiser.let.clear()
        async with streaming(service.app, steps=10, cfg_scale=1) as client:
            await service.until_accepted(1)
            await asyncio.sleep(1.2)
            service.denoiser.let.set()
            await service.until(lambda: idle(service))
            last = (await client.rest())[-1]
        assert (last.name, last.data["status"], last.data["title"]) == ("failed", 504, "Took too long")
        assert await service.metric("iddpm_row_steps_total") < 10


def test_a_silent_stream_is_kept_alive_by_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    @runs
    async def check() -> None:
        async with running() as service:
            service.denoiser.let.clear()
            async with streaming(service.app, **BODY) as client:
                while (silence := await take(client)).comment is None:
                    pass
                assert (silence.name, silence.comment) == (None, "keep-alive")
                service.denoiser.let.set()
                assert names(await client.rest())[-1] == "completed"

    monkeypatch.setattr(event_source, "KEEP_ALIVE_S", 0.01)
    check()


@runs
async def test_openapi_describes_every_event() -> None:
    async with running() as service:
        document = (await service.ask("GET", "/openapi.json")).json()
        content = document["paths"]["/v1/generate"]["post"]["responses"]["200"]["content"]
        assert len(content["text/event-stream"]["schema"]["oneOf"]) == 5
        events = {
            schema["properties"]["event"]["const"]: schema["properties"]["data"]["contentSchema"]
            for schema in EVENT_SCHEMA["oneOf"]
        }
        assert list(events) == ["queued", "progress", "preview", "completed", "failed"]
        assert events["completed"]["$ref"].rpartition("/")[2] in document["components"]["schemas"]
        assert set(content) >= {"application/json", "image/jpeg", "application/zip", "application/x-npz"}
