"""The golden files of tests/data/golden: OpenAI's reference outputs, and the networks they were computed with.

tests/data/golden/README.md describes their origin and the tolerances for a float32 implementation.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffusion.classifier import Classifier
from diffusion.conditioning import enlarged
from diffusion.config import ClassifierConfig, DiffusionConfig, ModelConfig, size_pair
from diffusion.unet import UNet

GOLDEN_DIR = Path(__file__).parent / "data" / "golden"

NETWORK_TOLERANCE = 1e-4
"""For outputs, features and logits of networks; absolute. tests/data/golden/README.md allows all of these."""
STEP_TOLERANCE = 1e-4
"""For the results of a step, guided or not; relative to the largest number of the array."""
STEP_X0_TOLERANCE = 1e-3
"""For its predicted x0, which divides the network's error by sqrt(alpha-bar); relative likewise."""
DDIM_TOLERANCE = 1e-3
"""For a DDIM step, whose noise is computed from the predicted x0; relative likewise."""
CHAIN_TOLERANCES = {"final": 1e-3, "samples": 3e-3, "pred_xstart": 2e-2}
"""For complete chains; absolute."""
GUIDANCE_TOLERANCE = 1e-4
"""For a guided step; relative to the largest number of the array."""
GRADIENT_TOLERANCE = 1e-3
"""For a classifier's gradient; relative."""
GUIDED_CHAIN_TOLERANCE = 2e-3
"""For guided chains; absolute."""

TIMESTEP_TOLERANCES = {100: 1e-5, 4000: 5e-4}
"""For embedded timesteps up to each of these: angles are products in float32."""

PREDICTIONS = {"EPSILON": "eps", "START_X": "x0"}
"""PREVIOUS_X is not supported: no published model uses it."""


@dataclass(frozen=True)
class Golden:
    """One file: its arrays by key, and the JSON that describes them."""

    arrays: dict[str, npt.NDArray[Any]]
    config: dict[str, Any]

    @property
    def cases(self) -> list[dict[str, Any]]:
        """The file's cases; a case's `key` is the prefix of its arrays."""
        return list(self.config["cases"])

    def __getitem__(self, key: str) -> npt.NDArray[Any]:
        return self.arrays[key]

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def tensor(self, key: str) -> Tensor:
        """Return an array as a new tensor."""
        return torch.from_numpy(np.array(self.arrays[key]))

    def optional(self, key: str) -> Tensor | None:
        """Return an array as a tensor, or None if the file does not have it."""
        return self.tensor(key) if key in self else None


@cache
def load(name: str) -> Golden:
    """Read `<name>.npz`."""
    with np.load(GOLDEN_DIR / f"{name}.npz", allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
    return Golden(arrays, json.loads(str(arrays.pop("config"))))


def supported_cases(golden: Golden) -> list[dict[str, Any]]:
    """Return the cases that this project implements: all but PREVIOUS_X and the one with a denoised_fn."""
    return [
        case
        for case in golden.cases
        if case.get("model_mean_type", "EPSILON") in PREDICTIONS and case.get("denoised_fn") is None
    ]


def diffusion_config(case: dict[str, Any]) -> DiffusionConfig:
    """Translate a case's names of the process into ours."""
    return DiffusionConfig.model_validate(
        {
            "num_timesteps": case["T"],
            "noise_schedule": case["schedule"],
            "variance": case.get("model_var_type", "LEARNED_RANGE").lower(),
            "prediction": PREDICTIONS[case.get("model_mean_type", "EPSILON")],
            "rescale_timesteps": case.get("rescale_timesteps", False),
        }
    )


def model_config(name: str) -> ModelConfig:
    """Translate the reference's arguments of a UNet into ours."""
    golden = load(name)
    kwargs = golden.config["kwargs"]
    low_res = golden.arrays.get("low_res")
    return ModelConfig.model_validate(
        {
            **_backbone(golden),
            "num_heads_upsample": _positive(kwargs, "num_heads_upsample"),
            "num_classes": kwargs.get("num_classes"),
            "learn_sigma": kwargs["out_channels"] == 2 * golden["x"].shape[1],
            "low_res_size": None if low_res is None else low_res.shape[-1],
        }
    )


def cond(data: Golden, name: str, key: str = "low_res") -> Tensor | None:
    """Return the conditioning images of a UNet: OpenAI's low-resolution images, enlarged; None if it has none."""
    low_res = data.optional(key)
    return None if low_res is None else enlarged(low_res, *size_pair(model_config(name).image_size))


def classifier_config(name: str) -> ClassifierConfig:
    """Translate the reference's arguments of a noisy classifier into ours."""
    golden = load(name)
    kwargs = golden.config["kwargs"]
    return ClassifierConfig.model_validate(
        {**_backbone(golden), "num_classes": kwargs["out_channels"], "pool": kwargs["pool"]}
    )


@cache
def network(name: str) -> UNet:
    """Build a UNet and load its weights, in float32; shared between tests, so do not change it."""
    model = UNet(model_config(name)).eval().requires_grad_(False)
    model.load_state_dict(load_file(GOLDEN_DIR / f"{name}.safetensors"), strict=True)
    return model


@cache
def classifier(name: str) -> Classifier:
    """Build a noisy classifier and load its weights, in float32; shared between tests, so do not change it."""
    model = Classifier(classifier_config(name)).eval().requires_grad_(False)
    model.load_state_dict(load_file(GOLDEN_DIR / f"{name}.safetensors"), strict=True)
    return model


def _backbone(golden: Golden) -> dict[str, Any]:
    kwargs = golden.config["kwargs"]
    size = golden["x"].shape[-1]
    return {
        "image_size": size,
        "image_channels": golden["x"].shape[1],
        "model_channels": kwargs["model_channels"],
        "channel_mult": kwargs["channel_mult"],
        "num_res_blocks": kwargs["num_res_blocks"],
        # The reference counts how often the image was halved; we use the size.
        "attention_resolutions": [size // factor for factor in kwargs["attention_resolutions"]],
        "num_heads": kwargs.get("num_heads", 1),
        "num_head_channels": _positive(kwargs, "num_head_channels"),
        "attention_order": "new" if kwargs.get("use_new_attention_order") else "legacy",
        "use_scale_shift_norm": kwargs.get("use_scale_shift_norm", False),
        "resblock_updown": kwargs.get("resblock_updown", False),
        "conv_resample": kwargs.get("conv_resample", True),
        "dropout": kwargs.get("dropout", 0.0),
    }


def _positive(kwargs: dict[str, Any], name: str) -> int | None:
    value = kwargs.get(name, -1)
    return value if value > 0 else None
