"""The measured networks, as files that the service reads: a checkpoint, its artifact, its diffusers folder.

One is the bundled model. The others have random weights, which are as fast as trained ones: they are written to a
work folder once and reused. A random network is chaotic, so parity limits do not apply to it: its artifact records
the measured errors as its limits, and may only be used for timing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffusion.config import CheckpointConfig, DiffusionConfig, ModelConfig
from diffusion.noise import STREAM_X_T, normal
from diffusion.respacing import respace
from diffusion.time_mlp import WEIGHTS, TimeMLP
from diffusion.unet import UNet
from formats.artifact import (
    MANIFEST_FILE,
    MODEL_FILE,
    TIME_MLP_FILE,
    Manifest,
    NetworkParity,
    file_entry,
    find_artifact,
    graph_inputs,
    manifest_json,
    read_artifact,
)
from formats.atomic_folder import write_folder
from formats.checkpoint import load_unet, write_checkpoint
from formats.checkpoint_config import CONFIG_FILE, CheckpointError, checkpoint_sha256, read_config
from interchange.published import PUBLISHED
from model_export import inference_graph, inference_layers, onnx_export
from model_export.artifact_export import export_artifact
from model_export.diffusers_export import export_diffusers
from model_export.onnx_export import OPSET, export_unet
from model_export.parity import BANDS, Call, network_parity
from model_export.runtimes import PrecisionUnavailable, runtimes_for

BUNDLED = Path(__file__).parents[1] / "models" / "fashion32"
RANDOM_WEIGHTS = "random weights, for timing only"


def c64() -> CheckpointConfig:
    """Describe the middle-sized network of docs and decisions: RGB 32x32, C = 64, 9.9 M parameters."""
    model = ModelConfig(
        image_size=32,
        model_channels=64,
        channel_mult=(1, 2, 2, 2),
        num_res_blocks=2,
        attention_resolutions=(16, 8),
        num_heads=4,
        num_classes=10,
        null_class=True,
    )
    return CheckpointConfig(model=model, diffusion=DiffusionConfig(rescale_timesteps=True))


def published(preset: str) -> CheckpointConfig:
    """Describe one of OpenAI's networks.

    Raises:
        ValueError: the preset is not a UNet.
    """
    config = PUBLISHED[preset].config
    if not isinstance(config, CheckpointConfig):
        raise ValueError(f"{preset} is a {config.kind}; a unet is needed here")
    return config


RANDOM_NETWORKS: dict[str, Callable[[], CheckpointConfig]] = {
    "c64": c64,
    "cifar10": lambda: published("cifar10-uncond-50m"),
    "imagenet64": lambda: published("imagenet64-uncond-100m"),
}
"""Networks by their name on the command line; in addition there is `fashion32`, the bundled model."""

NETWORKS = ("fashion32", *RANDOM_NETWORKS)


@dataclass(frozen=True)
class BenchNetwork:
    """A network on disk. Other formats than the checkpoint are created at first use."""

    name: str
    checkpoint: Path
    work: Path
    """Folder for the files created from the checkpoint."""
    trained: bool

    @cached_property
    def config(self) -> CheckpointConfig:
        """Configuration of the checkpoint."""
        config = read_config(self.checkpoint)
        assert isinstance(config, CheckpointConfig)  # every checkpoint here is a UNet's
        return config

    @cached_property
    def flops(self) -> int:
        """Floating-point operations of one row of a network call; a multiply-add counts two."""
        return count_flops(self.config.model)

    @cached_property
    def parameters(self) -> int:
        """Number of weights of the network."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in UNet(self.config.model).parameters())

    def __str__(self) -> str:
        model = self.config.model
        weights = "trained" if self.trained else "random weights"
        return (
            f"{self.name}: {model.image_size}x{model.image_size}x{model.image_channels}, C = {model.model_channels}, "
            f"{self.parameters / 1e6:.1f} M parameters, {self.flops / 1e9:.2f} GFLOP per row, {weights}"
        )

    def artifact(self) -> Path:
        """Return the artifact folder of this version of the exporter, exported if it does not exist.

        Raises:
            ParityError: the graph of a trained network is too far from PyTorch.
        """
        if (shipped := find_artifact(self.checkpoint)) is not None:
            return shipped
        folder = self.work / f"artifact-{exporter_hash()}"
        if find_artifact(folder) is None or read_artifact(folder).checkpoint_sha256 != checkpoint_sha256(
            self.checkpoint
        ):
            if self.trained:
                export_artifact(self.checkpoint, folder)
            else:
                export_for_timing(self.checkpoint, folder)
        return folder

    def diffusers_folder(self) -> Path:
        """Return the network as a diffusers folder, exported if it does not exist.

        Raises:
            DoesNotMap: diffusers cannot represent the network.
        """
        folder = self.work / f"diffusers-{checkpoint_sha256(self.checkpoint)[:12]}"
        if not folder.exists():
            export_diffusers(self.checkpoint, folder)
        return folder


