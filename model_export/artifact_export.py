"""Compile a checkpoint into an artifact folder: graph, time MLP, parity report, and the manifest last.

If the checkpoint folder contains a noisy classifier, the artifact folder contains the classifier's artifact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from diffusion.classifier import Classifier
from diffusion.config import CheckpointConfig, ClassifierCheckpointConfig
from diffusion.time_mlp import WEIGHTS, TimeMLP
from diffusion.unet import UNet
from formats.artifact import (
    GRADIENT_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    TIME_MLP_FILE,
    ArtifactError,
    ChainParity,
    Manifest,
    NetworkParity,
    NotMeasured,
    failures,
    file_entry,
    graph_inputs,
    manifest_json,
)
from formats.atomic_folder import may_replace, write_folder
from formats.checkpoint import load_classifier, load_guide, load_unet
from formats.checkpoint_config import AnyCheckpointConfig, checkpoint_sha256, read_config
from formats.classifier_folder import CLASSIFIER_FOLDER
from formats.precision import Precision
from model_export.onnx_export import (
    OPSET,
    PRECISIONS,
    export_classifier,
    export_classifier_gradient,
    export_unet,
)
from model_export.parity import chain_parity, classifier_calls, network_parity, unet_reference
from model_export.runtimes import PrecisionUnavailable, runtimes_for

MADE_BY = ("torch", "onnx", "onnxscript")
DEFAULT_BUCKETS = (1, 2, 4, 8, 16, 32, 64)

Notify = Callable[[str], None]


@dataclass
class Measured:
    """Results of comparing an artifact's graphs with PyTorch."""

    parity: list[NetworkParity] = field(default_factory=list)
    chains: list[ChainParity] = field(default_factory=list)
    not_measured: list[NotMeasured] = field(default_factory=list)


class ParityError(ArtifactError):
    """A graph's error against PyTorch is above its limit; no artifact was written."""

    def __init__(self, parity: tuple[NetworkParity, ...], chains: tuple[ChainParity, ...]) -> None:
        self.parity, self.chains = parity, chains
        super().__init__("the graph is too far from PyTorch, see the table; nothing was written")


def export_artifact(
    checkpoint: Path,
    out: Path,
    precision: Precision = "fp32",
    batch_sizes: tuple[int, ...] = DEFAULT_BUCKETS,
    notify: Notify = lambda _: None,
) -> tuple[Manifest, ...]:
    """Write a checkpoint's network as an artifact folder, atomically; replace an existing artifact.

    Args:
        checkpoint: the checkpoint folder of a UNet (with its noisy classifier, if it has one) or of a noisy
            classifier.
        out: the folder to write.
        precision: precision of the graph; a classifier's gradient is always in float32.
        batch_sizes: sizes to compile for, ascending.
        notify: called with a description of each stage.

    Returns:
        The content of the written `manifest.json`, and that of the classifier's.

    Raises:
        CheckpointError: the checkpoint cannot be read, or the classifier does not match the model.
        ArtifactError: `out` contains other files, the checkpoint changed during the export, or this processor does
            not support the precision.
        LibraryError: the exporter or a runtime failed.
        ParityError: a graph is outside its tolerance. Float32 graphs must pass in float32. Their error in bfloat16 with
            OpenVINO is recorded; the service refuses bfloat16 if it did not pass or was not measured.
    """
    if not may_replace(out, MANIFEST_FILE, ("checkpoint_sha256", "files", "parity")):
        raise ArtifactError(f"{out} exists and is not an artifact folder; it was not changed")
    config = read_config(checkpoint)
    guided = isinstance(config, CheckpointConfig) and load_guide(checkpoint, config) is not None
    manifests: list[Manifest] = []

    def write(folder: Path) -> None:
        manifests.append(_write(checkpoint, folder, precision, batch_sizes, notify))
        if guided:
            notify("exporting the classifier")
            inside = folder / CLASSIFIER_FOLDER
            inside.mkdir()
            manifests.append(_write(checkpoint / CLASSIFIER_FOLDER, inside, precision, batch_sizes, notify))

    write_folder(out, write)
    return tuple(manifests)


