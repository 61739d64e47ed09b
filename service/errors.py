"""The service's exception tree; `service.http.problems` maps it to HTTP.

ServiceError
├── MalformedJson         the body is not valid JSON
├── MalformedForm         the body is not a valid multipart form
├── InvalidRequest        a field breaks a rule; names the field, the rule and the allowed values
├── NotAcceptable         the Accept header excludes every available media type
├── UnknownModel          no model of that name is served
├── Forbidden             the key is not allowed to do this
├── LoadFailed            a folder cannot be served; the served models do not change
├── LoadConflict          a model cannot be loaded or unloaded in the current state
├── DeadlineUnmeetable    the predicted finish is later than the deadline; gives the predicted time
├── TooLong               the images would take longer than the service allows; gives the predicted time
├── Unavailable           the request is valid, but the service cannot accept it now
│   ├── QueueFull
│   ├── ClientLimit       the client has reached its share of the queue
│   └── Draining
└── GenerationFailed      the request was accepted, but generation failed
    ├── ImageFailed       the network raised an exception for this image; other images are not affected
    ├── NotFinite         this image overflowed; other images are not affected
    ├── Aborted           the client disconnected or cancelled
    ├── TimedOut          the request exceeded the service's time limit
    └── EngineDead        the engine stopped with an error; raised for all its requests
ModelError                a model folder cannot be served; ends start-up
KeysError                 a keys file cannot be read or written; ends start-up, and `iddpm keys`
TracingError              tracing is configured but cannot be started; ends start-up
AddressError              the service cannot listen on its address; ends start-up
"""

from __future__ import annotations

from diffusion.quoting import quoted


class ServiceError(Exception):
    """Base of the errors that are reported to clients."""


class MalformedJson(ServiceError):
    """The body is not valid JSON."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the body is not valid JSON: {reason}")


class MalformedForm(ServiceError):
    """The body is not a valid multipart form."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the body is not a valid form: {reason}")


class InvalidRequest(ServiceError):
    """A field breaks a rule."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class NotAcceptable(ServiceError):
    """The Accept header excludes every available media type."""

    def __init__(self, accept: str, forms: list[str]) -> None:
        super().__init__(f"Accept: must allow {', '.join(forms)} or */*; got {quoted(accept)}")


class UnknownModel(ServiceError):
    """No model of that name is served."""

    def __init__(self, name: str, known: list[str]) -> None:
        super().__init__(f"model: must be one of {', '.join(known)}; got {quoted(name)}")


class Forbidden(ServiceError):
    """The key is not allowed to do this."""


class LoadFailed(ServiceError):
    """A folder cannot be served. The message names no files; the log does."""


class LoadConflict(ServiceError):
    """A model cannot be loaded or unloaded in the current state."""


class DeadlineUnmeetable(ServiceError):
    """The predicted finish is later than the deadline; no work was done."""

    def __init__(self, deadline_s: float, predicted_s: float) -> None:
        super().__init__(
            f"deadline_s: predicted to finish in {predicted_s:.3g} s; got a deadline of {deadline_s:.3g} s"
        )
        self.deadline_s = deadline_s
        self.predicted_s = predicted_s


class TooLong(ServiceError):
    """The images would take longer than the service allows, with nothing ahead of them; no work was done."""

    def __init__(self, longest_s: float, predicted_s: float) -> None:
        super().__init__(
            f"predicted to take {predicted_s:.3g} s alone, the longest that the service allows is {longest_s:.3g} s; "
            "fewer images or fewer steps take less time"
        )
        self.predicted_s = predicted_s


class Unavailable(ServiceError):
    """The request was refused before any work was done; a later retry is safe."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(Unavailable):
    """The queue is full."""


class ClientLimit(Unavailable):
    """The client has as much work in flight as one client is allowed."""


class Draining(Unavailable):
    """The service is starting up, shutting down, or its engine has stopped."""


class GenerationFailed(ServiceError):
    """An accepted request failed."""


class ImageFailed(GenerationFailed):
    """The network raised an exception for an image, even when the image was computed alone."""


class NotFinite(GenerationFailed):
    """An image overflowed."""


class Aborted(GenerationFailed):
    """The client disconnected or cancelled."""


class TimedOut(GenerationFailed):
    """The request exceeded the service's time limit; its rows are free."""


class EngineDead(GenerationFailed):
    """The engine stopped with an error, or hangs."""


class ModelError(Exception):
    """A model folder cannot be served."""


class KeysError(Exception):
    """A keys file cannot be read or written."""


class TracingError(Exception):
    """Tracing is configured but cannot be started."""


class AddressError(Exception):
    """The service cannot listen on its address."""
