"""The noisy classifier of the `torch` backend: compute its gradient by autograd, eager or in captured steps (GPU)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusion.classifier import Classifier, log_p_gradient
from diffusion.config import CheckpointConfig, ClassifierCheckpointConfig
from diffusion.network_inputs import NetworkInputs
from formats.checkpoint import load_guide
from formats.checkpoint_config import checkpoint_sha256
from formats.classifier_folder import CLASSIFIER_FOLDER


class TorchClassifier:
    """Implements `GuidingClassifier` on a CPU or a CUDA device, in float32 at any precision of the network."""

    xp: Any = torch

    def __init__(
        self,
        config: ClassifierCheckpointConfig,
        classifier: Classifier,
        sha256: str,
        device: torch.device,
        sizes: tuple[int, ...],
    ) -> None:
        """Move a classifier to a device.

        Args:
            config: configuration of its checkpoint.
            classifier: in eval mode.
            sha256: hash of its checkpoint.
            device: a CPU or a CUDA device.
            sizes: batch sizes that may be captured on a CUDA device.
        """
        self.config = config
        self.sha256 = sha256
        """Hash of the checkpoint."""
        self.device = device
        self.description = f"classifier, torch {torch.__version__} {device.type} float32"
        self._classifier = classifier.to(device)
        self.batch_sizes: tuple[int, ...] | None = None
        if device.type == "cuda":
            self.batch_sizes = sizes

    @torch.inference_mode()
    def embed_timesteps(self, t_model: Tensor) -> Tensor:
        """Run the time MLP."""
        return self._classifier.embed_timesteps(t_model)

    def __call__(self, inputs: NetworkInputs[Tensor]) -> Tensor:
        """Run the classifier forward and backward."""
        return self.gradient(inputs)

    def gradient(self, inputs: NetworkInputs[Tensor]) -> Tensor:
        """Compute the gradient like `__call__`, in a form that can be captured."""
        x_t, emb_t, y = inputs.x_t, inputs.emb_t, inputs.y
        assert y is not None  # noqa: S101  # a classifier always has classes
        if self.device.type != "cuda":
            return log_p_gradient(self._classifier.forward_emb, x_t, emb_t, y)
        with sdpa_kernel(SDPBackend.MATH):  # the memory-efficient kernel's backward pass sums in varying order
            return log_p_gradient(self._classifier.forward_emb, x_t, emb_t, y)


def load_torch_classifier(
    folder: Path, model: CheckpointConfig, device: torch.device, sizes: tuple[int, ...]
) -> TorchClassifier | None:
    """Load the classifier that guides a checkpoint's model; return None if there is none.

    Raises:
        CheckpointError: the classifier cannot be read, or does not fit the model.
    """
    found = load_guide(folder, model)
    if found is None:
        return None
    return TorchClassifier(*found, checkpoint_sha256(folder / CLASSIFIER_FOLDER), device, sizes)
