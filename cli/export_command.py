"""`iddpm export`: write a checkpoint as an artifact for the service, or as the files of another tool."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from cli.errors import fail, needs_extra, tidy_on_sigterm
from cli.threads import limit_torch_threads

if TYPE_CHECKING:
    from formats.artifact import ChainParity, NetworkParity, NotMeasured
    from formats.precision import Precision

OPTIONS = {"onnx": ("--precision", "--buckets"), "tensorrt": ("--precision", "--buckets", "--gpu"), "diffusers": ()}
"""The options of each format."""
BUCKETS = "1,2,4,8,16,32,64"


def export_command(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder to read.")],
    out: Annotated[Path, typer.Argument(help="Folder to write. The service finds CHECKPOINT/artifact by itself.")],
    format_: Annotated[
        str,
        typer.Option("--format", help="onnx or tensorrt: for the service. diffusers: for diffusers' UNet2DModel."),
    ] = "onnx",
    precision: Annotated[
        str | None,
        typer.Option(help="With onnx, tensorrt: precision of the graph, fp32, bf16 or fp16. Default: fp32."),
    ] = None,
    buckets: Annotated[
        str | None, typer.Option(help=f"With onnx, tensorrt: batch sizes to compile for. Default: {BUCKETS}.")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="With tensorrt: compute capability to build for, e.g. sm89. Default: this machine's GPU."),
    ] = None,
) -> None:
    """Export a checkpoint for the service, or to another tool's format.

    An ONNX artifact is compared with PyTorch first: network calls by timestep, and the pixels of whole chains. If the
    errors exceed the limits in the printed table, nothing is written. A noisy classifier in CHECKPOINT/classifier,
    which guides the model, is exported to OUT/classifier. For tensorrt, one engine per batch size is then built from
    the artifact; an existing artifact of the same checkpoint, precision and batch sizes is reused.
    """
    from formats.artifact import ArtifactError
    from formats.checkpoint_config import CheckpointError
    from formats.tensorrt_package import EngineError
    from interchange.diffusers_config import DoesNotMap
    from model_export.library_errors import LibraryError
    from service.errors import ModelError

    if format_ not in OPTIONS:
        fail(f"--format must be one of {', '.join(OPTIONS)}; got {format_!r}", code=2)
    _refuse_other_options(format_, {"--precision": precision, "--buckets": buckets, "--gpu": gpu})
    chosen = _parse_precision("fp32" if precision is None else precision)
    sizes = _parse_buckets(BUCKETS if buckets is None else buckets)
    try:
        with needs_extra("export"), tidy_on_sigterm():
            limit_torch_threads()
            if format_ == "diffusers":
                from model_export.diffusers_export import export_diffusers

                export_diffusers(checkpoint, out)
            elif format_ == "tensorrt":
                _export_tensorrt(checkpoint, out, chosen, sizes, gpu)
            else:
                _export_onnx(checkpoint, out, chosen, sizes)
    except LibraryError as error:
        fail(
            f"{error}; nothing was written. Install the versions in constraints.txt, which are known to work, or use "
            "iddpm serve --backend torch, which needs no export"
        )
    except (ArtifactError, CheckpointError, DoesNotMap, EngineError, ModelError, OSError) as error:
        fail(error)
    typer.echo(f"exported: {out}")


def _refuse_other_options(format_: str, given: dict[str, str | None]) -> None:
    """End the command if an option was given that the format does not have."""
    allowed = OPTIONS[format_]
    unfit = [name for name, value in given.items() if value is not None and name not in allowed]
    if unfit:
        has = f"takes only {' and '.join(allowed)}" if allowed else f"takes none of {', '.join(given)}"
        fail(f"{' and '.join(unfit)} cannot be used with --format {format_}, which {has}", code=2)


def _parse_precision(text: str) -> Precision:
    from formats.precision import Precision

    precision: Precision | None = next((p for p in get_args(Precision) if p == text), None)
    if precision is None:
        fail(f"--precision must be one of {', '.join(get_args(Precision))}; got {text!r}", code=2)
    return precision


def _parse_buckets(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= 1024 for part in parts):
        fail(f"--buckets must be numbers in 1..1024, separated by commas; got {text!r}", code=2)
    return tuple(sorted({int(part) for part in parts}))


def _export_onnx(checkpoint: Path, out: Path, precision: Precision, buckets: tuple[int, ...]) -> None:
    from model_export.artifact_export import ParityError, export_artifact

    try:
        manifests = export_artifact(checkpoint, out, precision, buckets, notify=lambda what: typer.echo(f"{what} ..."))
    except ParityError as error:
        typer.echo(parity_table(error.parity, error.chains))
        raise
    for manifest in manifests:
        typer.echo(parity_table(manifest.parity, manifest.chains, manifest.not_measured))


def _export_tensorrt(
    checkpoint: Path, out: Path, precision: Precision, buckets: tuple[int, ...], gpu: str | None
) -> None:
    import torch

    from cli.engines import measure_engines, show_phase
    from formats.checkpoint_config import read_config
    from formats.tensorrt_package import EngineError
    from model_export.tensorrt_build import build_missing, find_target

    config = read_config(checkpoint)
    if config.kind == "classifier":
        raise EngineError(f"{checkpoint} holds a noisy classifier, for which no engine can be built; use --format onnx")
    target = find_target(gpu)
    if not _is_current(checkpoint, out, precision, buckets):
        _export_onnx(checkpoint, out, precision, buckets)
    measures = gpu is None and torch.cuda.is_available()
    build_missing(out, target, buckets, rebuild_rejected=measures, notify=typer.echo, progress=show_phase)
    if measures:
        measured = measure_engines(checkpoint, out)
        typer.echo(parity_table(tuple(measured.values()), ()))
        if failed := [str(size) for size, parity in measured.items() if not parity.passed]:
            raise EngineError(
                f"engines for batches of {', '.join(failed)} are too far from PyTorch, so the service rejects them; "
                "try --precision fp32"
            )
    else:
        typer.echo(f"built for {target.name}; not compared with PyTorch, which needs that GPU")


def _is_current(checkpoint: Path, out: Path, precision: Precision, buckets: tuple[int, ...]) -> bool:
    """Return whether an artifact equals the one to export, so that engines can be added to it."""
    from formats.artifact import (
        ArtifactError,
        find_artifact,
        read_artifact,
        refuse_foreign,
        refuse_foreign_classifier,
    )

    if find_artifact(out) != out:
        return False
    try:
        manifest = read_artifact(out)
        refuse_foreign(out, manifest, checkpoint)
        refuse_foreign_classifier(out, checkpoint)
    except ArtifactError as error:
        typer.echo(f"exporting again: {error}")
        return False
    return (manifest.precision, manifest.buckets) == (precision, buckets)


def parity_table(
    parity: tuple[NetworkParity, ...], chains: tuple[ChainParity, ...], not_measured: tuple[NotMeasured, ...] = ()
) -> str:
    """Format a parity report: relative errors by band of timesteps, then differences of pixels."""
    lines = ["", "relative error against PyTorch in float32 (prediction / variance), by timestep:"]
    for p in parity:
        verdict = "ok" if p.passed else "TOO FAR"
        lines.append(f"  {p.file}, {p.backend}, {p.precision}: at most {p.worst:.1e}, limit {p.limit:.0e}: {verdict}")
        for band in p.bands:
            variance = "" if band.variance is None else f" / {band.variance:.1e}"
            lines.append(f"    t {band.t_min:>4}..{band.t_max:<4}  {band.prediction:.1e}{variance}")
    lines += [f"  {m.file}, {m.backend}, {m.precision}: not measured: {m.reason}" for m in not_measured]
    if chains:
        lines.append("8-bit values that differ after whole chains, by more than 1, 2, 4 levels:")
    for c in chains:
        verdict = (
            "reported only" if c.limit is None else f"limit {c.limit:.1%} beyond 2: {'ok' if c.passed else 'TOO FAR'}"
        )
        shares = ", ".join(f"{share:.2%}" for share in (c.beyond_1, c.beyond_2, c.beyond_4))
        lines.append(f"  {c.backend}, {c.precision}, {c.steps} steps, {c.images} images: {shares} ({verdict})")
    return "\n".join([*lines, ""])
