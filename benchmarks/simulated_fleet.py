"""N replicas behind a proxy, on a virtual clock: the service's own admission, scheduler and client, and no model.

Real are `Admission` (queue limit, predicted wait, Retry-After), `Scheduler`, `StepCosts` with the width that `knee`
chooses, and the retries of the client library. Simulated are:

- a step, which takes c(n) for n rows;
- the proxy: it sends a request to a replica that has less than `max_connections` of them, or lets it wait in one queue
  for the first replica that is free; a request that a replica refuses goes to another one, `retries` times. The
  defaults are those of deploy/haproxy/haproxy.cfg;
- the network between them, which takes no time.

Not simulated: the trial widths, failing replicas, and the time of HTTP and of encoding.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol

import httpx

from benchmarks.simulate import MODEL, as_request
from benchmarks.simulate import Arrival as PatientArrival
from benchmarks.traffic import Arrival
from cli.retries import Retries
from service.engine.admission import Admission
from service.engine.config import EngineConfig
from service.engine.request import GenerationRequest, Image, StepBatch
from service.engine.scheduler import Scheduler
from service.engine.snapshot import Snapshot
from service.engine.step_costs import StepCosts, knee
from service.errors import Unavailable

Balance = Literal["least-connections", "least-work", "round-robin", "random"]


class SteppedDevice(Protocol):
    """A device on which the time of a step depends on its rows only."""

    @property
    def width(self) -> int:
        """Maximum rows of a step."""
        ...

    @property
    def capacity(self) -> float:
        """Row-steps per second at full width."""
        ...

    def seconds(self, rows: int) -> float:
        """Return the seconds of a step of `rows` rows."""
        ...


@dataclass(frozen=True, kw_only=True)
class Proxy:
    """How requests are distributed."""

    balance: Balance = "least-connections"
    """The replica that gets a request: the one with the fewest requests (HAProxy's leastconn), the one with the fewest
    remaining row-steps (which no proxy knows today), the next one, or any. Equals take turns."""
    max_connections: int = 32
    """Requests that a replica may have; further ones wait in the proxy."""
    queue_s: float = 60.0
    """Maximum wait in the proxy, then 503."""
    retries: int = 3
    """How often a request that was refused is sent to another replica."""
    retry_after_s: float = 10.0
    """Retry-After of the proxy's own 503."""


@dataclass
class FleetOutcome:
    """What happened to the requests."""

    finished: list[float]
    """When each request was answered; infinite if it was refused and its client gave up."""
    refusals: int = 0
    """Answers 503 that clients received."""
    busy_s: list[float] = field(default_factory=list)
    """Seconds of steps, by replica."""
    row_steps: list[int] = field(default_factory=list)
    """Work done, by replica."""


class Replica:
    """One engine on a virtual clock."""

    def __init__(self, device: SteppedDevice, config: EngineConfig) -> None:
        self.connections = 0
        """Requests that it has accepted and not answered."""
        self.chosen = 0
        """When the proxy chose it last, counted in choices."""
        self.busy_s = 0.0
        self.row_steps = 0
        self._device = device
        self._admission, self._scheduler = Admission(config, [MODEL]), Scheduler(config, [MODEL])
        self._costs = StepCosts()
        for rows in range(1, device.width + 1):
            self._costs.observe(rows, device.seconds(rows))
        self._scheduler.set_width(MODEL, knee(self._costs, config.max_rows, config.width_efficiency))
        self._batch: StepBatch | None = None

    @property
    def remaining_row_steps(self) -> int:
        """Return the remaining work of all its requests."""
        return self._scheduler.remaining_row_steps

    def accept(self, request: GenerationRequest, now: float) -> None:
        """Accept a request.

        Raises:
            Unavailable: it is refused.
        """
        scheduler = self._scheduler
        snapshot = Snapshot.of(
            scheduler.started(), scheduler.all_steps(), scheduler.all_widths(), costs={MODEL: self._costs.now}
        )
        images, _ = self._admission.accept(request, now, snapshot)
        scheduler.add(images)
        self.connections += 1

    def begin_step(self, now: float) -> float | None:
        """Begin a step and return its seconds; None if one is under way or there is nothing to do."""
        if self._batch is not None:
            return None
        self._batch = self._scheduler.schedule(now)
        if self._batch is None:
            return None
        took = self._device.seconds(self._batch.rows)
        self.busy_s += took
        self.row_steps += self._batch.rows
        return took

    def end_step(self) -> list[Image]:
        """End the step that is under way and return the images that are done."""
        assert self._batch is not None
        done = self._scheduler.complete(self._batch, [True] * len(self._batch.images))
        self._batch = None
        for image in done:
            self._admission.release(image.request_id, image.position)
        return done


def simulate_fleet(
    device: SteppedDevice,
    replicas: int,
    requests: Sequence[Arrival],
    proxy: Proxy | None = None,
    config: EngineConfig | None = None,
    patience_s: float = 60.0,
    seed: int = 0,
) -> FleetOutcome:
    """Serve all requests.

    Args:
        device: what each replica runs on.
        replicas: how many there are, all alike.
        requests: in the order of their arrival; times in the unit of the device, which is seconds if `config` and
            `proxy` have limits in seconds.
        proxy: how requests are distributed; default: as by deploy/haproxy.
        config: configuration of the engines; default: the service's, with the width of the device.
        patience_s: most seconds that a client waits before its retries, as `patience_s` of the client library.
        seed: of the balance `random`. The clients' pauses use Python's global generator.

    Raises:
        ValueError: `replicas` is less than 1.
    """
    if replicas < 1:
        raise ValueError(f"replicas must be at least 1; got {replicas}")
    config = config or EngineConfig(max_rows=device.width)
    engines = [Replica(device, config) for _ in range(replicas)]
    return _Fleet(engines, requests, proxy or Proxy(), patience_s, random.Random(seed)).serve()  # noqa: S311  # no secret


class _Fleet:
    """The events of one simulation."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        requests: Sequence[Arrival],
        proxy: Proxy,
        patience_s: float,
        draw: random.Random,
    ) -> None:
        self._replicas = replicas
        self._requests = requests
        self._proxy = proxy
        self._draw = draw
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count(1)
        self._images_left = [request.rows for request in requests]
        self._retries = [Retries(patience_s, repeatable=True) for _ in requests]
        self._waiting: dict[int, float] = {}
        """Requests in the proxy's queue, oldest first, with the time at which they entered it."""
        self._outcome = FleetOutcome([math.inf] * len(requests))

    def serve(self) -> FleetOutcome:
        for number, request in enumerate(self._requests):
            self._at(request.at, partial(self._send, number))
        while self._events:
            self._now, _, act = heapq.heappop(self._events)
            act()
        self._outcome.busy_s = [replica.busy_s for replica in self._replicas]
        self._outcome.row_steps = [replica.row_steps for replica in self._replicas]
        return self._outcome

    def _at(self, at: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at, next(self._count), act))

    def _send(self, number: int) -> None:
        """Receive a request from its client."""
        replica = self._choose()
        if replica is None:
            self._wait(number)
        else:
            self._offer(number, replica)

    def _wait(self, number: int) -> None:
        """Put a request into the proxy's queue."""
        self._waiting[number] = self._now
        self._at(self._now + self._proxy.queue_s, partial(self._end_wait, number, self._now))

    def _end_wait(self, number: int, since: float) -> None:
        if self._waiting.get(number) == since:
            del self._waiting[number]
            self._refuse(number, self._proxy.retry_after_s)

    def _offer(self, number: int, replica: Replica) -> None:
        """Send a request to a replica and, while it is refused, to others."""
        drawn = self._requests[number]
        request = as_request(number, PatientArrival(drawn.at, drawn.steps, drawn.rows, patience=None))
        for attempt in itertools.count():
            try:
                replica.accept(request, self._now)
            except Unavailable as refusal:
                if attempt == self._proxy.retries:
                    self._refuse(number, refusal.retry_after_s)
                    return
                other = self._choose(avoided=(replica,)) or self._choose()
                assert other is not None  # `replica` itself has a free connection
                replica = other
            else:
                self._at(self._now, partial(self._begin_step, replica))  # with all that arrive at the same time
                return

    def _refuse(self, number: int, retry_after_s: float) -> None:
        """Answer 503; the client tries again or gives up."""
        self._outcome.refusals += 1
        answer = httpx.Response(503, headers={"Retry-After": str(math.ceil(retry_after_s))})
        pause_s = self._retries[number].pause_after(answer)
        if pause_s is not None:
            self._at(self._now + pause_s, partial(self._send, number))

    def _begin_step(self, replica: Replica) -> None:
        took = replica.begin_step(self._now)
        if took is not None:
            self._at(self._now + took, partial(self._end_step, replica))

    def _end_step(self, replica: Replica) -> None:
        for image in replica.end_step():
            number = int(image.request_id)
            self._images_left[number] -= 1
            if not self._images_left[number]:
                self._outcome.finished[number] = self._now
                replica.connections -= 1
        while self._waiting and replica.connections < self._proxy.max_connections:
            number = next(iter(self._waiting))
            del self._waiting[number]
            self._offer(number, replica)
        self._at(self._now, partial(self._begin_step, replica))

    def _choose(self, avoided: Collection[Replica] = ()) -> Replica | None:
        """Return the replica for the next request; None if none may have another one."""
        limit = self._proxy.max_connections
        free = [replica for replica in self._replicas if replica.connections < limit and replica not in avoided]
        if not free:
            return None
        match self._proxy.balance:
            case "least-connections":
                chosen = min(free, key=lambda replica: (replica.connections, replica.chosen))
            case "least-work":
                chosen = min(free, key=lambda replica: (replica.remaining_row_steps, replica.chosen))
            case "round-robin":
                chosen = min(free, key=lambda replica: replica.chosen)
            case "random":
                chosen = self._draw.choice(free)
        chosen.chosen = next(self._count)
        return chosen
