"""The service's exception tree; `service.http.problems` maps it to HTTP.

ServiceError
├── MalformedJson         the body is no JSON
├── InvalidRequest        the client asked for something that cannot be: names the field, the rule, what is allowed
├── NotAcceptable         the client accepts no available form of an answer
├── UnknownModel          no model of that name is served
├── Forbidden             the key may not do that
├── LoadFailed            a folder that cannot be served; what was served before still is
├── LoadConflict          models cannot be loaded or unloaded like that now
├── DeadlineUnmeetable    it could not be done in time; says when it would be
├── Unavailable           the request was fine, the service cannot take it now
│   ├── QueueFull
│   ├── ClientLimit       this client holds its part of the queue
│   └── Draining
└── GenerationFailed      accepted, but did not come to pictures
    ├── ImageFailed       the network raised on this image; its neighbours are fine
    ├── NotFinite         this image's numbers overflowed; its neighbours are fine
    ├── Aborted           the client went away, or asked to stop
    ├── TimedOut          it took longer than the service allows
    └── EngineDead        the engine stopped with an error; every request it held gets this
ModelError                a model folder that cannot be served; ends start-up
KeysError                 a keys file that cannot be read or written; ends start-up, and `iddpm keys`
TracingError              traces are asked for and cannot be told; ends start-up
AddressError              the port is taken; ends start-up
"""

from __future__ import annotations

from diffusion.quoting import quoted


class ServiceError(Exception):
    """Anything a client can be told."""


class MalformedJson(ServiceError):
    """A body that is no JSON."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the body is not valid JSON: {reason}")


class InvalidRequest(ServiceError):
    """A field breaks a rule."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class NotAcceptable(ServiceError):
    """The Accept header excludes every available form of an answer."""

    def __init__(self, accept: str, forms: list[str]) -> None:
        super().__init__(f"Accept: must allow {', '.join(forms)} or */*; got {quoted(accept)}")


class UnknownModel(ServiceError):
    """No model of that name."""

    def __init__(self, name: str, known: list[str]) -> None:
        super().__init__(f"model: must be one of {', '.join(known)}; got {quoted(name)}")


class Forbidden(ServiceError):
    """The key may not do that."""


class LoadFailed(ServiceError):
    """A folder that cannot be served; says nothing of files, the log does."""


class LoadConflict(ServiceError):
    """Models cannot be loaded or unloaded like that now."""


class DeadlineUnmeetable(ServiceError):
    """The predicted finish is later than the deadline; nothing was done."""

    def __init__(self, deadline_s: float, predicted_s: float) -> None:
        super().__init__(f"deadline_s: would be done in {predicted_s:.3g} s, wanted within {deadline_s:.3g} s")
        self.deadline_s = deadline_s
        self.predicted_s = predicted_s


class Unavailable(ServiceError):
    """Refused before any work was done; trying again later is safe."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(Unavailable):
    """As much is in flight as the queue allows."""


class ClientLimit(Unavailable):
    """As much of this client's is in flight as one client may hold."""


class Draining(Unavailable):
    """The service is starting up, shutting down, or its engine has stopped."""


class GenerationFailed(ServiceError):
    """An accepted request did not come to pictures."""


class ImageFailed(GenerationFailed):
    """The network raised on an image, also without others beside it."""


class NotFinite(GenerationFailed):
    """An image's numbers overflowed."""


class Aborted(GenerationFailed):
    """The client went away or cancelled."""


class TimedOut(GenerationFailed):
    """The request took longer than the service allows; its rows are free."""


class EngineDead(GenerationFailed):
    """The engine stopped with an error, or hangs."""


class ModelError(Exception):
    """A model folder that cannot be served."""


class KeysError(Exception):
    """A keys file that cannot be read or written."""


class TracingError(Exception):
    """Traces are asked for and cannot be told."""


class AddressError(Exception):
    """The service cannot listen where it is told to."""
