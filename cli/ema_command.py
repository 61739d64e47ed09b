"""`iddpm ema`: the weights of a finished run, averaged over another share of the training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.errors import fail, needs_extra

POOR_FIT = 0.05
"""Relative error of a profile above which the user is warned: more snapshots would be needed."""


def ema_command(
    run: Annotated[Path, typer.Argument(help="Folder of a run that was trained with ema_sigma_rels.")],
    out: Annotated[Path, typer.Argument(help="Folder of the checkpoint to write.")],
    sigma_rel: Annotated[float, typer.Option(help="Relative width of the average, 0.01 to 0.25; larger is smoother.")],
    at_images: Annotated[
        int | None, typer.Option(help="End of the average in training images; default: the last snapshot.")
    ] = None,
) -> None:
    """Choose the width of the weights' average after training (post-hoc EMA, arXiv:2312.02696)."""
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
            "the snapshots describe this width poorly; take one nearer to ema_sigma_rels", err=True, fg="yellow"
        )
