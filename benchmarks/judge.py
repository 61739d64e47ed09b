"""The judge: a small classifier trained on real images, which classifies generated ones and returns their features.

    python -m benchmarks.judge features.onnx

writes the network of features of the judge of the bundled model, for the option --features of `iddpm evaluate samples`
and `iddpm study scaling`.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from diffusion.config import CheckpointConfig
from diffusion.update import from_uint8
from formats.atomic_file import replace_file
from model_export.onnx_export import export_graph
from trainer.data import Dataset, IntArray, Uint8Array, batch_indices, network_input, open_dataset

JUDGE_BATCH = 500
JUDGE_TRAIN_BATCH = 128
JUDGE_LR = 4e-3
BUNDLED_JUDGE = Path(__file__).parent / "judges" / "fashion32.safetensors"
BUNDLED_SHAPE, BUNDLED_CLASSES = (1, 32, 32), 10


class JudgeError(ValueError):
    """The judge or its data cannot be used; the message gives the reason."""


class Judge(nn.Module):
    """A small convolutional classifier of images [B, C, H, W] where data spans [-1, 1]."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        image_channels, height, width = image_shape
        widths = (image_channels, 16, 32, 64)
        blocks: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)
            blocks += [convolution, nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        halvings = len(widths) - 1
        features = widths[-1] * (height >> halvings) * (width >> halvings)
        self.features = nn.Sequential(*blocks, nn.Flatten())
        self.head = nn.Sequential(
            nn.Dropout(0.2), nn.Linear(features, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def train_judge(judge: Judge, data: Dataset, epochs: int, seed: int = 0) -> None:
    """Train a judge in place on real images, and set it to eval mode."""
    torch.manual_seed(seed)
    labels = torch.from_numpy(data.labels)
    batches = epochs * len(labels) // JUDGE_TRAIN_BATCH
    optimizer = torch.optim.AdamW(judge.parameters(), lr=JUDGE_LR, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, JUDGE_LR, total_steps=batches)
    judge.train()
    for batch in tqdm(range(batches), desc="training the judge", unit="batch", mininterval=2):
        indices = batch_indices(seed, batch * JUDGE_TRAIN_BATCH, JUDGE_TRAIN_BATCH, len(labels))
        x0 = torch.from_numpy(network_input(data.images(indices)))
        loss = F.cross_entropy(judge(x0), labels[torch.from_numpy(indices)])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    judge.eval()


def load_or_train_judge(path: Path, judge: Judge, data: Path, config: CheckpointConfig, epochs: int) -> None:
    """Load a judge's weights from a file, or train it and write the file.

    Raises:
        JudgeError: the file belongs to another judge, or the classes of the training data differ from the model's.
    """
    if path.exists():
        try:
            judge.load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError) as error:
            raise JudgeError(f"{path} contains no judge for this model; delete it to train one: {error}") from error
        judge.eval()
        return
    train_judge(judge, open_split(data, config), epochs)
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in judge.state_dict().items()}
    replace_file(path, lambda temporary: save_file(weights, temporary))


def predict(judge: Judge, pixels: Uint8Array) -> IntArray:
    """Return the judge's class for each image, int64 [N], of uint8 [N, H, W, C]."""
    classes: IntArray = _in_batches(judge, pixels).argmax(axis=1)
    return classes


def features_of(judge: Judge, pixels: Uint8Array) -> npt.NDArray[np.float32]:
    """Return the input of the judge's last layer, float32 [N, 128], of uint8 [N, H, W, C]."""
    return _in_batches(feature_network(judge), pixels)


def feature_network(judge: Judge) -> nn.Sequential:
    """Return the judge without its last layer."""
    return nn.Sequential(judge.features, judge.head[:-1])


@torch.no_grad()
def _in_batches(network: nn.Module, pixels: Uint8Array) -> npt.NDArray[np.float32]:
    parts = [
        network(torch.from_numpy(from_uint8(pixels[start : start + JUDGE_BATCH])))
        for start in range(0, len(pixels), JUDGE_BATCH)
    ]
    return torch.cat(parts).numpy()


def open_split(path: Path, config: CheckpointConfig) -> Dataset:
    """Open real images as the trainer does, padded to the model's size.

    Raises:
        JudgeError: the classes differ from the model's.
        DataError: the data cannot be read.
    """
    data = open_dataset(path, config.model.image_size, config.model.image_channels)
    if len(data.class_names) != config.model.num_classes or config.class_names not in (None, data.class_names):
        raise JudgeError(
            f"{path} must contain the model's classes, in the same order: "
            f"{config.class_names or config.model.num_classes}; got {data.class_names}"
        )
    return data


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the features of the bundled model's judge as an ONNX file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.judge", description=main.__doc__)
    parser.add_argument("file", type=Path, help="to write, such as features.onnx")
    path: Path = parser.parse_args(arguments).file
    judge = Judge(BUNDLED_SHAPE, BUNDLED_CLASSES)
    judge.load_state_dict(load_file(BUNDLED_JUDGE))
    export_graph(feature_network(judge.eval()), {"images": torch.zeros(2, *BUNDLED_SHAPE)}, "features", path)


if __name__ == "__main__":
    main()
