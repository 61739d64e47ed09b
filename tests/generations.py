"""A small generation and its images, without a model; imports no torch."""

from __future__ import annotations

import numpy as np

from formats.generated_folder import GeneratedFolder
from formats.generation import Generation, GenerationFormat, Sampling

CLASS_NAMES = ("Ape", "Bee", "Cat", "T-shirt/top")
COUNT, SHARD_SIZE, FIRST = 11, 4, 5
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 3), dtype=np.uint8)
CLASSES = [1, 3]
LABELS = [CLASSES[(FIRST + k) % 2] for k in range(COUNT)]


def generation(form: GenerationFormat = "npz", **changes: object) -> Generation:
    fields = {
        "iddpm": "0.1.0", "model": "tiny", "model_sha256": "5e", "numerics_id": "1d", "backend": "none", "seed": 7,
        "sampling": Sampling(
            sampler="ancestral", respacing="10", num_steps=10, eta=0, cfg_scale=1, classifier_scale=0
        ),
        "image_index": FIRST, "count": COUNT, "image_shape": PIXELS.shape[1:], "classes": tuple(CLASSES),
        "class_names": CLASS_NAMES, "format": form, "shard_size": SHARD_SIZE, **changes,
    }  # fmt: skip
    return Generation.model_validate(fields)


def write(folder: GeneratedFolder, shards: list[range]) -> None:
    for images in shards:
        folder.write(images, PIXELS[images.start : images.stop])
