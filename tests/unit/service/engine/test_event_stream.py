"""The events that a reader of a request receives: each important one once, and only the newest of the others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextvars import Context
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from service.backends.pending import Pending
from service.engine import event_stream
from service.engine.event_stream import EventStream
from service.engine.events import Event, ImageDone, ImageFailed, Queued
from service.engine.forecast import Prediction
from service.engine.mailbox import Mailbox
from service.engine.request import ImagePreview, ImageProgress, ImageResult, ImageStatus, Observation, Watch
from service.errors import EngineDead, GenerationFailed, NotFinite
from tests.fakes import CountingRunner, generation, params
from tests.unit.service.engine.test_async_engine import CONFIG, PausedRunner, outcome, started
from tests.waiting import PATIENCE_S, eventually, runs

AT_ONCE = pytest.mark.usefixtures("at_once")


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send rounds of progress without a pause between them."""
    monkeypatch.setattr(event_stream, "ROUND_EVERY_S", 0.0)


def prediction(position: int = 3, seconds: float = 9.0) -> Prediction:
    return Prediction(position=position, wait_s=seconds / 3, finish_s=seconds)


def stream(images: int = 2) -> EventStream:
    return EventStream(images, prediction(), lambda: prediction(0, 5.0))


def moved(position: int, step: int) -> ImageProgress:
    return ImageProgress(request_id="r", position=position, step=step, steps=50)


def shown(position: int, step: int) -> ImagePreview:
    pixels = np.full((1, 1, 1), step, dtype=np.uint8)
    return ImagePreview(request_id="r", position=position, step=step, steps=50, pixels=pixels)


def done(position: int) -> ImageResult:
    return ImageResult(request_id="r", position=position, status=ImageStatus.DONE)


async def rest(events: EventStream) -> list[Event]:
    return [event async for event in events]


def kinds(events: Sequence[Event]) -> list[str]:
    return [type(event).__name__ for event in events]


@AT_ONCE
@runs
async def test_a_slow_reader_gets_the_newest_progress_and_every_end() -> None:
    events = stream()
    for step in range(1, 50):
        for position in range(2):
            events.observe(moved(position, step))
            if step % 5 == 0:
                events.observe(shown(position, step))
    assert events.unread == 5  # `Queued` is the first
    queued = await anext(events)
    assert queued == Queued(images_ahead=3, wait_s=3.0, eta_s=9.0)
    received = [await anext(events) for _ in range(4)]
    assert [(type(e), e.position, e.step) for e in received if isinstance(e, ImageProgress | ImagePreview)] == [
        (ImageProgress, 0, 49),
        (ImageProgress, 1, 49),
        (ImagePreview, 0, 45),
        (ImagePreview, 1, 45),
    ]
    assert all(0 < event.eta_s <= 5.0 for event in received if isinstance(event, ImageProgress | ImagePreview))
    events.observe(moved(0, 49))
    events.observe(shown(0, 49))
    events.image_ended(0, done(0))
    events.image_ended(1, done(1))
    assert kinds(await rest(events)) == ["ImageDone", "ImageDone", "Completed"]


@runs
async def test_rounds_of_progress_keep_a_minimum_interval() -> None:
    now = 100.0
    events = EventStream(2, prediction(), lambda: prediction(0, 5.0), clock=lambda: now)
    await anext(events)
    events.observe(moved(0, 1))
    events.observe(moved(1, 1))
    assert kinds([await anext(events)]) == ["ImageProgress"]
    events.observe(moved(0, 2))  # does not join the round in progress
    assert kinds([await anext(events)]) == ["ImageProgress"]
    waiting = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0)
    assert not waiting.done()
    now += event_stream.ROUND_EVERY_S
    received = await waiting
    assert isinstance(received, ImageProgress)
    assert (received.position, received.step, received.steps) == (0, 2, 50)
    assert received.eta_s == pytest.approx(5.0 - event_stream.ROUND_EVERY_S)  # reduced by the time of a round


@AT_ONCE
@runs
async def test_a_failed_image_is_reported_and_no_completion_follows() -> None:
    events = stream()
    events.image_ended(1, NotFinite("image 1: overflow"))
    events.image_ended(0, done(0))
    received = await rest(events)
    assert kinds(received) == ["Queued", "ImageFailed", "ImageDone"]
    assert isinstance(received[1], ImageFailed)
    assert (received[1].position, str(received[1].error)) == (1, "image 1: overflow")


@runs
async def test_a_cancelled_wait_loses_no_event() -> None:
    events = stream(1)
    await anext(events)
    waiting = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0)
    waiting.cancel()
    events.image_ended(0, done(0))
    assert kinds(await rest(events)) == ["ImageDone", "Completed"]


@runs
async def test_closing_ends_a_waiting_reader_and_drops_what_was_not_read() -> None:
    events = stream(1)
    await anext(events)
    waiting = asyncio.ensure_future(anext(events, None))
    await asyncio.sleep(0)
    events.close()
    events.observe(moved(0, 1))
    events.image_ended(0, done(0))
    assert await waiting is None
    assert await rest(events) == []


