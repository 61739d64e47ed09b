"""`iddpm train`: from labelled images to a checkpoint."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.errors import fail, needs_extra


def train_command(
    preset: Annotated[str, typer.Argument(help="Named configuration, e.g. fashion32, cifar10, imagenet64.")],
    data: Annotated[Path, typer.Option(help="npz file (images, labels, classes) or folder of class subfolders.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the run; default runs/PRESET.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="Override a field: name=value; dotted names reach inside.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run that is in --out.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the data, print the resolved configuration and stop.")
    ] = False,
    decode_all: Annotated[
        bool, typer.Option("--decode-all", help="Decode every image before the first step, however many there are.")
    ] = False,
) -> None:
    """Train an L_hybrid checkpoint; RUN/model is what `iddpm serve --model` takes."""
    with needs_extra("train"):
        from pydantic import ValidationError

        from cli.threads import limit_torch_threads
        from diffusion.checkpoint_config import describe_validation_error
        from trainer.data import open_dataset
        from trainer.loop import resolve, train
        from trainer.presets import preset as named_preset

        limit_torch_threads()

    run = out or Path("runs") / preset
    try:
        config = named_preset(preset).with_overrides(parse_assignments(assignments or []))
        dataset = open_dataset(
            data,
            config.model.image_size,
            config.model.image_channels,
            config.data,
            labelled=config.class_conditional,
            decode_all=decode_all,
        )
        resolved = resolve(config, dataset)
        typer.echo(resolved.model_dump_json(indent=2))
        typer.echo(dataset.summary, err=True)
        if dry_run:
            return
        command = ["iddpm", "train", preset, "--data", data.name]
        command += [part for assignment in assignments or [] for part in ("--set", assignment)]
        command += ["--resume"] if resume else []
        model = train(resolved, dataset, run, resume=resume, command=shlex.join(command))
    except ValidationError as error:
        fail(describe_validation_error(error))
    except (ValueError, OSError) as error:
        fail(error)
    typer.echo(f"trained: {model}\ntry it: iddpm serve --model {model}")


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """Read `name=value` pairs; values are JSON where they can be, else lists of it without brackets, else strings.

    Raises:
        ValueError: a part without `=`.
    """
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator:
            raise ValueError(f"--set takes name=value; got {assignment!r}")
        values[name] = _read_value(text)
    return values


def _read_value(text: str) -> Any:
    for json_text in (text, f"[{text}]") if "," in text else (text,):
        try:
            return json.loads(json_text)
        except json.JSONDecodeError:
            continue
    return text
