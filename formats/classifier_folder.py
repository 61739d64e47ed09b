"""The noisy classifier that guides a model: a folder `classifier` inside the model's checkpoint or artifact folder.

    MODEL/                        a checkpoint of a UNet
    MODEL/classifier/             a checkpoint of the noisy classifier that guides the model
    MODEL/artifact/               the UNet's artifact
    MODEL/artifact/classifier/    the classifier's artifact

Classifier guidance is available for a model if the folder exists. Nothing here needs PyTorch or a runtime.
"""

from __future__ import annotations

from pathlib import Path

from diffusion.config import CheckpointConfig, ClassifierCheckpointConfig, DiffusionConfig

CLASSIFIER_FOLDER = "classifier"


def find_classifier(folder: Path) -> Path | None:
    """Return the classifier folder inside a model folder; None if there is none."""
    classifier = folder / CLASSIFIER_FOLDER
    return classifier if classifier.is_dir() else None


def misfit(model: CheckpointConfig, classifier: ClassifierCheckpointConfig) -> str | None:
    """Return why a classifier cannot guide a model; None if it can.

    Noise schedules are not compared: OpenAI's samplers do not read the classifier's, and the flags of its published
    64x64 model and classifier differ.
    """
    pairs = {
        "image_size": (model.model.image_size, classifier.model.image_size),
        "image_channels": (model.model.image_channels, classifier.model.image_channels),
        "range of timesteps": (_timestep_range(model.diffusion), _timestep_range(classifier.diffusion)),
    }
    if model.model.num_classes is not None:
        pairs["num_classes"] = (model.model.num_classes, classifier.model.num_classes)
    for name, (of_model, of_classifier) in pairs.items():
        if of_model != of_classifier:
            return f"its {name} is {of_classifier}, the model's is {of_model}"
    names = (model.class_names, classifier.class_names)
    if None not in names and names[0] != names[1]:
        return "its class_names are not the model's"
    return None


def _timestep_range(diffusion: DiffusionConfig) -> int:
    """Return the upper limit of a network's timestep inputs; a classifier gets the inputs of the model it guides."""
    return 1000 if diffusion.rescale_timesteps else diffusion.num_timesteps
