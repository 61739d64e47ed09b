"""Sample at a running service, with a progress bar."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx
import typer

from cli.client import (
    Client,
    ClientError,
    ConnectionLost,
    Event,
    ProgressEvent,
    QueuedEvent,
    RequestFailed,
    UnexpectedAnswer,
    pixels_of,
)
from cli.client_core import StreamEnded
from cli.retries import FIRST_PAUSE_S, LOST_BEHIND_PROXY, LOST_BEHIND_RAY
from cli.retries import log as retries_log
from cli.sampled import CheckImages, SampledImage
from cli.split_requests import split_requests

if TYPE_CHECKING:
    from service.http.native.schemas import GeneratedImage, GenerateResponse, ModelInfo


TRIES = 3
"""Attempts of a request whose connection breaks."""

BROKE = (
    httpx.ReadError, httpx.ReadTimeout, httpx.WriteError, httpx.WriteTimeout, httpx.CloseError,
    httpx.RemoteProtocolError,
)  # fmt: skip
"""Causes of a ConnectionLost that came after the connection was made."""


def sample_remote(
    client: Client,
    params: dict[str, Any],
    n: int | None,
    at_once: int,
    check: CheckImages,
    arrived: Callable[[list[SampledImage]], object],
) -> list[SampledImage]:
    """Sample images at a service, with one request after the other.

    Args:
        client: of the service.
        params: fields of a request, including the seed and the format.
        n: number of images; None: one per given image.
        at_once: most images per request.
        check: called before the first request, if the service has the model.
        arrived: called with the images of each request; its exceptions are passed on.

    Raises:
        ClientError: a request failed.
        ValueError: from `check`.
    """
    images: list[SampledImage] = []
    with show_retries():
        if (found := _find_model(client, params.get("model"))) is not None:
            check(found.image_channels, found.image_size)
        one_channel = {"mask", *(_fields_of_one_channel(found) if found is not None else ())}
        with typer.progressbar(length=n or 1, label="connecting", file=sys.stderr) as bar:
            shown = _Shown(bar, n or 1)
            names = partial(class_names_of, client, params.get("model"))
            for fields in split_requests(params, n, at_once, names, one_channel):
                answer = _generate(client, fields, shown)
                arrived(new := [_sampled(image, answer.numerics_id) for image in answer.images])
                images += new
                shown.next_request()
    return images


def _generate(client: Client, fields: dict[str, Any], shown: _Shown) -> GenerateResponse:
    """Generate images; repeat the request if it was lost. The seed, which is always sent, fixes the pixels."""
    for attempt in range(TRIES - 1):
        try:
            return client.generate(**fields, on_event=shown.show)
        except ClientError as error:
            if not _was_lost(error):
                raise
            pause_s = FIRST_PAUSE_S * 2**attempt
            retries_log.info("%s; retrying in %.1f s", error, pause_s)
        time.sleep(pause_s)
        shown.restart()
    return client.generate(**fields, on_event=shown.show)


def _was_lost(error: ClientError) -> bool:
    """Return whether a request was lost after its connection was made: the client repeats no stream for that itself."""
    if isinstance(error, ConnectionLost):
        return isinstance(error, StreamEnded) or isinstance(error.__cause__, BROKE)
    if isinstance(error, RequestFailed):  # HAProxy's 502, as deploy/haproxy writes it
        return error.problem.status == LOST_BEHIND_PROXY
    # the service's own 500 is a RequestFailed
    return isinstance(error, UnexpectedAnswer) and error.status in (LOST_BEHIND_PROXY, LOST_BEHIND_RAY)


class _PrintHandler(logging.Handler):
    """Print log messages below the progress bar, each on its own line."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record's message."""
        typer.echo(("\n" if sys.stderr.isatty() else "") + record.getMessage(), err=True)


@contextmanager
def show_retries() -> Iterator[None]:
    """Print every retry, so that the user sees why the command waits."""
    handler, level = _PrintHandler(), retries_log.level
    retries_log.addHandler(handler)
    retries_log.setLevel(logging.INFO)
    try:
        yield
    finally:
        retries_log.removeHandler(handler)
        retries_log.setLevel(level)


class _Shown:
    """A progress bar of the steps of all images. The number of steps is known with the first progress event."""

    def __init__(self, bar: Any, images: int) -> None:
        self._bar = bar
        self._images = images
        self._before = 0
        self._steps: dict[int, int] = {}  # by position in the current request

    def show(self, event: Event) -> None:
        """Update the bar for an event."""
        if isinstance(event, QueuedEvent):
            self._bar.label = f"waiting, {event.images_ahead} images ahead" if event.images_ahead else "sampling"
        elif isinstance(event, ProgressEvent):
            self._bar.label = "sampling"
            self._images = max(self._images, event.position + 1)  # known by its events only, if given images say it
            self._bar.length = self._images * event.steps
            self._steps[event.position] = event.step
        self._bar.update(self._before + sum(self._steps.values()) - self._bar.pos)

    def next_request(self) -> None:
        """Add the current request's steps to the total, and begin with the next request."""
        self._before += sum(self._steps.values())
        self.restart()

    def restart(self) -> None:
        """Reset the current request's steps to 0."""
        self._steps = {}


def class_names_of(client: Client, model: str | None) -> list[str]:
    """Return the class names of a served model (None: the first); none if there is no such model."""
    found = _find_model(client, model)
    return (found.classes if found is not None else None) or []


def _fields_of_one_channel(model: ModelInfo) -> Iterator[str]:
    """Yield the given files whose arrays may leave out the axis of channels."""
    if model.image_channels == 1:
        yield from ("image", "latent")
    if model.cond is not None and model.cond.channels == 1:
        yield "cond"


def _find_model(client: Client, name: str | None) -> ModelInfo | None:
    return next((known for known in client.models() if name in (None, known.name)), None)


def _sampled(image: GeneratedImage, numerics_id: str) -> SampledImage:
    return SampledImage(
        seed=image.seed,
        image_index=image.image_index,
        class_index=image.class_index,
        numerics_id=numerics_id,
        pixels=pixels_of(image.b64_json),
    )
