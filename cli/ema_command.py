"""`iddpm ema`: average the weights of a finished run over another part of the training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.errors import fail, needs_extra

POOR_FIT = 0.05
"""Relative error of the fitted profile above which the command prints a warning: more snapshots would be needed."""


def ema_command(
    run: Annotated[Path, typer.Argument(help="Folder of a run trained with ema_sigma_rels.")],
    out: Annotated[Path, typer.Argument(help="Checkpoint folder to write.")],
    sigma_rel: Annotated[
        float, typer.Option(help="Relative width of the average, 0.01 to 0.25; a larger width is smoother.")
    ],
    at_images: Annotated[
        int | None,
        typer.Option(help="Snapshot at which the average ends, in training images. Default: the last snapshot."),
    ] = None,
) -> None:
    """Write a checkpoint with another EMA width after training.

    Combines the snapshots of a run (post-hoc EMA, arXiv:2312.02696).
    """
    with needs_extra("train"):
        from diffusion.config import CheckpointConfig
        from formats.checkpoint import write_checkpoint
        from formats.checkpoint_config import read_config
        from trainer.posthoc_ema import Profile, combine, fit_profile, list_snapshots
        from trainer.run_folder import EMA_FOLDER, MODEL_FOLDER

    try:
        snapshots = list_snapshots(run / EMA_FOLDER)
        images = [int(snapshot.path.stem) for snapshot in snapshots]
        end = images[-1] if at_images is None else at_images
        if end not in images:
            allowed = ", ".join(map(str, dict.fromkeys(images)))
            fail(f"--at-images must be one of the run's snapshots: {allowed}; got {end}")
        snapshots = [snapshot for snapshot, count in zip(snapshots, images, strict=True) if count <= end]
        wanted = Profile(snapshots[-1].profile.updates, sigma_rel)
        coefficients, error = fit_profile([snapshot.profile for snapshot in snapshots], wanted)
        config = read_config(run / MODEL_FOLDER)
        assert isinstance(config, CheckpointConfig)  # noqa: S101  # what the trainer writes
        average = {"sigma_rel": sigma_rel, "snapshots": len(snapshots), "profile_error": round(error, 4)}
        described = config.replace(provenance={**config.provenance, "images_seen": end, "ema": average})
        write_checkpoint(out, described, combine(snapshots, coefficients))
    except (ValueError, OSError) as problem:
        fail(problem)
    typer.echo(f"averaged: {out} (sigma_rel {sigma_rel:g} at {end} images, profile error {100 * error:.1f} %)")
    if error > POOR_FIT:
        typer.secho(
            "warning: the snapshots fit this width poorly; choose a --sigma-rel nearer to the run's ema_sigma_rels",
            err=True,
            fg="yellow",
        )
