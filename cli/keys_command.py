"""`iddpm keys`: who may use a service. The file is read by `iddpm serve` (IDDPM_KEYS_FILE) whenever it changes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.errors import fail

File = Annotated[Path, typer.Option("--file", envvar="IDDPM_KEYS_FILE", help="The keys file.")]
Name = Annotated[str, typer.Argument(help="Whose key: letters, digits and _ . - only; stands in the log.")]

keys_app = typer.Typer(no_args_is_help=True, help="API keys: add, list, remove. A running service notices.")


@keys_app.command("add")
def add_key(
    name: Name,
    file: File,
    images_in_flight: Annotated[
        int | None, typer.Option(help="Images accepted and not yet done; 0: may look, not generate.")
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="POST requests, whatever becomes of them.")] = None,
    row_steps_per_request: Annotated[
        int | None, typer.Option(help="Images x steps of one request, twice that with classifier-free guidance.")
    ] = None,
    admin: Annotated[
        bool, typer.Option("--admin", help="Let this key load and unload models (needs IDDPM_ADMIN_ROOT).")
    ] = False,
) -> None:
    """Make a key and print it, once: the file holds its hash."""
    from pydantic import ValidationError

    from diffusion.checkpoint_config import describe_validation_error
    from service.api.keys import ApiKey, Limits, hash_of, new_key, read_keys, write_keys
    from service.errors import KeysError

    key = new_key()
    try:
        limits = Limits(
            images_in_flight=images_in_flight,
            requests_per_minute=requests_per_minute,
            row_steps_per_request=row_steps_per_request,
        )
        added = ApiKey(name=name, sha256=hash_of(key), limits=limits, admin=admin)
        known = read_keys(file) if file.exists() else ()
        if any(name == other.name for other in known):
            fail(f"{file} has a key of the name {name}: remove it first, or give both a name")
        write_keys(file, [*known, added])
    except ValidationError as error:
        fail(describe_validation_error(error), code=2)
    except KeysError as error:
        fail(error)
    typer.echo(key)
    typer.echo(f"Added to {file}. This is the only time that the key is shown.", err=True)


@keys_app.command("list")
def list_keys(file: File) -> None:
    """Print the names, the beginnings of the hashes and the limits."""
    from service.api.keys import read_keys
    from service.errors import KeysError

    try:
        known = read_keys(file)
    except KeysError as error:
        fail(error)
    for key in known:
        limits = [f"{limit}={value}" for limit, value in key.limits if value is not None]
        typer.echo("  ".join([key.name, key.sha256[:12], *(["admin"] if key.admin else []), *limits]))


@keys_app.command("remove")
def remove_key(name: Name, file: File) -> None:
    """Take a key back; what it has in flight is still answered."""
    from service.api.keys import read_keys, write_keys
    from service.errors import KeysError

    try:
        known = read_keys(file)
        if all(name != key.name for key in known):
            fail(f"{file} has no key of the name {name}")
        write_keys(file, [key for key in known if key.name != name])
    except KeysError as error:
        fail(error)
