"""Sample at a running service, and show how it gets on."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import typer

from cli.asking import requests
from cli.client import Client, Event, ProgressEvent, QueuedEvent, pixels_of
from cli.sampled import SampledImage

if TYPE_CHECKING:
    from service.api.schemas import GeneratedImage


def sample_there(client: Client, asked: dict[str, Any], n: int) -> list[SampledImage]:
    """Ask a service for images, as many requests after each other as it takes.

    Args:
        client: the service.
        asked: fields of a request, the seed among them.
        n: images.

    Raises:
        ClientError: a request did not come to its answer.
    """
    images: list[SampledImage] = []
    with typer.progressbar(length=n, label="connecting", file=sys.stderr) as bar:
        shown = _Shown(bar, n)
        for fields in requests(asked, n, lambda: _class_names(client, asked.get("model"))):
            # npz: pixels of any number of channels
            answer = client.generate(**{**fields, "format": "npz"}, on_event=shown.show)
            images += [_sampled(image, answer.numerics_id) for image in answer.images]
            shown.next_request()
    return images


class _Shown:
    """A bar of all images' steps. Their number is known with the first event that tells it."""

    def __init__(self, bar: Any, images: int) -> None:
        self._bar = bar
        self._images = images
        self._before = 0
        self._steps: dict[int, int] = {}  # by position in the request under way

    def show(self, event: Event) -> None:
        """Show what an event tells."""
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
        self._steps = {}


def _class_names(client: Client, model: str | None) -> list[str]:
    found = [known for known in client.models() if model in (None, known.name)]
    return (found[0].classes if found else None) or []


def _sampled(image: GeneratedImage, numerics_id: str) -> SampledImage:
    return SampledImage(
        seed=image.seed,
        image_index=image.image_index,
        class_index=image.class_index,
        numerics_id=numerics_id,
        pixels=pixels_of(image.b64_json),
    )
