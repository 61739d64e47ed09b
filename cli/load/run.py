"""Put a service under a load: try each kind of request once, send the requests, and report what became of them."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version

from cli.client import AsyncClient, ClientError, ModelInfo
from cli.load.loops import closed_loop, open_loop, poisson_times
from cli.load.mixture import RequestKind
from cli.load.recorder import Recorder
from cli.load.report import Group, KindReport, Percentiles, Report, ServedBy, count_failures

WATCH_S = 0.25
"""Interval between two looks at a running load."""

Watch = Callable[[Recorder, float], object]
"""Shows a running load, given its records and the seconds since its start."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is sent, and when."""

    kinds: tuple[RequestKind, ...]
    duration_s: float
    seed: int
    rate: float | None = None
    """Requests per second of an open loop; None: a closed loop."""
    concurrency: int = 1
    """Requests in flight of a closed loop."""


class TrialFailed(Exception):
    """The service does not answer a kind of request even without a load."""


async def try_kinds(client: AsyncClient, kinds: Sequence[RequestKind]) -> dict[str, float]:
    """Send one request of each kind, one after the other, so that a wrong mixture is found before the load.

    Args:
        client: with retries, because another load may be on the service.
        kinds: the kinds.

    Returns:
        Latency in seconds, by name of the kind.

    Raises:
        TrialFailed: a request failed; the message has the kind and the service's reason.
    """
    taken = {}
    for kind in kinds:
        begun = time.perf_counter()
        try:
            await client.generate(**kind.fields)
        except ClientError as error:
            raise TrialFailed(f"mix: {kind.name}: {error}") from error
        taken[kind.name] = time.perf_counter() - begun
    return taken


async def run_load(
    client: AsyncClient, load: Load, *, url: str, models: Sequence[ModelInfo], alone_s: dict[str, float], watch: Watch
) -> Report:
    """Put a service under a load until all requests are answered, or a signal ends it.

    Args:
        client: without retries and without a limit of connections.
        load: what is sent.
        url: of the service, for the report.
        models: the served models, the default one first.
        alone_s: latency of a lone request by kind.
        watch: called several times a second.
    """
    started, begun = datetime.now(UTC), time.perf_counter()

    def now() -> float:
        return round(time.perf_counter() - begun, 6)

    recorder = Recorder(client, load.kinds, load.seed, now)
    if load.rate is None:
        loop = closed_loop(load.concurrency, load.duration_s, recorder.send, now)
    else:
        times = poisson_times(load.rate, load.duration_s, random.Random(load.seed))  # noqa: S311  # nothing secret
        loop = open_loop(times, recorder.send, now)
    sending = asyncio.create_task(loop)
    with _on_signal(sending.cancel):
        while not sending.done():
            await asyncio.wait({sending}, timeout=WATCH_S)
            watch(recorder, now())
    ended_early = sending.cancelled()
    if not ended_early:
        sending.result()  # raises what was no failure of a request
    recorder.give_up()
    elapsed_s = now() if ended_early else max(now(), load.duration_s)
    records = sorted(recorder.records, key=lambda record: record.due_s)
    used = {kind.fields.get("model", models[0].name) for kind in load.kinds}
    return Report(
        version=version("iddpm"),
        url=url,
        started=started,
        models=[
            ServedBy(name=model.name, backend=model.backend, numerics_id=model.numerics_id)
            for model in models
            if model.name in used
        ],
        rate=load.rate,
        concurrency=load.concurrency if load.rate is None else None,
        duration_s=load.duration_s,
        seed=load.seed,
        elapsed_s=elapsed_s,
        ended_early=ended_early,
        late_s=Percentiles.of(record.sent_s - record.due_s for record in records),
        failures=count_failures(records),
        all=Group.of(records, elapsed_s),
        kinds=[
            KindReport(
                **Group.of(
                    [record for record in records if record.kind == kind.name], elapsed_s, alone_s.get(kind.name)
                ).__dict__,
                name=kind.name,
                weight=kind.weight,
                fields=dict(kind.fields),
            )
            for kind in load.kinds
        ],
        requests=records,
    )


@contextmanager
def _on_signal(act: Callable[[], object]) -> Iterator[None]:
    """Call a function on SIGINT or SIGTERM instead of ending the process."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, act)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
