"""`iddpm ema`: write a model from other averages of a run's weights than the one in its `model/`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.errors import fail, needs_extra

if TYPE_CHECKING:
    from trainer.ema_snapshots import Snapshot

POOR_FIT = 0.05
"""Relative error of the fitted profile above which the command prints a warning: more snapshots would be needed."""


def ema_command(
    run: Annotated[Path, typer.Argument(help="Folder of a run with ema_sigma_rels or several ema_decay.")],
    out: Annotated[Path, typer.Argument(help="Checkpoint folder to write.")],
    sigma_rel: Annotated[
        float | None,
        typer.Option(help="Relative width of a power-function average, 0.01 to 0.25; a larger width is smoother."),
    ] = None,
    at_images: Annotated[
        int | None,
        typer.Option(help="Snapshot at which the average ends, in training images. Default: the last snapshot."),
    ] = None,
    decay: Annotated[float | None, typer.Option(help="Decay of an exponential average: one of the run's.")] = None,
) -> None:
    """Write a checkpoint with another average of the weights: of a width chosen after training, or with another decay.

    --sigma-rel combines the snapshots of a run (post-hoc EMA, arXiv:2312.02696); --decay takes one of them.
    """
    if (sigma_rel is None) == (decay is None):
        fail("give either --sigma-rel, the width of an average, or --decay, one of the run's ema_decay")
    with needs_extra("train"):
        import numpy as np

        from formats.checkpoint import write_checkpoint
        from formats.checkpoint_config import read_config
        from trainer.ema_snapshots import list_snapshots
        from trainer.posthoc_ema import Profile, combine, fit_profile
        from trainer.run_folder import EMA_FOLDER, MODEL_FOLDER

    error = 0.0
    try:
        found = list_snapshots(run / EMA_FOLDER)
        snapshots = _of_kind(found, decay, run / MODEL_FOLDER)
        end = snapshots[-1].images if at_images is None else at_images
        snapshots = [snapshot for snapshot in snapshots if snapshot.images <= end]
        if not snapshots or snapshots[-1].images != end:
            allowed = ", ".join(map(str, dict.fromkeys(snapshot.images for snapshot in found)))
            fail(f"--at-images must be one of the run's snapshots: {allowed}; got {end}")
        if sigma_rel is None:
            snapshots, coefficients = snapshots[-1:], np.ones(1)
            average, shown = {"decay": decay}, f"decay {decay}"
        else:
            profiles = [Profile(each.updates, each.sigma_rel) for each in snapshots if each.sigma_rel is not None]
            coefficients, error = fit_profile(profiles, Profile(snapshots[-1].updates, sigma_rel))
            average = {"sigma_rel": sigma_rel, "snapshots": len(snapshots), "profile_error": round(error, 4)}
            shown = f"sigma_rel {sigma_rel:g}"
        config = read_config(run / MODEL_FOLDER)
        described = config.replace(provenance={**config.provenance, "images_seen": end, "ema": average})
        write_checkpoint(out, described, combine(snapshots, coefficients))
    except (ValueError, OSError) as problem:
        fail(problem)
    fit = "" if sigma_rel is None else f", profile error {100 * error:.1f} %"
    typer.echo(f"averaged: {out} ({shown} at {end} images{fit})")
    if error > POOR_FIT:
        typer.secho(
            "warning: the snapshots fit this width poorly; choose a --sigma-rel nearer to the run's ema_sigma_rels",
            err=True,
            fg="yellow",
        )


def _of_kind(found: list[Snapshot], decay: float | None, model: Path) -> list[Snapshot]:
    """Return the snapshots of power-function averages, or those of the exponential average with a decay.

    Raises:
        ValueError: there is none; the message says what the run has.
    """
    decays = dict.fromkeys(snapshot.decay for snapshot in found if snapshot.decay is not None)
    if decay is None:
        if powers := [snapshot for snapshot in found if snapshot.sigma_rel is not None]:
            return powers
        raise ValueError(f"--sigma-rel needs a run with ema_sigma_rels; this one has --decay {_listed(decays)}")
    if not decays:
        raise ValueError(f"--decay needs a run with several ema_decay; the average of this one's only decay is {model}")
    if decay not in decays:
        raise ValueError(f"--decay must be one of the run's ema_decay: {_listed(decays)}; got {decay}")
    return [snapshot for snapshot in found if snapshot.decay == decay]


def _listed(decays: dict[float, None]) -> str:
    return ", ".join(map(str, decays))
