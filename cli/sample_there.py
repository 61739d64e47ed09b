"""Sample at a running service, and show how it gets on."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from cli.asking import requests
from cli.client import Client, ConnectionLost, Event, ProgressEvent, QueuedEvent, pixels_of
from cli.retries import log as retries_log
from cli.sampled import CheckImages, SampledImage

if TYPE_CHECKING:
    from service.http.native.schemas import GeneratedImage, GenerateResponse, ModelInfo


TRIES = 3
"""Times that a request is sent whose stream breaks off."""


def sample_there(client: Client, asked: dict[str, Any], n: int, at_once: int, check: CheckImages) -> list[SampledImage]:
    """Ask a service for images, as many requests after each other as it takes.

    Args:
        client: the service.
        asked: fields of a request, the seed among them.
        n: images.
        at_once: most of them in a request.
        check: called before the first request, where the service has such a model.

    Raises:
        ClientError: a request did not come to its answer.
        ValueError: of `check`.
    """
    images: list[SampledImage] = []
    with _retries_told():
        if (found := _find_model(client, asked.get("model"))) is not None:
            check(found.image_channels, found.image_size)
        with typer.progressbar(length=n, label="connecting", file=sys.stderr) as bar:
            shown = _Shown(bar, n)
            for fields in requests(asked, n, at_once, lambda: _class_names(client, asked.get("model"))):
                # npz: pixels of any number of channels
                answer = _ask(client, {**fields, "format": "npz"}, shown)
                images += [_sampled(image, answer.numerics_id) for image in answer.images]
                shown.next_request()
    return images


def _ask(client: Client, fields: dict[str, Any], shown: _Shown) -> GenerateResponse:
    """Ask again when a stream breaks off: its rows are free by then, and the seed makes the same pictures."""
    for _ in range(TRIES - 1):
        try:
            return client.generate(**fields, on_event=shown.show)
        except ConnectionLost:
            if not shown.begun:  # nobody took it, although the client has tried for a while
                raise
            shown.begin_again()
    return client.generate(**fields, on_event=shown.show)


class _Tell(logging.Handler):
    """Prints what is logged, on a line of its own below the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record's message."""
        typer.echo(("\n" if sys.stderr.isatty() else "") + record.getMessage(), err=True)


@contextmanager
def _retries_told() -> Iterator[None]:
    """Tell of each time that a request is sent again: nobody shall wait for what is not there without knowing."""
    tell, level = _Tell(), retries_log.level
    retries_log.addHandler(tell)
    retries_log.setLevel(logging.INFO)
    try:
        yield
    finally:
        retries_log.removeHandler(tell)
        retries_log.setLevel(level)


class _Shown:
    """A bar of all images' steps. Their number is known with the first event that tells it."""

    def __init__(self, bar: Any, images: int) -> None:
        self._bar = bar
        self._images = images
        self._before = 0
        self._steps: dict[int, int] = {}  # by position in the request under way
        self.begun = False
        """Whether anything was told of the request under way."""

    def show(self, event: Event) -> None:
        """Show what an event tells."""
        self.begun = True
        if isinstance(event, QueuedEvent):
            self._bar.label = f"waiting, {event.images_ahead} images ahead" if event.images_ahead else "sampling"
        elif isinstance(event, ProgressEvent):
            self._bar.label = "sampling"
            self._bar.length = self._images * event.steps
            self._steps[event.position] = event.step
        self._bar.update(self._before + sum(self._steps.values()) - self._bar.pos)

    def next_request(self) -> None:
        """Count the images that are done, and begin with others."""
        self._before += sum(self._steps.values())
        self.begin_again()

    def begin_again(self) -> None:
        """Count the steps of the request under way from none."""
        self._steps = {}
        self.begun = False


def _class_names(client: Client, model: str | None) -> list[str]:
    found = _find_model(client, model)
    return (found.classes if found is not None else None) or []


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
