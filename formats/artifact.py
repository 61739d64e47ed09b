"""The artifact folder: a network exported for runtimes other than PyTorch.

    manifest.json   the network's configuration, its origin, its parity with PyTorch, a hash of every file
    model.onnx      the graph (and model.onnx.data for weights beyond protobuf's 2 GiB)
    gradient.onnx   the gradient, for a classifier
    time_mlp.npz    the timestep embedding, whose output is an input of the graph
    classifier/     the artifact of the noisy classifier that guides the network, if it has one

The manifest is written last, and only if parity was within its limits. Reading checks the size and hash of every file,
that every file lies inside the folder, and that the graphs keep weights in no other file. Nothing here needs PyTorch
or a runtime.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from diffusion.config import CheckpointConfig, ClassifierCheckpointConfig, FrozenConfig
from formats.checkpoint_config import (
    CONFIG_FILE,
    CheckpointError,
    checkpoint_sha256,
    describe_validation_error,
    read_config,
)
from formats.classifier_folder import CLASSIFIER_FOLDER, find_classifier, misfit
from formats.file_content import describe_wrong_content
from formats.json_files import read_object
from formats.precision import Precision

MANIFEST_FILE = "manifest.json"
MODEL_FILE = "model.onnx"
GRADIENT_FILE = "gradient.onnx"
TIME_MLP_FILE = "time_mlp.npz"
FORMAT_VERSION = 1
INSIDE_CHECKPOINT = "artifact"
"""Name of the artifact folder inside a checkpoint folder."""

LEAST_ERRORS: dict[Precision, float] = {"fp32": 0.0, "bf16": 2e-4, "fp16": 0.0}
"""Lower bound of the worst band's error for each precision. For bfloat16 it is a tenth of half a unit in the last place
(2^-9), the rounding error of each factor of a product. 0 for float16: ONNX Runtime computes part of such a graph in
float32."""
EXTERNAL_FILE = b"\n\x08location\x12"
"""What precedes the length and the name of a file of weights in an ONNX graph: protobuf's StringStringEntryProto."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ArtifactError(ValueError):
    """An artifact folder cannot be written or read; the message names the file, the field and the rule."""


class FileEntry(FrozenConfig):
    """One file of the folder."""

    sha256: Sha256
    size: int = Field(ge=0)
    """Bytes."""


class BandError(FrozenConfig):
    """Relative error of outputs against PyTorch in float32 over a band of timesteps: norm of the difference / norm."""

    t_min: int
    t_max: int
    """Inclusive."""
    prediction: float
    """Error of eps (or x0), of logits, or of a gradient."""
    variance: float | None = None
    """Error of var_values; None: the network has none."""

    @property
    def worst(self) -> float:
        """The larger of the two errors."""
        return _largest([self.prediction, self.variance or 0.0])


class NetworkParity(FrozenConfig):
    """Errors of a runtime's network calls against PyTorch's, along chains of the reference."""

    backend: str
    """Runtime and version."""
    precision: Precision
    """Precision in which the runtime computes."""
    file: str = MODEL_FILE
    """The measured graph of the folder."""
    limit: float
    """Largest relative error allowed in any band."""
    bands: tuple[BandError, ...] = Field(min_length=1)

    @property
    def worst(self) -> float:
        """The largest relative error of any band."""
        return _largest(band.worst for band in self.bands)

    @property
    def passed(self) -> bool:
        """Whether every band is within the limit."""
        return self.worst <= self.limit

    @property
    def is_of_its_precision(self) -> bool:
        """Whether the error is large enough for its precision.

        A smaller error was measured in float32, on a processor that does not support the precision. Exports from before
        `not_measured` existed recorded such a measurement under the requested precision.
        """
        return self.worst >= LEAST_ERRORS[self.precision]

    def gates(self, precision: Precision) -> bool:
        """Return whether an artifact exported in `precision` must have passed this measurement."""
        return self.precision == ("fp32" if self.file == GRADIENT_FILE else precision)