def _write(
    checkpoint: Path, folder: Path, precision: Precision, batch_sizes: tuple[int, ...], notify: Notify
) -> Manifest:
    """Write the files of one network's artifact into an empty folder."""
    config, sha256 = read_config(checkpoint), checkpoint_sha256(checkpoint)
    if isinstance(config, CheckpointConfig):
        network: UNet | Classifier = load_unet(checkpoint)[1]
    else:
        network = load_classifier(checkpoint)[1]
    notify("tracing the network")
    time_mlp = TimeMLP({name: network.state_dict()[name].numpy() for name in WEIGHTS})
    time_mlp.write(folder / TIME_MLP_FILE)
    dtype = PRECISIONS[precision]
    if isinstance(network, UNet):
        export_unet(network, folder / MODEL_FILE, dtype)
    else:
        export_classifier(network, folder / MODEL_FILE, dtype)
        export_classifier_gradient(network, folder / GRADIENT_FILE)
    measured = measure(folder, network, config, time_mlp, precision, notify)
    parity, chains = tuple(measured.parity), tuple(measured.chains)
    if failures(precision, parity, chains):
        raise ParityError(parity, chains)
    if checkpoint_sha256(checkpoint) != sha256:
        raise ArtifactError(f"{checkpoint} changed during the export; export it again")
    manifest = Manifest(
        checkpoint=config,
        checkpoint_sha256=sha256,
        precision=precision,
        opset=OPSET,
        buckets=batch_sizes,
        inputs=graph_inputs(config),
        versions={name: version(name) for name in MADE_BY},
        files={path.name: file_entry(path) for path in sorted(folder.iterdir())},
        parity=parity,
        chains=chains,
        not_measured=tuple(measured.not_measured),
    )
    (folder / MANIFEST_FILE).write_text(manifest_json(manifest), encoding="utf-8")
    return manifest


def measure(
    folder: Path,
    network: UNet | Classifier,
    config: AnyCheckpointConfig,
    time_mlp: TimeMLP,
    precision: Precision,
    notify: Notify,
) -> Measured:
    """Compare the folder's graphs with PyTorch in every runtime.

    Raises:
        ArtifactError: the artifact's precision is not available on this processor.
    """
    measured = Measured()
    notify("computing the reference with PyTorch")
    if isinstance(network, UNet):
        assert isinstance(config, CheckpointConfig)  # noqa: S101  # a UNet's
        reference = unet_reference(network, config, time_mlp)
        calls = {MODEL_FILE: reference.calls}
    else:
        assert isinstance(config, ClassifierCheckpointConfig)  # noqa: S101  # a classifier's
        logits, gradients = classifier_calls(network, config.diffusion, time_mlp)
        calls = {MODEL_FILE: logits, GRADIENT_FILE: gradients}
    for file, expected in calls.items():
        of_file = "fp32" if file == GRADIENT_FILE else precision
        for runtime in runtimes_for(of_file):
            notify(f"comparing {file} with {runtime.backend} {runtime.precision}")
            graph = runtime.open(folder / file)
            try:
                measured.parity.append(network_parity(graph, expected, config, runtime, file))
            except PrecisionUnavailable as error:
                if runtime.precision == of_file:
                    raise ArtifactError(
                        f"{error}, so an artifact in {precision} cannot be compared with PyTorch here; nothing was "
                        f"written. Export on a processor with {precision}, or with --precision fp32"
                    ) from error
                measured.not_measured.append(
                    NotMeasured(backend=runtime.backend, precision=runtime.precision, file=file, reason=str(error))
                )
                continue
            if isinstance(network, UNet):
                measured.chains.append(chain_parity(graph, reference, time_mlp, runtime))
    return measured
