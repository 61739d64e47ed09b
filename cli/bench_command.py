"""`iddpm bench`: put a service under a load, and report latency, waiting times, errors and images per second."""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.errors import fail, needs_extra

if TYPE_CHECKING:
    from cli.load.report import Report
    from cli.load.run import Load

DEFAULT_RATE = 1.0


def bench_command(
    url: Annotated[str, typer.Argument(help="Address of the service, http://HOST:PORT; /v1 at the end is ignored.")],
    rate: Annotated[
        float | None,
        typer.Option(
            min=0.001, max=10_000, help="Requests per second, sent at the times of a Poisson process. Default: 1."
        ),
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Instead of --rate: number of requests kept in flight.")
    ] = None,
    duration: Annotated[
        float, typer.Option(min=0.1, max=86_400, help="Seconds in which requests are sent; their answers are awaited.")
    ] = 30.0,
    mix: Annotated[
        list[str] | None,
        typer.Option(
            help="Kind of request, e.g. 'steps=50,n=4,sampler=ddim,weight=3': fields of POST /v1/generate, and the "
            "weight of the kind. Can be repeated; or a JSON file with a list of kinds. Default: one image."
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of the load: times, kinds and seeds of images. Default: random.")
    ] = None,
    key: Annotated[str | None, typer.Option(envvar="IDDPM_KEY", help="API key, if the service needs one.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="JSON file for the results, with every request.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="PNG file for latency over time and its distribution. Needs the extra plots.")
    ] = None,
) -> None:
    """Put a service under a load and report latency, waiting times, errors and images per second.

    Each kind of request is tried once before. Latency counts from the time for which a request was planned, whatever
    happened to earlier ones. No request is sent twice. Ctrl-C ends the load, and the report has what was measured.
    """
    from cli.client import ClientError
    from cli.load.mixture import read_mixture
    from cli.load.run import Load, TrialFailed
    from cli.load.text import report_text
    from formats.atomic_file import write_file

    if rate is not None and concurrency is not None:
        fail("--rate and --concurrency exclude each other: give one of them", code=2)
    for option, path, suffix in (("--out", out, ".json"), ("--plot", plot, ".png")):
        if path is not None and (path.suffix != suffix or not path.resolve().parent.is_dir()):
            fail(f"{option}: must be a {suffix} file in a folder that exists; got {str(path)!r}", code=2)
    if plot is not None:
        with needs_extra("plots"):
            import matplotlib  # noqa: F401  # before the load, not after it
    try:
        load = Load(
            kinds=read_mixture(mix or ()),
            duration_s=duration,
            seed=secrets.randbelow(2**32) if seed is None else seed,
            rate=DEFAULT_RATE if rate is None and concurrency is None else rate,
            concurrency=concurrency or 1,
        )
        report = asyncio.run(_bench(url, key, load))
        typer.echo(report_text(report))
        if out is not None:
            write_file(out, report.model_dump_json(indent=1).encode())
        if plot is not None:
            from cli.load.plot import latency_plot

            write_file(plot, latency_plot(report))
    except (ClientError, TrialFailed, OSError, ValueError) as error:
        fail(error)
    if not report.all.answered:
        fail("no request was answered")


async def _bench(url: str, key: str | None, load: Load) -> Report:
    from cli.client import AsyncClient
    from cli.load.progress import live_progress
    from cli.load.run import run_load, try_kinds
    from cli.sample_remote import show_retries

    async with AsyncClient(url, key=key) as client:
        with show_retries():
            models = await client.models()
            typer.echo(f"trying each kind of request: {', '.join(kind.name for kind in load.kinds)}", err=True)
            alone_s = await try_kinds(client, load.kinds)
        name = client.name
    async with AsyncClient(url, key=key, patience_s=0, max_connections=None) as client:
        with live_progress(load.duration_s) as watch:
            return await run_load(client, load, url=name, models=models, alone_s=alone_s, watch=watch)
