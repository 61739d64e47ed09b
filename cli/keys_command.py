"""`iddpm keys`: manage API keys. `iddpm serve` reads the file (IDDPM_KEYS_FILE) whenever it changes."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from cli.errors import fail

File = Annotated[Path, typer.Option("--file", envvar="IDDPM_KEYS_FILE", help="The keys file.")]
Name = Annotated[str, typer.Argument(help="Name of the key's owner, shown in logs: letters, digits and _ . - only.")]

keys_app = typer.Typer(no_args_is_help=True, help="Add, list and remove API keys; a running service is updated.")


@keys_app.command("add")
def add_key(
    name: Name,
    file: File,
    images_in_flight: Annotated[
        int | None,
        typer.Option(help="Limit of images accepted but not done; 0: no generation. Default: the service's limit."),
    ] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(help="Limit of POST requests, failed ones included. Default: no limit.")
    ] = None,
    row_steps_per_request: Annotated[
        int | None,
        typer.Option(
            help="Limit of images x steps per request, doubled by classifier-free guidance. Default: the service's."
        ),
    ] = None,
    admin: Annotated[
        bool, typer.Option("--admin", help="Allow the key to load and unload models (needs IDDPM_ADMIN_ROOT).")
    ] = False,
) -> None:
    """Create a key and print it once; the file stores only its hash."""
    from pydantic import ValidationError

    from formats.checkpoint_config import describe_validation_error
    from service.errors import KeysError
    from service.http.door.keys import ApiKey, Limits, hash_of, new_key
    from service.http.door.keys_file import add_key as add_to_file

    key = new_key()
    try:
        limits = Limits(
            images_in_flight=images_in_flight,
            requests_per_minute=requests_per_minute,
            row_steps_per_request=row_steps_per_request,
        )
        added = ApiKey(name=name, sha256=hash_of(key), limits=limits, admin=admin)
        add_to_file(file, added, lambda: _show(key))
    except ValidationError as error:
        fail(describe_validation_error(error), code=2)
    except KeysError as error:
        fail(error)
    typer.echo(f"Added to {file}. The key is shown only once.", err=True)


@keys_app.command("list")
def list_keys(file: File) -> None:
    """List keys: name, first digits of the hash, and limits."""
    from service.errors import KeysError
    from service.http.door.keys import read_keys

    try:
        known = read_keys(file)
    except KeysError as error:
        fail(error)
    for key in known:
        limits = [f"{limit}={value}" for limit, value in key.limits if value is not None]
        typer.echo("  ".join([key.name, key.sha256[:12], *(["admin"] if key.admin else []), *limits]))


@keys_app.command("remove")
def remove_key(name: Name, file: File) -> None:
    """Remove a key. Its requests in flight are still answered."""
    from service.errors import KeysError
    from service.http.door.keys_file import remove_key as remove_from_file

    try:
        remove_from_file(file, name)
    except KeysError as error:
        fail(error)


def _show(key: str) -> None:
    """Print a key; end the command if standard output cannot be written."""
    try:
        if sys.stdout is None:  # closed before the command began
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        typer.echo(key)
    except OSError as error:
        with suppress(OSError, ValueError, AttributeError):  # Python would write the rest at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        fail(f"the key cannot be printed and was not stored: standard output: {error.strerror}")