@runs
async def test_a_waiting_request_gets_repeated_queue_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "QUEUED_EVERY_S", 0.001)
    events = stream(1)
    received = [await anext(events) for _ in range(3)]
    assert [event.images_ahead for event in received if isinstance(event, Queued)] == [3, 0, 0]
    events.observe(moved(0, 1))
    assert kinds([await anext(events)]) == ["ImageProgress"]


def test_the_mailbox_keeps_the_newest_of_each_kind_and_notifies_its_reader() -> None:
    mailbox = Mailbox()
    first: list[Observation] = [moved(0, 1), shown(0, 1), moved(1, 1)]
    assert mailbox.put(first)
    assert not mailbox.put([moved(0, 2)])
    kept = [(type(seen), seen.position, seen.step) for seen in mailbox.take()]
    assert kept == [(ImageProgress, 0, 2), (ImagePreview, 0, 1), (ImageProgress, 1, 1)]
    assert mailbox.take() == []
    assert mailbox.put([moved(0, 3)])


class SteppedRunner(CountingRunner):
    """Takes the number of steps that it is allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed = threading.Semaphore(0)

    def step(self, slots: Sequence[int]) -> list[bool]:
        assert self.allowed.acquire(timeout=PATIENCE_S)
        return super().step(slots)


@AT_ONCE
@runs
async def test_a_fast_reader_sees_every_step_and_every_preview() -> None:
    runner = SteppedRunner()
    async with started(runner) as engine:
        ticket = engine.submit(generation("r", params(steps=6), watch=Watch(preview_every=2)))
        assert ticket.events is not None
        assert isinstance(await anext(ticket.events), Queued)
        received: list[tuple[str, int]] = []
        for step in range(1, 6):
            runner.allowed.release()
            for _ in range(2 if step % 2 == 0 else 1):
                event = await anext(ticket.events)
                assert isinstance(event, ImageProgress | ImagePreview)
                received.append((type(event).__name__, event.step))
        runner.allowed.release()
        last = await rest(ticket.events)
        assert [step for kind, step in received if kind == "ImageProgress"] == [1, 2, 3, 4, 5]
        assert [step for kind, step in received if kind == "ImagePreview"] == [2, 4]
        assert kinds(last) == ["ImageDone", "Completed"]
        assert isinstance(last[0], ImageDone)
        assert last[0].result.pixels is not None
        assert len(runner.calls) == 6


@AT_ONCE
@runs
async def test_a_busy_event_loop_gets_one_callback_for_many_steps() -> None:
    loop, reports = asyncio.get_running_loop(), list[str]()
    call_soon = loop.call_soon_threadsafe

    def noting(callback: Callable[..., object], *args: Any, context: Context | None = None) -> asyncio.Handle:
        reports.extend(type(report).__name__ for report in args)
        return call_soon(callback, *args, context=context)

    loop.call_soon_threadsafe = noting  # type: ignore[method-assign, assignment]
    async with started(CountingRunner()) as engine:
        ticket = engine.submit(generation("r", params(steps=200), watch=Watch(preview_every=1)))
        other = engine.submit(generation("s", params(steps=200)))
        assert ticket.events is not None
        while "ImagesEnded" not in reports:
            pass  # the event loop is blocked while the engine works
        assert reports.count("Observed") == 1
        received = await rest(ticket.events)
        assert kinds(received) == ["Queued", "ImageDone", "Completed"]
        assert other.events is None
        assert (await other.images[0]).pixels is not None


@AT_ONCE
@runs
async def test_events_stop_at_abort_and_its_rows_are_free_at_the_next_step() -> None:
    runner = SteppedRunner()
    async with started(runner) as engine:
        watch = Watch(preview_every=1)
        ticket = engine.submit(generation("r", *[params(steps=1000)] * CONFIG.max_in_flight, watch=watch))
        assert ticket.events is not None
        runner.allowed.release()
        await anext(ticket.events)
        assert isinstance(await anext(ticket.events), ImageProgress)
        engine.abort("r")
        assert await rest(ticket.events) == []
        runner.allowed.release()  # the step that had begun
        assert {await outcome(future) for future in ticket.images} == {"Aborted"}
        assert len(runner.calls) <= 2


@runs
async def test_readers_of_events_get_the_error_of_a_dead_engine() -> None:
    async with started(CountingRunner(error_at=2)) as engine:
        ticket = engine.submit(generation("r", params(), params(), params(), watch=Watch()))
        assert ticket.events is not None
        ends = [event for event in await rest(ticket.events) if isinstance(event, ImageFailed)]
        assert [(end.position, type(end.error)) for end in ends] == [(k, EngineDead) for k in range(3)]
        assert all(isinstance(end.error, GenerationFailed) for end in ends)


@AT_ONCE
@runs
async def test_a_request_without_a_watch_has_no_events_and_no_previews() -> None:
    class Blind(PausedRunner):
        def preview(self, slots: Sequence[int]) -> Pending[npt.NDArray[np.uint8]]:
            raise AssertionError("no client watches")

    runner = Blind()
    async with started(runner) as engine:
        ticket = engine.submit(generation("r", params()))
        assert ticket.events is None
        runner.released.set()
        await eventually(ticket.images[0].done)
        assert ticket.images[0].result().pixels is not None
