"""The folder of a training run: its layout, and the lock that allows one writer.

    train_config.json       the configuration
    metrics.jsonl           a line of means every few batches
    checkpoints/N/          a checkpoint after N images, with `state/` to resume from
    model/                  the newest checkpoint without `state/`, for the service
    ema/N.safetensors       power-function averages, and those of several decays, if the configuration lists some
    samples/N.png           a preview per checkpoint
    tensorboard/            event files, if the configuration asks for them
    validation.jsonl        a line per validation, if images are held out
    best/                   the model with the lowest loss on held-out images
    .lock                   held by the process that trains

The training process claims the folder first. It writes only to a folder that is free or that contains a run.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tqdm import tqdm

from formats.artifact import INSIDE_CHECKPOINT
from formats.atomic_folder import may_replace
from formats.checkpoint_config import CONFIG_FILE, WEIGHTS_FILE
from formats.classifier_folder import CLASSIFIER_FOLDER
from formats.folder_lock import LOCK_FILE, FolderInUse, folder_lock
from formats.leftovers import remove_leftovers
from trainer.errors import TrainError

TRAIN_CONFIG_FILE = "train_config.json"
LOG_FILE = "metrics.jsonl"
OLD_LOG_FILE = "log.jsonl"
"""Name of the log in earlier versions; renamed when such a run is resumed."""
MODEL_FOLDER = "model"
CHECKPOINTS_FOLDER = "checkpoints"
EMA_FOLDER = "ema"
SAMPLES_FOLDER = "samples"
VALIDATION_FILE = "validation.jsonl"
BEST_FOLDER = "best"
WRITTEN_IN_MODELS = (CONFIG_FILE, WEIGHTS_FILE)
"""What a run writes in its folders that are models, MODEL_FOLDER and BEST_FOLDER."""


def checkpoints(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first, without checking their content."""
    found = [path for path in (run / CHECKPOINTS_FOLDER).glob("*") if path.name.isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name))


def newest_checkpoint(run: Path) -> Path:
    """Return the newest checkpoint folder of a run.

    Raises:
        TrainError: there is none; the message tells whether a run can be started there.
    """
    if found := checkpoints(run):
        return found[-1]
    _refuse_unfit(run, resume=False)
    raise TrainError(f"{run} holds no checkpoint to resume from; omit --resume to start a run there")


def checkpoint_folder(run: Path, images_seen: int) -> Path:
    """Return the folder of the checkpoint after `images_seen` images."""
    return run / CHECKPOINTS_FOLDER / f"{images_seen:012d}"


def ema_snapshot_file(run: Path, images_seen: int) -> Path:
    """Return the file with a snapshot of the averages after `images_seen` images."""
    return run / EMA_FOLDER / f"{images_seen:012d}.safetensors"


def delete_old(run: Path, keep: int) -> None:
    """Delete all but the newest checkpoints."""
    for folder in checkpoints(run)[:-keep]:
        shutil.rmtree(folder)


