"""Generate many images of one seed into a folder, and continue after any interruption."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from cli.bulk_order import Conditions, requests_for

if TYPE_CHECKING:
    from cli.local_engine import LocalEngine
    from formats.generated_folder import GeneratedFolder
    from formats.generation import Generation
    from formats.images import Uint8Array

Advance = Callable[[float], None]
"""Called with the images generated since the last call, parts of images counted; its exceptions must be passed on."""
Produce = Callable[[list[range], Advance], "Iterator[tuple[range, Uint8Array]]"]
"""Generates the images of some shards, and yields each shard with its pixels, [n, H, W, C], in any order."""


class BulkStopped(Exception):
    """Generation was stopped by a request."""


def produce_here(engine: LocalEngine, generation: Generation, conditions: Conditions | None = None) -> Produce:
    """Return a function that generates shards with an engine in this process.

    At most two shards are generated while one is written and one waits to be. The function raises GenerationFailed if
    an image failed, ValueError if a conditioning image cannot be read.
    """

    def produce(missing: list[range], advance: Advance) -> Iterator[tuple[range, Uint8Array]]:
        import numpy as np

        (first,) = requests_for(engine, generation, range(1), conditions)
        groups = (requests_for(engine, generation, images, conditions) for images in missing)
        for number, pixels in engine.run(groups, lambda rows: advance(rows / first.row_steps)):
            yield missing[number], np.stack(pixels)

    return produce


def generate_into(out: Path, generation: Generation, produce: Produce, command: Sequence[str] = ("iddpm",)) -> None:
    """Generate the images that a folder lacks, with a progress bar, and complete the folder.

    SIGTERM, SIGHUP and Ctrl-C end the command when the shard that is being written is whole; it says how to continue.

    Args:
        out: the folder.
        generation: the images.
        produce: generates images; its exceptions are passed on.
        command: the program, as a user starts it.

    Raises:
        GenerationError: the folder holds other images or other files, or the format cannot hold the images.
        FolderInUse: another process writes there.
        OSError: a file cannot be written.
    """
    from formats.generated_folder import generated_folder
    from trainer.stop_request import StopRequest

    stop = StopRequest()
    try:
        with generated_folder(out, generation) as folder, stop.on_signals():
            if folder.unlocked is not None:
                typer.echo(
                    f"warning: {out} cannot be locked ({folder.unlocked.strerror}): make sure that no other process "
                    "writes there",
                    err=True,
                )
            _generate_missing(folder, produce, stop)
    except BulkStopped:
        typer.echo(f"stopped; to continue: {shlex.join([*command, *sys.argv[1:]])}", err=True)
        raise typer.Exit(128 + (stop.signal or 0)) from None


def _generate_missing(folder: GeneratedFolder, produce: Produce, stop: Callable[[], bool]) -> None:
    """Generate what is missing.

    Raises:
        BulkStopped: `stop`, which is asked whenever there is progress, returned True. Shards that were complete are
            written.
    """
    from tqdm import tqdm

    generation, missing = folder.generation, folder.missing()
    bar = tqdm(
        total=generation.count,
        initial=generation.count - sum(map(len, missing)),
        bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} [{elapsed}<{remaining}, {rate_fmt}]",
        desc="generating",
        unit="img",
        dynamic_ncols=True,
        file=sys.stderr,
    )

    def advance(images: float) -> None:
        if images:
            bar.update(images)
        if stop():
            raise BulkStopped

    with bar, _writer(folder) as write:
        for images, pixels in produce(missing, advance) if missing else ():
            write(images, pixels)
        bar.update(generation.count - bar.n)  # parts of images may not add up exactly
    folder.finish()


@contextmanager
def _writer(folder: GeneratedFolder) -> Iterator[Callable[[range, Uint8Array], None]]:
    """Yield a function that writes a shard in another thread, so that the engine need not wait for files.

    The function waits until the shard before is written. What it was given is written when the block ends, also by an
    exception.
    """
    last: Future[None] | None = None

    def write(images: range, pixels: Uint8Array) -> None:
        nonlocal last
        if last is not None:
            last.result()
        last = pool.submit(folder.write, images, pixels)

    with ThreadPoolExecutor(1, thread_name_prefix="shards") as pool:
        yield write
        if last is not None:
            last.result()
