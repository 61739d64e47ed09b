"""Training images: listed, checked, decoded as an image viewer shows them, and scaled to the model's size."""

from trainer.data.dataset import (
    Conditions,
    DataError,
    Dataset,
    Float32Array,
    ImageSource,
    IntArray,
    Uint8Array,
    eight_bit_images,
    network_input,
)
from trainer.data.opening import open_dataset
from trainer.data.options import DataConfig
from trainer.data.order import batch_indices

__all__ = [
    "Conditions",
    "DataConfig",
    "DataError",
    "Dataset",
    "Float32Array",
    "ImageSource",
    "IntArray",
    "Uint8Array",
    "batch_indices",
    "eight_bit_images",
    "network_input",
    "open_dataset",
]
