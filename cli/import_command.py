"""`iddpm import`: convert one of OpenAI's `.pt` files, or a diffusers folder, to a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from cli.errors import fail, needs_extra

if TYPE_CHECKING:
    from diffusion.config import FrozenConfig, ImageSize
    from formats.checkpoint_config import AnyCheckpointConfig
    from interchange.sanity_check import SanityReport


C = TypeVar("C", bound="FrozenConfig")


def import_command(
    path: Annotated[Path, typer.Argument(help="File of OpenAI's code, e.g. ema_*.pt, or a diffusers folder.")],
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write; must not exist.")],
    preset: Annotated[
        str | None, typer.Option(help="Name of a checkpoint published by OpenAI, e.g. imagenet64-cond-270m.")
    ] = None,
    repo: Annotated[
        str | None, typer.Option(help="Repository whose code trained your own model: improved or guided.")
    ] = None,
    flag: Annotated[
        list[str] | None, typer.Option(help="With --repo: a flag of the training, NAME=VALUE. Can be repeated.")
    ] = None,
    flags: Annotated[
        str, typer.Option(help="With --repo: the training's flags as on its command line, '--image_size 64 ...'.")
    ] = "",
    class_names: Annotated[
        Path | None, typer.Option(help="Text file with one class name per line, in label order.")
    ] = None,
    scheduler: Annotated[
        Path | None, typer.Option(help="With a diffusers folder: scheduler_config.json, if it is elsewhere.")
    ] = None,
    unet: Annotated[
        str | None,
        typer.Option(
            help="With a diffusers folder: subfolder of the network. Default: unet_ema if present, else unet."
        ),
    ] = None,
    null_class: Annotated[
        bool, typer.Option("--null-class", help="With a diffusers folder: the last label means 'no label'.")
    ] = False,
    allow_failed_sanity_check: Annotated[
        bool, typer.Option("--allow-failed-sanity-check", help="Write the checkpoint even if the sanity check fails.")
    ] = False,
) -> None:
    """Import weights of OpenAI's code, or a diffusers UNet2DModel, as a checkpoint.

    A file of openai/improved-diffusion or openai/guided-diffusion holds weights only: describe the network with
    --preset, or with --repo and the flags of the training. A diffusers folder needs neither. No code in files is run.
    """
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"--out: {out} exists already; name a new folder")
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        if path.is_dir():
            if preset is not None or repo is not None or flag or flags:
                raise ValueError(f"--preset, --repo, --flag and --flags are for files; {path} is a folder")
            with needs_extra("torch"):
                report = _import_folder(path, scheduler, unet, null_class, class_names, out, allow_failed_sanity_check)
        else:
            if scheduler is not None or unet is not None or null_class:
                raise ValueError(f"--scheduler, --unet and --null-class are for diffusers folders; {path} is a file")
            with needs_extra("torch"):
                config = _with_class_names(resolve(path, preset, repo, flag or [], flags), class_names)
                report = _import_file(path, preset, config, out, allow_failed_sanity_check)
    except (ValueError, OSError) as error:
        fail(error)

    if report.eps_error is None:
        typer.echo(f"sanity check: not done. {report.advice}")
    elif report.passed:
        typer.echo(f"sanity check: passed. {report.advice}")
    else:
        typer.secho(f"sanity check: FAILED. {report.advice}", err=True, fg="red")
    if not report.passed and not allow_failed_sanity_check:
        fail("nothing was written (--allow-failed-sanity-check writes it anyway)")
    typer.echo(f"imported: {out}")


def _import_file(
    file: Path, preset: str | None, config: AnyCheckpointConfig, out: Path, allow_failed_check: bool
) -> SanityReport:
    from interchange.import_openai import import_checkpoint
    from interchange.published import PUBLISHED

    typer.echo(summary(config))
    if preset is not None:
        typer.secho(f"licence: {PUBLISHED[preset].licence}", fg="yellow")
    typer.echo(f"reading and checking {file} ...")
    return import_checkpoint(file, config, out, allow_failed_check, _note)


def _import_folder(
    path: Path,
    scheduler: Path | None,
    unet: str | None,
    null_class: bool,
    class_names: Path | None,
    out: Path,
    allow_failed_check: bool,
) -> SanityReport:
    from interchange.import_diffusers import describe_folder, import_folder, open_folder

    folder = open_folder(path, scheduler, unet)
    config = _with_class_names(describe_folder(folder, null_class), class_names)
    typer.echo(summary(config))
    typer.echo(f"reading and checking {folder.weights} ...")
    return import_folder(folder, config, out, allow_failed_check, _note)


def _note(text: str) -> None:
    typer.echo(f"note: {text}")


def resolve(
    file: Path, preset: str | None, repo: str | None, assignments: list[str], flag_line: str
) -> AnyCheckpointConfig:
    """Return the configuration of a preset, or of a repository's flags.

    Raises:
        ValueError: neither or both are given, or a name or value is unknown; the message lists the known ones.
    """
    from interchange.openai_flags import config_from_flags, parse_flag_line
    from interchange.published import PUBLISHED

    presets = ", ".join(PUBLISHED)
    if preset is not None:
        if repo is not None or assignments or flag_line:
            raise ValueError("--repo, --flag and --flags cannot be used with --preset")
        if preset not in PUBLISHED:
            raise ValueError(f"unknown preset {preset!r}; allowed: {presets}")
        return PUBLISHED[preset].config
    if repo is None:
        if (file.parent / "config.json").is_file():
            raise ValueError(f"{file.name} is described by the config.json beside it: import the folder, {file.parent}")
        named = [model.name for model in PUBLISHED.values() if model.file_name == file.name]
        hint = f"{file.name} is the published name of --preset {named[0]}" if named else f"presets: {presets}"
        raise ValueError(f"--preset NAME, or --repo improved|guided with flags, must be given; {hint}")
    if repo not in ("improved", "guided"):
        raise ValueError(f"--repo must be improved or guided; got {repo!r}")
    given = parse_flag_line(flag_line)
    for assignment in assignments:
        name, separator, value = assignment.partition("=")
        if not separator:
            raise ValueError(f"--flag takes name=value; got {assignment!r}")
        given[name.removeprefix("--")] = value
    return config_from_flags("improved" if repo == "improved" else "guided", given)


def _with_class_names(config: C, path: Path | None) -> C:
    from pydantic import ValidationError

    from formats.checkpoint_config import describe_validation_error

    if path is None:
        return config
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must hold class names in UTF-8, one per line: {error}") from error
    names = [line.strip() for line in lines if line.strip()]
    try:
        return config.replace(class_names=names)
    except ValidationError as error:
        raise ValueError(f"{path}: {describe_validation_error(error)}") from error


def summary(config: AnyCheckpointConfig) -> str:
    """Return a short table that describes a configuration."""
    model, diffusion = config.model, config.diffusion
    heads = f"{model.num_head_channels} channels each" if model.num_head_channels else str(model.num_heads)
    rows = {
        "kind": config.kind,
        "image size": f"{_size(model.image_size)} px",
        "width": f"{model.model_channels} x {', '.join(f'{mult:g}' for mult in model.channel_mult)}",
        "blocks per level": str(model.num_res_blocks),
        "attention": f"at {', '.join(map(str, model.attention_resolutions)) or 'the middle only'}; heads: {heads}; "
        f"{model.attention_order} order",
        "classes": str(model.num_classes or "none"),
        "process": f"T = {diffusion.num_timesteps}, {diffusion.noise_schedule}, {diffusion.variance}, predicts "
        f"{diffusion.prediction}{', rescaled timesteps' if diffusion.rescale_timesteps else ''}",
    }
    if config.kind == "unet" and config.model.low_res_size is not None:
        sizes = f"{_size(config.model.low_res_size)} -> {_size(model.image_size)} px"
        rows["super-resolution"] = sizes
    lines = [f"{name:<17} {value}" for name, value in rows.items()]
    return "\n".join([*lines, *(f"note: {note}" for note in config.provenance.get("notes", []))])


def _size(size: ImageSize) -> str:
    return f"{size[0]} (height) x {size[1]} (width)" if isinstance(size, tuple) else str(size)