def open_network(name: str, work: Path) -> BenchNetwork:
    """Return a network by its name in `NETWORKS`; write one with random weights if it does not exist.

    Raises:
        ValueError: unknown name.
    """
    if name == "fashion32":
        return BenchNetwork(name, BUNDLED, work / name, trained=True)
    if name not in RANDOM_NETWORKS:
        raise ValueError(f"network must be one of {', '.join(NETWORKS)}; got {name!r}")
    return random_network(name, RANDOM_NETWORKS[name](), work)


def random_network(name: str, config: CheckpointConfig, work: Path) -> BenchNetwork:
    """Return a network with random weights, written to the work folder if it does not exist there."""
    marked = config.replace(provenance={**config.provenance, "weights": RANDOM_WEIGHTS})
    folder = work / name / "checkpoint"
    if not _holds(folder, marked):
        write_checkpoint(folder, marked, random_weights(marked.model).state_dict())
    return BenchNetwork(name, folder, work / name, trained=False)


def random_weights(model: ModelConfig, seed: int = 0) -> UNet:
    """Build a UNet whose activations stay near unit size: normal weights / sqrt(fan_in), also where training
    starts from zeros, and no biases; normalisations as they are initialised.
    """
    network = UNet(model).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
        elif name.endswith("bias"):
            parameter.zero_()
    return network


def count_flops(model: ModelConfig) -> int:
    """Count the floating-point operations of one row of the original network, without its time MLP."""
    with torch.device("meta"):
        network = UNet(model).eval().requires_grad_(False)
        x_t = torch.empty(1, *model.image_shape)
        emb_t = torch.empty(1, model.emb_channels)
        y = None if model.num_classes is None else torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        network.forward_emb(x_t, emb_t, y)
    return int(counter.get_total_flops())


def export_for_timing(checkpoint: Path, folder: Path) -> None:
    """Write a random network's artifact: the exporter's graph, with the measured errors as parity limits.

    One row of noise at one timestep of each band is compared, so that a wrong graph is visible in the manifest. Chains
    are omitted, because they would take longer than the benchmark.
    """
    config, network = load_unet(checkpoint)
    time_mlp = TimeMLP({name: network.state_dict()[name].numpy() for name in WEIGHTS})
    calls = _calls(network, config, time_mlp)

    def write(into: Path) -> None:
        time_mlp.write(into / TIME_MLP_FILE)
        export_unet(network, into / MODEL_FILE)
        parity = []
        for runtime in runtimes_for("fp32"):
            graph = runtime.open(into / MODEL_FILE)
            with suppress(PrecisionUnavailable):  # then the service refuses it, and the contender is absent
                parity.append(_accepted(network_parity(graph, calls, config, runtime, MODEL_FILE)))
        manifest = Manifest(
            checkpoint=config,
            checkpoint_sha256=checkpoint_sha256(checkpoint),
            opset=OPSET,
            buckets=(1,),
            inputs=graph_inputs(config),
            files={path.name: file_entry(path) for path in sorted(into.iterdir())},
            parity=tuple(parity),
        )
        (into / MANIFEST_FILE).write_text(manifest_json(manifest), encoding="utf-8")

    write_folder(folder, write)


def exporter_hash() -> str:
    """Return an id of the exporter's version, so that graphs of an older exporter are not reused."""
    sources = [Path(str(module.__file__)).read_bytes() for module in (inference_graph, inference_layers, onnx_export)]
    return hashlib.sha256(b"\n".join(sources)).hexdigest()[:12]


def _calls(network: UNet, config: CheckpointConfig, time_mlp: TimeMLP) -> list[Call]:
    model, t_model = config.model, respace(config.diffusion).t_model
    zero = np.zeros(1, dtype=np.int64)
    calls = []
    for band in range(BANDS):
        t = t_model[(2 * band + 1) * len(t_model) // (2 * BANDS)]
        shape = model.image_shape
        inputs = {"x_t": normal(zero, zero, zero + band, STREAM_X_T, shape), "emb_t": time_mlp(t[None])}
        if model.num_classes is not None:
            inputs["y"] = zero
        with torch.inference_mode():
            out = network.forward_emb(**{name: torch.from_numpy(value) for name, value in inputs.items()})
        calls.append(Call(float(t), inputs, out.numpy()))
    return calls


def _accepted(measured: NetworkParity) -> NetworkParity:
    return measured.replace(limit=max(measured.limit, measured.worst))


def _holds(folder: Path, config: CheckpointConfig) -> bool:
    """Return whether a folder is the checkpoint of a configuration, compared as JSON."""
    if not (folder / CONFIG_FILE).is_file():
        return False
    try:
        found = read_config(folder)
    except CheckpointError:
        return False
    return json.loads(found.model_dump_json()) == json.loads(config.model_dump_json())
