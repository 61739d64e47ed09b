"""`iddpm train`: from labelled images to a checkpoint."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
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
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out, with its own configuration; --set changes it.")
    ] = False,
    accept_changed_data: Annotated[
        bool, typer.Option("--accept-changed-data", help="With --resume: go on although the data have changed.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the data, print the resolved configuration and stop.")
    ] = False,
    decode_all: Annotated[
        bool, typer.Option("--decode-all", help="Decode every image before the first step, however many there are.")
    ] = False,
) -> None:
    """Train an L_hybrid checkpoint; RUN/model is what `iddpm serve --model` takes.

    Ctrl-C and SIGTERM end the run after the batch under way, with a checkpoint; --resume continues it.
    """
    with needs_extra("train"):
        from pydantic import ValidationError

        from cli.threads import limit_torch_threads
        from formats.checkpoint_config import describe_validation_error
        from trainer.data import open_dataset
        from trainer.decided import refuse_overruled, split_decided
        from trainer.errors import Stopped, TrainError
        from trainer.loop import resolve, train
        from trainer.presets import preset as named_preset
        from trainer.resume import resumed_config
        from trainer.stop_request import StopRequest

        limit_torch_threads()

    run = out or Path("runs") / preset
    stop = StopRequest()
    command = _Command(preset, tuple(assignments or []), accept_changed_data)
    try:
        if accept_changed_data and not resume:
            raise ValueError("--accept-changed-data is for --resume")
        start = named_preset(preset)
        free, decided = split_decided(parse_assignments(assignments or []))
        config = (resumed_config(run, preset) if resume else start).with_overrides(free)
        dataset = open_dataset(
            data,
            config.model.image_size,
            config.model.image_channels,
            config.data,
            labelled=config.class_conditional,
            decode_all=decode_all,
        )
        resolved = resolve(config, dataset)
        refuse_overruled(decided, resolved, dataset)
        typer.echo(resolved.model_dump_json(indent=2))
        typer.echo(dataset.summary, err=True)
        if dry_run:
            return
        with stop.on_signals():
            model = train(
                resolved,
                dataset,
                run,
                resume=resume,
                command=command.text("--data", data.name, *(["--resume"] if resume else [])),
                accept_changed_data=accept_changed_data,
                stop=stop,
            )
    except ValidationError as error:
        fail(describe_validation_error(error))
    except Stopped as stopped:
        again = _resumed(data, run) if stopped.images_seen else _resumed(data, run)[:-1]  # without --resume
        typer.echo(f"{stopped}; to continue: {command.text(*again)}", err=True)
        raise typer.Exit(128 + (stop.signal or 0)) from None
    except TrainError as error:
        if error.resume_with is not None:
            fail(f"{error}. To continue: {command.text(*_resumed(data, run), changed=error.resume_with)}")
        fail(error)
    except (ValueError, OSError) as error:
        fail(error)
    typer.echo(f"trained: {model}\ntry it: iddpm serve --model {model}")


@dataclass(frozen=True)
class _Command:
    """The command as it was given, to be recorded, and to be given again."""

    preset: str
    assignments: tuple[str, ...]
    accept_changed_data: bool

    def text(self, *options: str, changed: Sequence[str] = ()) -> str:
        """Return a command line with some options, and the fields that were set, of which some are changed."""
        names = {assignment.partition("=")[0] for assignment in changed}
        kept = [assignment for assignment in self.assignments if assignment.partition("=")[0] not in names]
        sets = [part for assignment in (*kept, *changed) for part in ("--set", assignment)]
        accept = ["--accept-changed-data"] if self.accept_changed_data else []
        return shlex.join(["iddpm", "train", self.preset, *options, *sets, *accept])


def _resumed(data: Path, run: Path) -> list[str]:
    return ["--data", str(data), "--out", str(run), "--resume"]


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
