"""A worker of bulk generation: an actor of Ray Data with one engine, which generates batches of images.

Several calls are in progress at a time. They share the engine, so that it is still full when one call ends.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from pydantic import ValidationError

from cli.bulk_order import Order, describe_order, requests_from
from cli.local_engine import LocalEngine
from formats.checkpoint_config import describe_validation_error
from formats.generation import Generation
from service.errors import ModelError, ServiceError
from service.http.server import SWITCH_INTERVAL_S
from service.settings import Settings

if TYPE_CHECKING:
    from service.engine.request import GenerationRequest

Batch: TypeAlias = "Mapping[str, np.ndarray[Any, Any]]"
"""Columns of a batch of images: class (unless images have none), seed, image_index; of generated ones image_index,
pixels."""


def describe(settings: Settings, order: Order) -> Generation:
    """Return the manifest of ordered images, with the numerics of this machine.

    Raises:
        ValueError: an option breaks a rule, or one of the model; or the model cannot be run here.
    """
    with _errors_as_text():
        return describe_order(LocalEngine(settings), order)


@contextmanager
def _errors_as_text() -> Iterator[None]:
    """Raise errors that a user can fix as ValueError with their text: some cannot be pickled."""
    try:
        yield
    except ValidationError as error:
        raise ValueError(describe_validation_error(error)) from None
    except (ServiceError, ModelError, OSError) as error:
        raise ValueError(str(error)) from None


class Worker:
    """An engine that several threads call."""

    def __init__(self, settings: Settings, generation: Generation) -> None:
        """Load the model.

        Raises:
            ValueError: this machine computes other pixels, or the model cannot be run here.
        """
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        with _errors_as_text():
            self._engine = LocalEngine(settings)
        if self._engine.numerics_id != generation.numerics_id:
            raise ValueError(
                f"a node computes other pixels (numerics_id {self._engine.numerics_id}, {self._engine.backend}) than "
                f"the images have ({generation.numerics_id}, {generation.backend}): use nodes of one kind, with "
                "the same packages and model, and choose them with --resource"
            )
        self._generation = generation
        self._calls: queue.SimpleQueue[tuple[list[GenerationRequest], Future[list[Any]]]] = queue.SimpleQueue()
        self._computing: dict[int, Future[list[Any]]] = {}
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    def __call__(self, rows: Batch) -> Batch:
        """Generate the images of some rows, of one seed and with consecutive image indices.

        Returns:
            Columns image_index, and pixels [n, H, W, C], uint8.

        Raises:
            GenerationFailed: an image failed.
            ValueError: image indices are not consecutive, or seeds differ.
        """
        seeds, indices = rows["seed"], rows["image_index"]
        if (seeds != seeds[0]).any() or (np.diff(indices) != 1).any():
            raise ValueError("a batch must have one seed and consecutive image indices")
        requests = requests_from(
            self._engine,
            self._generation.sampling,
            self._generation.upsampling,
            seed=int(seeds[0]),
            image_index=int(indices[0]),
            count=len(indices),
            labels=rows["class"].tolist() if "class" in rows else None,
        )
        call = Future[list[Any]]()
        self._calls.put((requests, call))
        return {"image_index": indices, "pixels": np.stack(call.result())}

    def _run(self) -> None:
        """Generate what is called for; after an error, which the engine does not survive, fail all calls."""
        try:
            for number, pixels in self._engine.run(self._groups(), lambda rows: None):
                self._computing.pop(number).set_result(pixels)
        except Exception as error:  # the callers get it
            for call in self._computing.values():
                call.set_exception(error)
            while True:
                self._calls.get()[1].set_exception(error)

    def _groups(self) -> Iterator[list[GenerationRequest] | None]:
        number = 0
        while True:
            try:
                requests, call = self._calls.get(block=not self._computing)
            except queue.Empty:
                yield None
                continue
            self._computing[number] = call
            number += 1
            yield requests
