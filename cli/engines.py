"""Building engines of TensorRT, with progress for people. What `iddpm serve --build` gives to the service."""

from __future__ import annotations

from pathlib import Path

import typer

from diffusion.tensorrt_files import Target


def build_engines(artifact: Path, target: Target, buckets: tuple[int, ...]) -> None:
    """Build the engines of some batch sizes that are missing or would be refused.

    Raises:
        ArtifactError: an artifact that cannot be read.
        EngineError: a build that failed.
    """
    from model_export.tensorrt_build import build_missing

    build_missing(artifact, target, buckets, say=lambda line: typer.echo(line, err=True), progress=show_phase)


def show_phase(phase: str, done: int, of: int) -> None:
    """Say what TensorRT is at: each phase as it begins, on a line of its own."""
    if done == 0:
        typer.echo(f"  {phase} ({of} steps)", err=True)
