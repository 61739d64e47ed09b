"""The service's engine in this process, so that the pixels equal the service's.

The service's settings are read from the environment, because pixels depend on them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion.config import CheckpointConfig
    from service.engine.request import GivenArrays, ImageParams
    from service.requests.results import Pixels
    from service.settings import Settings

MODEL = "model"
AHEAD = 2
"""Batches of images that the engine holds while there are more to come: one that runs, and one that follows it."""


def local_settings(model: Path) -> Settings:
    """Read the settings of an engine without HTTP from the environment.

    Args:
        model: the folder, as FOLDER or NAME=FOLDER.

    Raises:
        ValidationError: a setting breaks a rule.
        ValueError: an environment variable has the name of an unknown setting.
    """
    from service.settings import Settings, refuse_unknown_variables

    refuse_unknown_variables()
    return Settings(models=(model,), host="127.0.0.1")  # no socket is opened


class LocalEngine:
    """A model folder, loaded and run in this process."""

    def __init__(self, model: Path | Settings, check: Callable[[CheckpointConfig], None] = lambda _: None) -> None:
        """Load a model.

        Args:
            model: the folder, as FOLDER or NAME=FOLDER; or what `local_settings` returned for it, here or on another
                machine.
            check: called with the model's configuration before the network is run; its exceptions are passed on.

        Raises:
            ValidationError: a setting in the environment breaks a rule.
            ValueError: an environment variable has the name of an unknown setting; also from `check`.
            ModelError: the model cannot be run.
        """
        from service.backends.select import load_model
        from service.engine.engine import Engine
        from service.engine.runners.array_runner import ArrayRunner
        from service.metrics import Metrics
        from service.models.registry import served_model

        settings = local_settings(model) if isinstance(model, Path) else model
        self._config = settings.engine_config()
        ((self.name, self.folder),) = settings.model_folders.items()
        backend = load_model(self.folder, settings.backend, settings.backend_options())
        self.config: CheckpointConfig = backend.config
        """Configuration of the model."""
        check(self.config)
        self._runner = ArrayRunner(backend, self._config)
        self.numerics_id = self._runner.numerics_id
        """Identity of the numerics: equal ids give equal pixels."""
        self.backend: str = backend.description
        """Backend, device and precision, for human readers."""
        self._served = served_model(MODEL, backend, self.numerics_id)
        self._engine = Engine({MODEL: self._runner}, self._config, Metrics())
        self._warm = False

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; empty without classes."""
        return self._served.class_names or ()

    def read_given(self, fields: dict[str, Any]) -> tuple[GivenArrays, ...]:
        """Read the given images of a request's fields: none, one for all images, or one per image.

        Raises:
            ValidationError, InvalidRequest: a field breaks a rule, or a file has another shape than the model's images.
        """
        from service.requests.generate_request import GenerateRequest
        from service.requests.given import check_cond, check_given, read_given

        body = GenerateRequest.model_validate(fields)
        check_given(body)
        check_cond(body.cond, self.config.model)
        return read_given(body, self.config)

    def complete(self, fields: dict[str, Any], given: Sequence[GivenArrays] = ()) -> list[ImageParams]:
        """Return the images of a request's fields, with the model's defaults.

        Args:
            fields: of the request.
            given: what `read_given` returned for them.

        Raises:
            ValidationError, InvalidRequest: a field breaks a rule.
        """
        from service.requests.completion import complete
        from service.requests.generate_request import GenerateRequest

        body = GenerateRequest.model_validate(fields)
        return list(complete(body, self._served, "cli", max_row_steps=sys.maxsize, given=given).images)

    def complete_encoding(self, fields: dict[str, Any]) -> tuple[list[ImageParams], int]:
        """Read the images of a request to encode them.

        Args:
            fields: of the body of `POST /v1/encode`.

        Returns:
            The images, and the training timestep of their latents.

        Raises:
            ValidationError, InvalidRequest: a field breaks a rule, or the file has another shape than the model's
                images.
        """
        from diffusion.chains import encoding_end
        from service.requests.array_requests import EncodeRequest, complete_arrays, read_encoded
        from service.requests.given import check_cond

        body = EncodeRequest.model_validate(fields)
        check_cond(body.cond, self.config.model)
        given = read_encoded(body, self.config)
        images = complete_arrays(body, given, self._served, "cli", max_row_steps=sys.maxsize).images
        return list(images), encoding_end(self.config.diffusion, images[0].plan)

    def run(
        self, groups: Iterable[Sequence[ImageParams] | None], progress: Callable[[int], object]
    ) -> Iterator[tuple[int, list[Pixels]]]:
        """Generate groups of images, and yield each group when it is complete, with its number.

        The engine always holds enough images to fill its batches, across groups, and never many more.

        Args:
            groups: read as needed. None, which has no number, means that there is no group now: the next is asked for
                after a step.
            progress: called with the network rows computed since the last call. After an exception of it, or if not all
                groups are taken, the engine cannot be used again.

        Yields:
            The number of a group and its images, [H, W, C]: uint8 pixels, or float32 values in the units of the data;
            of encodings, in the units of the network.

        Raises:
            GenerationFailed: an image failed.
        """
        from formats.value_range import value_range_of
        from service.engine.request import GenerationRequest
        from service.engine.tickets import image_failure
        from service.requests.results import network_values, output_of

        if not self._warm:
            self._engine.warm_up()
            self._warm = True
        engine, values = self._engine, value_range_of(self.config)
        parts = _parts(groups, self._config.max_rows)
        running: dict[str, _Part] = {}
        outputs: dict[int, dict[int, Pixels]] = {}
        in_flight = 0
        more = True
        counted = engine.activity.row_steps
        while more or in_flight:
            while more and in_flight < AHEAD * self._config.max_rows:
                try:
                    part = next(parts)
                except StopIteration:
                    more = False
                    break
                if part is None:
                    break
                name = f"{part.group} {part.first}"
                running[name] = part
                outputs.setdefault(part.group, {})
                request = GenerationRequest(request_id=name, model=MODEL, images=tuple(part.images))
                engine.add(request, time.monotonic())
                in_flight += len(part.images)
            engine.launch()
            results = engine.report()  # of the step before, while the device computes this one
            engine.settle()
            if not engine.has_work():
                results += engine.report()  # there is no next step
            progress(engine.activity.row_steps - counted)
            counted = engine.activity.row_steps
            for result in results:
                part = running[result.request_id]
                image = part.images[result.position]
                if result.failure is not None:
                    raise image_failure(image.image_index, result.failure)
                found = outputs[part.group]
                found[part.first + result.position] = (
                    output_of(image, result, values) if image.plan.kind == "sample" else network_values(result)
                )
                in_flight -= 1
                part.left -= 1
                if part.left == 0:
                    del running[result.request_id]
                if len(found) == part.of:
                    del outputs[part.group]
                    yield part.group, [found[position] for position in range(part.of)]


@dataclass
class _Part:
    """Images of a group that enter the engine together."""

    group: int
    first: int
    """Position of the first image in the group."""
    of: int
    """Images of the whole group."""
    images: Sequence[ImageParams]
    left: int
    """Images without a result."""


def _parts(groups: Iterable[Sequence[ImageParams] | None], size: int) -> Iterator[_Part | None]:
    group = -1
    for images in groups:
        if images is None:
            yield None
            continue
        group += 1
        for first in range(0, len(images), size):
            part = images[first : first + size]
            yield _Part(group, first, len(images), part, len(part))
