"""`iddpm train`: train a checkpoint on labelled images."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.errors import fail, needs_extra


def _list_presets(wanted: bool) -> None:
    if wanted:
        with needs_extra("train"):
            from trainer.presets import PRESETS, describe
        width = max(map(len, PRESETS))
        for name in PRESETS:
            typer.echo(f"{name:{width}}  {describe(name)}")
        raise typer.Exit


def _list_fields(wanted: bool) -> None:
    if wanted:
        with needs_extra("train"):
            from trainer.fields import train_fields
        for field in train_fields():
            allowed = f", {field.allowed}" if field.allowed else ""
            typer.echo(f"{field.name}: {field.type}{allowed}; default: {field.default}\n    {field.meaning}")
        raise typer.Exit


def train_command(
    preset: Annotated[
        str, typer.Argument(help="Name of a configuration, e.g. fashion32, cifar10, guided-256; --list shows all.")
    ],
    data: Annotated[
        Path,
        typer.Option(
            help="Folder with one subfolder per class, npz file with images, labels and classes, npy file of images, "
            "or Hugging Face data set saved to disk."
        ),
    ],
    cond: Annotated[
        Path | None,
        typer.Option(
            help="Conditioning images of a model that takes them (model.cond_channels): folder with a file of the same "
            "name for each image, or npy file. Default: array `cond` of the npz file."
        ),
    ] = None,
    validation: Annotated[
        Path | None,
        typer.Option(
            help="Held-out images in a data set of their own, instead of a share of the data (validation_share)."
        ),
    ] = None,
    validation_cond: Annotated[
        Path | None, typer.Option(help="Conditioning images of --validation, as --cond.")
    ] = None,
    _: Annotated[
        bool, typer.Option("--list", callback=_list_presets, is_eager=True, help="List the configurations and exit.")
    ] = False,
    _fields: Annotated[
        bool,
        typer.Option(
            "--fields", callback=_list_fields, is_eager=True, help="List the fields that --set takes, and exit."
        ),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the run. Default: runs/PRESET.")] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Set a field of the configuration (--fields lists all), NAME=VALUE, e.g. model.dropout=0.1. Can be "
            "repeated.",
        ),
    ] = None,
    initial: Annotated[
        Path | None,
        typer.Option(
            "--init", help="Begin with the weights of this model folder (fine-tuning); default: with random weights."
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the run in --out with its recorded configuration, changed by --set."),
    ] = False,
    accept_changed_data: Annotated[
        bool, typer.Option("--accept-changed-data", help="With --resume: continue even if the data have changed.")
    ] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write the log and sample grids for TensorBoard.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check --out and the data, print the resolved configuration and exit.")
    ] = False,
    decode_all: Annotated[
        bool,
        typer.Option("--decode-all", help="Decode every image before the first step, to find damaged files."),
    ] = False,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder for indexes of large folders and unpacked arrays. Default: the user's cache folder."),
    ] = None,
) -> None:
    """Train a checkpoint: a diffusion model, or a noisy classifier that guides one.

    The trained checkpoint is RUN/model; serve it with `iddpm serve --model RUN/model`. Ctrl-C and SIGTERM end the run
    after the current batch and write a checkpoint; --resume continues it.
    """
    with needs_extra("train"):
        from pydantic import ValidationError

        from cli.threads import limit_torch_threads
        from formats.checkpoint_config import describe_validation_error
        from trainer.data import open_dataset
        from trainer.decided import refuse_overruled, split_decided
        from trainer.errors import Stopped, TrainError
        from trainer.initial_model import read_initial_model
        from trainer.loop import resolve, train
        from trainer.presets import preset as named_preset
        from trainer.ranks import joined, main_first
        from trainer.resume import resumed_config
        from trainer.run_folder import check_out
        from trainer.stop_request import StopRequest

        limit_torch_threads()

    run = out or Path("runs") / preset
    stop = StopRequest()
    assignments = [*(assignments or []), *(["tensorboard=true"] if tensorboard else [])]
    command = _Command(preset, tuple(assignments), accept_changed_data)
    sources = _Sources(data, cond, validation, validation_cond)
    main = os.environ.get("RANK", "0") == "0"
    try:
        if accept_changed_data and not resume:
            raise ValueError("--accept-changed-data can only be used with --resume")
        if initial is not None and resume:
            raise ValueError("--init starts a new run and cannot be used with --resume: a resumed run has its weights")
        start = named_preset(preset)
        free, decided = split_decided(parse_assignments(assignments))
        config = (resumed_config(run, preset) if resume else start).with_overrides(free)
        if validation_cond is not None and validation is None:
            raise ValueError("--validation-cond can only be used with --validation")
        if main and (out is not None or not dry_run):
            check_out(run, resume=resume)  # reading the data may take minutes
        with stop.on_signals(), joined(stop) as ranks:
            opened = partial(
                open_dataset,
                image_size=config.model.image_size,
                channels=config.model.image_channels,
                options=config.data,
                labelled=config.class_conditional,
                cond_channels=config.cond_channels,
                # All processes must find the same readable images; only the main one needs to report the others.
                decode_all=decode_all and (main or config.data.unreadable == "skip"),
                cache=cache,
            )
            with stop.suspended():
                dataset = main_first(ranks, partial(opened, data, cond=cond))
                held = None
                if validation is not None:
                    held = main_first(ranks, partial(opened, validation, cond=validation_cond))
            resolved = resolve(config, dataset, held)
            refuse_overruled(decided, resolved, dataset)
            weights = None if initial is None else read_initial_model(initial, resolved)
            if main:
                typer.echo(resolved.model_dump_json(indent=2))
                typer.echo(dataset.summary, err=True)
                for line in held.summary.splitlines() if held else ():
                    typer.echo(f"validation {line}", err=True)
            if dry_run:
                return
            model = train(
                resolved,
                dataset,
                run,
                resume=resume,
                command=command.text(
                    *sources.options(attrgetter("name")), *_begins(resume, initial and Path(initial.name))
                ),
                accept_changed_data=accept_changed_data,
                validation=held,
                initial=weights,
                stop=stop,
                ranks=ranks,
            )
    except ValidationError as error:
        fail(describe_validation_error(error))
    except Stopped as stopped:
        if main:
            again = (*_places(sources, run, cache), *_begins(stopped.images_seen > 0, initial))
            typer.echo(f"{stopped}; to continue: {command.text(*again)}", err=True)
        raise typer.Exit(128 + (stop.signal or 0)) from None
    except TrainError as error:
        if error.resume_with is not None:
            again = (*_places(sources, run, cache), *_begins(True, None))
            fail(f"{error}. To continue: {command.text(*again, changed=error.resume_with)}")
        fail(error)
    except (ValueError, OSError) as error:
        fail(error)
    if main:
        classifies = resolved.loss == "cross_entropy"
        use = f"guide a model with it: cp -r {model} MODEL/classifier" if classifies else f"iddpm serve --model {model}"
        typer.echo(f"trained: {model}\n{'' if classifies else 'try it: '}{use}")


@dataclass(frozen=True)
class _Command:
    """The command as given, to record it and to print how to repeat it."""

    preset: str
    assignments: tuple[str, ...]
    accept_changed_data: bool

    def text(self, *options: str, changed: Sequence[str] = ()) -> str:
        """Return a command line with other options, and the fields that were set; `changed` replaces some of them."""
        names = {assignment.partition("=")[0] for assignment in changed}
        kept = [assignment for assignment in self.assignments if assignment.partition("=")[0] not in names]
        sets = [part for assignment in (*kept, *changed) for part in ("--set", assignment)]
        accept = ["--accept-changed-data"] if self.accept_changed_data else []
        return shlex.join(["iddpm", "train", self.preset, *options, *sets, *accept])


@dataclass(frozen=True)
class _Sources:
    """Where the data of a run are."""

    data: Path
    cond: Path | None
    validation: Path | None
    validation_cond: Path | None

    def options(self, shown: Callable[[Path], str] = str) -> list[str]:
        """Return the options that name the data; `shown` returns the text of a path."""
        paths = {f"--{name.replace('_', '-')}": path for name, path in vars(self).items()}
        return [part for option, path in paths.items() if path is not None for part in (option, shown(path))]


def _places(sources: _Sources, run: Path, cache: Path | None) -> list[str]:
    return [*sources.options(), "--out", str(run), *([] if cache is None else ["--cache", str(cache)])]


def _begins(resume: bool, initial: Path | None) -> list[str]:
    """Return the options that say with which weights a run begins."""
    return ["--resume"] if resume else [] if initial is None else ["--init", str(initial)]


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """Parse `name=value` pairs. A value is JSON if it is valid, else a JSON list without brackets, else a string.

    Raises:
        ValueError: an assignment has no `=`.
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