class NotMeasured(FrozenConfig):
    """A runtime and precision that could not be measured on the machine of the export."""

    backend: str
    precision: Precision
    file: str = MODEL_FILE
    reason: str
    """Why it could not be measured. For human readers."""


class ChainParity(FrozenConfig):
    """Fractions of 8-bit values that differ between ancestral chains of a runtime and of PyTorch, with equal noise."""

    backend: str
    precision: Precision
    steps: int
    images: int
    beyond_1: float
    """Fraction of values that differ by more than 1 level of 255."""
    beyond_2: float
    beyond_4: float
    limit: float | None = None
    """Largest `beyond_2` allowed; None: reported only."""

    @property
    def passed(self) -> bool:
        """Whether the pixels are within the limit."""
        return self.limit is None or self.beyond_2 <= self.limit

    def gates(self, precision: Precision) -> bool:
        """Return whether an artifact exported in `precision` must have passed this measurement."""
        return self.precision == precision


class Manifest(FrozenConfig):
    """The content of `manifest.json`."""

    format_version: Literal[1] = 1
    checkpoint: Annotated[CheckpointConfig | ClassifierCheckpointConfig, Field(discriminator="kind")]
    """The `config.json` of the exported checkpoint."""
    checkpoint_sha256: Sha256
    """See `formats.checkpoint_config.checkpoint_sha256`."""
    precision: Precision = "fp32"
    """Precision in which the graph computes."""
    opset: int
    buckets: tuple[int, ...] = Field(min_length=1)
    """Batch sizes to compile the graph for, ascending."""
    inputs: tuple[str, ...] = ()
    """Names of the inputs of `model.onnx`; empty in artifacts of versions that did not record them."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Versions of the packages used for the export."""
    files: dict[str, FileEntry]
    """Every file except the manifest, by name."""
    parity: tuple[NetworkParity, ...] = Field(min_length=1)
    chains: tuple[ChainParity, ...] = ()
    not_measured: tuple[NotMeasured, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in self.files:
            if not name or Path(name).name != name or name in (".", "..") or "\\" in name:
                raise ValueError(f"files must be plain names inside the folder; got {name!r}")
        needed = {MODEL_FILE, TIME_MLP_FILE} | ({GRADIENT_FILE} if self.checkpoint.kind == "classifier" else set())
        if missing := sorted(needed - set(self.files)):
            raise ValueError(f"files must list {', '.join(missing)}")
        if list(self.buckets) != sorted(set(self.buckets)) or self.buckets[0] < 1:
            raise ValueError(f"buckets must be ascending and at least 1; got {list(self.buckets)}")
        return self

    def parity_of(self, runtime: str, precision: Precision, file: str = MODEL_FILE) -> NetworkParity | None:
        """Return the parity of a runtime (its name without version) in a precision; None if it was not measured."""
        of_model = (p for p in self.parity if p.file == file and p.precision == precision and p.is_of_its_precision)
        return next((p for p in of_model if p.backend.split(" ")[0] == runtime), None)

    def reason_not_measured(self, runtime: str, precision: Precision, file: str = MODEL_FILE) -> str | None:
        """Return why a runtime could not be measured in a precision; None if it was, or no reason was recorded."""
        missing = (m for m in self.not_measured if m.file == file and m.precision == precision)
        return next((m.reason for m in missing if m.backend.split(" ")[0] == runtime), None)


def failures(
    precision: Precision, parity: Iterable[NetworkParity], chains: Iterable[ChainParity]
) -> list[NetworkParity | ChainParity]:
    """Return the measurements that a graph exported in `precision` must pass and did not; empty if it passed all."""
    measured: list[NetworkParity | ChainParity] = [*parity, *chains]
    return [p for p in measured if p.gates(precision) and not p.passed]


def graph_inputs(config: CheckpointConfig | ClassifierCheckpointConfig) -> tuple[str, ...]:
    """Return the names of the inputs that a network's `model.onnx` has."""
    names = ["x_t", "emb_t"]
    if config.kind == "unet" and config.model.num_classes is not None:
        names.append("y")
    if config.kind == "unet" and config.model.cond_shape is not None:
        names.append("cond")
    return tuple(names)


def file_entry(path: Path) -> FileEntry:
    """Return the size and hash of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(sha256=digest, size=path.stat().st_size)


def manifest_json(manifest: Manifest) -> str:
    """Return the text of a `manifest.json`."""
    return json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def find_artifact(folder: Path) -> Path | None:
    """Return the artifact of a model folder: the folder itself, or `artifact` inside it; None if there is none."""
    for candidate in (folder, folder / INSIDE_CHECKPOINT):
        if (candidate / MANIFEST_FILE).is_file():
            return candidate
    return None


def read_artifact(folder: Path) -> Manifest:
    """Read and check an artifact folder.

    An artifact inside a checkpoint folder must have been exported from that checkpoint.

    Raises:
        ArtifactError: the manifest is missing or invalid, or a file is missing, damaged or of another checkpoint; the
            message names the file and the cure.
    """
    path = folder / MANIFEST_FILE
    manifest = _parse(path)
    _refuse_other_inputs(folder, manifest)
    for name, entry in manifest.files.items():
        file = folder / name
        if not file.is_file() or file.is_symlink():
            raise ArtifactError(f"{file} is missing or not a regular file; export the checkpoint again")
        if file.stat().st_size != entry.size:
            problem = describe_wrong_content(file, may_be_text=True) or "is damaged"
            raise ArtifactError(f"{file} has {file.stat().st_size} bytes instead of {entry.size}: it {problem}")
        if file_entry(file).sha256 != entry.sha256:
            raise ArtifactError(
                f"{file} does not match {MANIFEST_FILE}: its sha256 differs; export the checkpoint again"
            )
    graphs = [name for name in (MODEL_FILE, GRADIENT_FILE) if name in manifest.files]
    measured = {p.file for p in manifest.parity if p.gates(manifest.precision)}
    for name in graphs:
        _refuse_unlisted_weights(folder / name, manifest)
    if unmeasured := [name for name in graphs if name not in measured]:
        raise ArtifactError(f"{path}: {unmeasured[0]} was not compared with PyTorch; export the checkpoint again")
    if failed := failures(manifest.precision, manifest.parity, manifest.chains):
        raise ArtifactError(f"{path}: parity of {failed[0].backend} is outside its limit; export the checkpoint again")
    for checkpoint in _checkpoints_around(folder):
        refuse_foreign(folder, manifest, checkpoint)
    return manifest


def _refuse_unlisted_weights(graph: Path, manifest: Manifest) -> None:
    """Check that the files in which a graph keeps weights are listed, so that their hashes are checked."""
    if manifest.files[graph.name].size == 0:
        return  # cannot be mapped; no runtime loads it
    with graph.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        place = content.find(EXTERNAL_FILE)
        while place >= 0:
            begin = place + len(EXTERNAL_FILE) + 1
            length = int.from_bytes(content[begin - 1 : begin])  # from 128 on, in two bytes; no such name is listed
            name = content[begin : begin + length].decode(errors="replace")
            if name not in manifest.files:
                raise ArtifactError(
                    f"{graph} keeps weights in {name!r}, which {MANIFEST_FILE} does not list; export the checkpoint "
                    "again"
                )
            place = content.find(EXTERNAL_FILE, begin)


def _refuse_other_inputs(folder: Path, manifest: Manifest) -> None:
    """Check that the graph has the inputs that this version feeds.

    Upsamplers were exported with another input before inputs were recorded: `low_res`, the small picture.
    """
    config, wanted = manifest.checkpoint, graph_inputs(manifest.checkpoint)
    is_upsampler = config.kind == "unet" and config.model.low_res_size is not None
    if manifest.inputs == wanted or not (manifest.inputs or is_upsampler):
        return
    found = ", ".join(manifest.inputs) or "not recorded"
    checkpoint = next(iter(_checkpoints_around(folder)), "CHECKPOINT")
    raise ArtifactError(
        f"{folder} was exported by another version: the inputs of {MODEL_FILE} must be {', '.join(wanted)}; they are "
        f"{found}; export it again with: iddpm export {checkpoint} {folder}"
    )


def _checkpoints_around(folder: Path) -> list[Path]:
    """Return the checkpoint folders that contain an artifact, by its path as given and with links resolved."""
    places = dict.fromkeys([folder.absolute(), folder.resolve()])
    around = [*places, *(place.parent for place in places if place.name == INSIDE_CHECKPOINT)]
    return list(dict.fromkeys(place.resolve() for place in around if (place / CONFIG_FILE).is_file()))


def refuse_foreign(folder: Path, manifest: Manifest, checkpoint: Path) -> None:
    """Check that an artifact was exported from a checkpoint.

    Raises:
        ArtifactError: it was exported from another one, or the checkpoint cannot be read.
    """
    try:
        found, config = checkpoint_sha256(checkpoint), read_config(checkpoint)
    except CheckpointError as error:
        raise ArtifactError(str(error)) from error
    if found != manifest.checkpoint_sha256:
        raise ArtifactError(
            f"{folder} was exported from another checkpoint ({manifest.checkpoint_sha256[:12]}...) than the one in "
            f"{checkpoint} ({found[:12]}...); export it again"
        )
    described = manifest.checkpoint
    if (described.kind, described.model, described.diffusion) != (config.kind, config.model, config.diffusion):
        raise ArtifactError(f"{folder / MANIFEST_FILE} describes another model than {checkpoint}; export it again")


def read_classifier_artifact(folder: Path) -> tuple[Manifest, ClassifierCheckpointConfig] | None:
    """Read and check the artifact of the classifier that guides an artifact's model.

    Inside a checkpoint folder, model and classifier must have been exported together.

    Args:
        folder: the model's artifact.

    Returns:
        The classifier's manifest and the checkpoint configuration in it; None if the model has no classifier.

    Raises:
        ArtifactError: as `read_artifact`; also if the folder holds no classifier, or one that does not fit the model.
    """
    for checkpoint in _checkpoints_around(folder):
        refuse_foreign_classifier(folder, checkpoint)
    classifier = find_classifier(folder)
    if classifier is None:
        return None
    manifest, model = read_artifact(classifier), _parse(folder / MANIFEST_FILE).checkpoint
    if manifest.checkpoint.kind != "classifier" or model.kind != "unet":
        raise ArtifactError(f"{classifier} must hold the classifier of a UNet; it holds a {manifest.checkpoint.kind}")
    if problem := misfit(model, manifest.checkpoint):
        raise ArtifactError(f"{classifier} cannot guide the model in {folder}: {problem}")
    return manifest, manifest.checkpoint


def refuse_foreign_classifier(folder: Path, checkpoint: Path) -> None:
    """Check that an artifact's classifier was exported from the classifier of a checkpoint.

    Raises:
        ArtifactError: it was not, or only one of the two has a classifier.
    """
    exported, original = find_classifier(folder), find_classifier(checkpoint)
    if exported is not None and original is not None:
        refuse_foreign(exported, _parse(exported / MANIFEST_FILE), original)
    elif original is not None:
        raise ArtifactError(f"{folder} was exported without the classifier in {original}; export {checkpoint} again")
    elif exported is not None:
        raise ArtifactError(
            f"{folder} was exported with a classifier, and {checkpoint} has no {CLASSIFIER_FOLDER} folder; "
            f"export it again"
        )


def _parse(path: Path) -> Manifest:
    try:
        content = read_object(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArtifactError(f"{path.parent} is not an artifact folder: it has no {MANIFEST_FILE}") from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise ArtifactError(str(error)) from error
    version = content.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise ArtifactError(f"{path}: format_version must be {FORMAT_VERSION}; got {version!r}")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        raise ArtifactError(f"{path}: {describe_validation_error(error)}") from error


def _largest(errors: Iterable[float]) -> float:
    """Return the largest error; NaN counts as infinity, because `max` would ignore it."""
    return max(math.inf if math.isnan(error) else error for error in errors)