def check_out(run: Path, *, resume: bool) -> None:
    """Check, without changing anything, that `claimed` would accept a folder now.

    Raises:
        TrainError: it would not, or the folder cannot be written to.
    """
    _refuse_unfit(run, resume=resume)
    existing = next(path for path in (run.absolute(), *run.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise TrainError(f"--out must be a folder; {existing} is not one")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise TrainError(f"--out must be a folder that this user may write to; {existing} is not one")
    if (run / LOCK_FILE).exists():
        with _locked(run):
            pass


@contextmanager
def claimed(run: Path, *, resume: bool) -> Iterator[None]:
    """Claim a folder for a new or resumed run, and lock other processes out until the run ends.

    Raises:
        TrainError: another process trains there, the folder already contains a run, there is none to resume, or files
            that no run wrote would be overwritten. Nothing has been written then.
    """
    _refuse_unfit(run, resume=resume)
    run.mkdir(parents=True, exist_ok=True)
    with _locked(run):
        _refuse_unfit(run, resume=resume)  # check again: another run may have started or ended meanwhile
        for path in (run / MODEL_FOLDER, run / BEST_FOLDER, run / TRAIN_CONFIG_FILE, *checkpoints(run)):
            remove_leftovers(path)
        for folder in (run / CHECKPOINTS_FOLDER, run / EMA_FOLDER, run / SAMPLES_FOLDER):
            _remove_halves(folder)
        if (resume or _began_a_run(run)) and (run / OLD_LOG_FILE).is_file() and not (run / LOG_FILE).exists():
            (run / OLD_LOG_FILE).rename(run / LOG_FILE)
        yield


def _refuse_unfit(run: Path, *, resume: bool) -> None:
    if run.exists() and not run.is_dir():
        raise TrainError(f"--out must be a folder; {run} is not one")
    for name in (CHECKPOINTS_FOLDER, MODEL_FOLDER, EMA_FOLDER, SAMPLES_FOLDER, BEST_FOLDER):
        if (run / name).exists() and not (run / name).is_dir():
            raise TrainError(
                f"{run / name} exists and is not a folder; a run has a folder of that name: use another --out"
            )
    if resume:
        newest_checkpoint(run)
        for folder in (run / MODEL_FOLDER, run / BEST_FOLDER):
            _refuse_other_files(folder)
        return
    if checkpoints(run):
        raise TrainError(f"{run} already contains a run; use another --out, or --resume to continue it")
    for name in (MODEL_FOLDER, EMA_FOLDER, SAMPLES_FOLDER, BEST_FOLDER):
        if (run / name).is_dir() and any(not entry.name.startswith(".") for entry in (run / name).iterdir()):
            raise TrainError(
                f"{run / name} would be overwritten, and there is no checkpoint to resume from; use another --out, or "
                "move it"
            )
    if not _began_a_run(run):
        for name in (LOG_FILE, VALIDATION_FILE, TRAIN_CONFIG_FILE):
            if (run / name).exists():
                raise TrainError(f"{run / name} was not written by a run of iddpm and would be lost; use another --out")


def _refuse_other_files(folder: Path) -> None:
    """Check that a folder which will be replaced with a newer model has nothing in it that would be lost.

    Hidden files, which file managers write, are not counted.
    """
    if not may_replace(folder, CONFIG_FILE, ("model", "diffusion")):
        raise TrainError(f"{folder} contains other files than a model, which would be lost; move it")
    known = (*WRITTEN_IN_MODELS, CLASSIFIER_FOLDER, INSIDE_CHECKPOINT)
    entries = folder.iterdir() if folder.is_dir() else ()
    if others := sorted(path.name for path in entries if path.name not in known and not path.name.startswith(".")):
        raise TrainError(
            f"{folder} is replaced with each newer model, and these files in it would be lost: {', '.join(others)}; "
            "move them"
        )


def _began_a_run(run: Path) -> bool:
    """Return whether a run started here and ended before its first checkpoint."""
    return (run / TRAIN_CONFIG_FILE).is_file() and may_replace(
        run, TRAIN_CONFIG_FILE, ("model", "diffusion", "total_images")
    )


@contextmanager
def _locked(run: Path) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            unlocked = stack.enter_context(folder_lock(run))
        except FolderInUse as error:
            raise TrainError(
                f"{run} is in use by another training run ({error.holder}); use another --out, or wait until it has "
                "ended"
            ) from error
        if unlocked is not None:
            warn(f"{run} cannot be locked ({unlocked.strerror}): make sure that no other run writes there")
        yield


def _remove_halves(folder: Path) -> None:
    """Remove incomplete files of a killed run from a folder that only the run writes to."""
    for path in folder.glob(".*.new-*"):
        remove_leftovers(path.with_name(path.name[1:].rpartition(".new-")[0]))


def say(message: str) -> None:
    """Print a line on standard error without breaking a progress bar."""
    tqdm.write(message, file=sys.stderr)


def warn(message: str) -> None:
    """Print a warning on standard error."""
    say(f"warning: {message}")
