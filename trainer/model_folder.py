"""Write the folders of a run that are models, `model/` and `best/`, without losing what a user added to them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from formats.artifact import INSIDE_CHECKPOINT
from formats.checkpoint import write_checkpoint
from formats.checkpoint_config import AnyCheckpointConfig
from formats.classifier_folder import CLASSIFIER_FOLDER, find_classifier
from trainer.run_folder import WRITTEN_IN_MODELS, warn


def write_model(folder: Path, config: AnyCheckpointConfig, weights: Mapping[str, Tensor]) -> None:
    """Write a model folder with new weights; the classifier in it is kept.

    Everything else in it belongs to the earlier weights and is removed, with a warning (hidden files: without one).

    Raises:
        CheckpointError, OSError: as for `write_checkpoint`; the folder is unchanged then.
    """
    entries = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    classifier = find_classifier(folder)

    def keep(temporary: Path) -> None:
        if classifier is None:
            return
        if classifier.is_symlink():
            (temporary / CLASSIFIER_FOLDER).symlink_to(classifier.readlink())
        else:
            shutil.copytree(classifier, temporary / CLASSIFIER_FOLDER, symlinks=True)

    write_checkpoint(folder, config, weights, extra=keep)
    kept = {*WRITTEN_IN_MODELS, *([] if classifier is None else [CLASSIFIER_FOLDER])}
    if lost := sorted(name for name in entries - kept if not name.startswith(".")):
        again = "; export the model again" if INSIDE_CHECKPOINT in lost else ""
        warn(f"{folder} has new weights; removed what belonged to the earlier ones: {', '.join(lost)}{again}")
