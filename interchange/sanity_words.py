"""Wording of the sanity check's advice for each source of weights: names of fields, and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusion.config import CheckpointConfig, ModelConfig


@dataclass(frozen=True)
class Words:
    """The wording for a source of weights."""

    invisible: str
    """The fields of a network and its process that do not change the shapes of weights."""
    cure: str
    """What to do if one of them is wrong; a sentence."""
    eps_prediction: str
    """The value that means that a network predicts eps."""
    diffusers: bool = False

    def describe(self, changes: Mapping[str, Any], model: ModelConfig) -> str:
        """Describe changed fields by the source's names, such as `num_heads=4`."""
        given = {name: value for name, value in changes.items() if value is not None}
        words = _of_diffusers if self.diffusers else _of_flags
        return ", ".join(words(name, value, model) for name, value in given.items())


FLAGS = Words(
    invisible="num_heads, num_heads_upsample, num_head_channels, use_new_attention_order, diffusion_steps, "
    "noise_schedule, rescale_timesteps, predict_xstart",
    cure="Check the flags first: they must be those of the training",
    eps_prediction="predict_xstart=False",
)

DIFFUSERS = Words(
    invisible="attention_head_dim in config.json; num_train_timesteps, beta_schedule and prediction_type in "
    "scheduler_config.json",
    cure="Check them first: both files must be those of the training (--scheduler sets another scheduler_config.json)",
    eps_prediction="prediction_type 'epsilon'",
    diffusers=True,
)


def words_for(config: CheckpointConfig) -> Words:
    """Return the wording for the source of a configuration, by its provenance."""
    provenance = config.provenance
    if provenance.get("source") == "diffusers":
        return DIFFUSERS
    if "preset" in provenance:
        return Words(
            invisible=FLAGS.invisible,
            cure=f"The flags are those of the preset {provenance['preset']}, so the file is probably not the published "
            "one: download it again. For weights of your own, give --repo and --flags instead of --preset",
            eps_prediction=FLAGS.eps_prediction,
        )
    return FLAGS


def _of_flags(name: str, value: Any, _: ModelConfig) -> str:
    if name == "attention_order":
        return f"use_new_attention_order={value == 'new'}"
    return f"{'diffusion_steps' if name == 'num_timesteps' else name}={value}"


def _of_diffusers(name: str, value: Any, model: ModelConfig) -> str:
    match name:
        case "num_timesteps":
            return f"num_train_timesteps={value}"
        case "noise_schedule":
            return f"beta_schedule={'linear' if value == 'linear' else 'squaredcos_cap_v2'}"
        case "num_head_channels":
            return f"attention_head_dim={value}"
        case "num_heads":
            return f"attention_head_dim={model.level_channels[-1] // value} ({value} heads)"
        case "num_heads_upsample":
            return f"{value} heads in the decoder"
        case "rescale_timesteps":
            return f"timestep input t * {'1000 / T' if value else '1'}"
        case _:
            return f"{name}={value}"
