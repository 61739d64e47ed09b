"""Write a checkpoint as a folder that the diffusers library loads; `interchange.diffusers_config` defines the mapping.

All files are in one folder, as in the first published DDPM repositories, so that UNet2DModel, DDPMScheduler and
DDPMPipeline all load from the same path:

    config.json  diffusion_pytorch_model.safetensors      the network
    scheduler_config.json                                 the process
    model_index.json                                      the pipeline, for an unconditional network
    iddpm.json                                            our own configuration, read when the folder is imported again
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from diffusion.config import CheckpointConfig
from formats.atomic_folder import write_folder
from formats.checkpoint import load_unet
from formats.checkpoint_config import CheckpointError
from interchange.diffusers_config import (
    CONFIG_FILE,
    DIFFUSERS_VERSION,
    INDEX_FILE,
    OURS_FILE,
    SCHEDULER_CLASSES,
    SCHEDULER_FILE,
    UNET_CLASS,
    WEIGHTS_FILE,
    DoesNotMap,
    scheduler_json,
    to_scheduler_config,
    to_unet_config,
    unet_json,
)
from interchange.diffusers_weights import to_diffusers


def export_diffusers(checkpoint: Path, out: Path) -> None:
    """Write a checkpoint's network and process as a diffusers folder, atomically.

    Args:
        checkpoint: the checkpoint folder.
        out: the folder to write; must not exist or must be empty.

    Raises:
        CheckpointError: the checkpoint cannot be read, or `out` is not empty.
        DoesNotMap: the library cannot represent the network or the process; one line per field.
    """
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} must not exist or must be an empty folder; it was not changed")
    config, network = load_unet(checkpoint)
    files = _files(config)
    weights = to_diffusers(network.state_dict(), config.model)

    def write(folder: Path) -> None:
        contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
        save_file(contiguous, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        for name, content in files.items():
            (folder / name).write_text(_json(content), encoding="utf-8")
        # safetensors makes its file readable for its owner only; other users may need to read it
        (folder / WEIGHTS_FILE).chmod((folder / CONFIG_FILE).stat().st_mode)

    write_folder(out, write)


def _files(config: CheckpointConfig) -> dict[str, dict[str, Any]]:
    problems = []
    try:
        unet = to_unet_config(config.model)
    except DoesNotMap as error:
        problems.append(str(error))
    try:
        scheduler = to_scheduler_config(config.diffusion)
    except DoesNotMap as error:
        problems.append(str(error))
    if problems:
        raise DoesNotMap("\n".join(problems))

    files = {
        CONFIG_FILE: unet_json(unet),
        SCHEDULER_FILE: scheduler_json(scheduler),
        OURS_FILE: config.model_dump(mode="json"),
    }
    if config.model.num_classes is None:  # no pipeline of the library passes labels to a UNet2DModel
        files[INDEX_FILE] = {
            "_class_name": "DDPMPipeline",
            "_diffusers_version": DIFFUSERS_VERSION,
            "scheduler": ["diffusers", SCHEDULER_CLASSES[0]],
            "unet": ["diffusers", UNET_CLASS],
        }
    return files


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
