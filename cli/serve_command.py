"""`iddpm serve`: serve models over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli.engines import build_engines
from cli.errors import fail


def serve_command(
    model: Annotated[
        list[Path] | None,
        typer.Option(help="Model folder, as FOLDER or NAME=FOLDER. Can be repeated; the first model is the default."),
    ] = None,
    cascade: Annotated[
        list[str] | None,
        typer.Option(help="NAME=BASE+UPSAMPLER: serve two of the models as one, which enlarges the base's images."),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; '': all addresses. Default: 127.0.0.1.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0: any free port. Default: 8000.")] = None,
    backend: Annotated[str | None, typer.Option(help="auto, {backends}. Default: auto.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of a network call. Default: all usable CPUs.")] = None,
    build: Annotated[
        bool | None, typer.Option("--build", help="Build missing TensorRT engines, which takes minutes for each.")
    ] = None,
) -> None:
    """Serve models over HTTP.

    Every setting can be given as an environment variable IDDPM_NAME (see docs/settings.md); options take precedence.
    """
    from pydantic import ValidationError

    from formats.checkpoint_config import describe_validation_error
    from service.errors import AddressError, KeysError, ModelError, TracingError
    from service.http.app import create_app
    from service.http.door.address import refuse_taken_address
    from service.http.server import serve
    from service.logs import configure_logging
    from service.settings import Settings, refuse_unknown_variables

    flags: dict[str, Any] = {"host": host, "port": port, "backend": backend, "threads": threads}
    flags["build_engines"] = build
    flags["models"] = tuple(model) if model else None
    flags["cascades"] = tuple(cascade) if cascade else None
    configure_logging()
    try:
        refuse_unknown_variables()
        settings = Settings(**{name: value for name, value in flags.items() if value is not None})
        refuse_taken_address(settings.host, settings.port)
        app = create_app(settings, build_engines)
    except ValidationError as error:
        fail(describe_validation_error(error), code=2)
    except (AddressError, KeysError, ModelError, TracingError, ValueError) as error:
        fail(error)
    try:
        ended_well = serve(app, settings)
    except AddressError as error:  # the port was taken while models were loaded
        fail(error)
    if not ended_well:
        raise typer.Exit(1)
