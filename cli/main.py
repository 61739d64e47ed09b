"""`iddpm`: one Typer app. Errors of use print one line and exit with code 1 or 2, without a traceback."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.bench_command import bench_command
from cli.ema_command import ema_command
from cli.encode_command import encode_command
from cli.ensemble_command import ensemble_command
from cli.evaluate_command import evaluate_app
from cli.export_command import export_command
from cli.generate_command import generate_command
from cli.import_command import import_command
from cli.keys_command import keys_app
from cli.names_in_help import NamesInHelp
from cli.plot_command import plot_command
from cli.process_one import let_sigterm_end_process_1
from cli.sample_command import sample_command
from cli.serve_command import serve_command
from cli.study_command import study_app
from cli.train_command import train_command

app = typer.Typer(
    name="iddpm",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("iddpm"))
        raise typer.Exit


@app.callback()
def main(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train, import, export, sample and serve pixel-space diffusion models (Improved DDPM, ADM)."""
    let_sigterm_end_process_1()


app.command("train")(train_command)
app.command("ema")(ema_command)
app.command("ensemble")(ensemble_command)
app.command("plot")(plot_command)
app.add_typer(study_app, name="study")
app.add_typer(evaluate_app, name="evaluate")
app.command("serve", cls=NamesInHelp)(serve_command)
app.command("sample", cls=NamesInHelp)(sample_command)
app.command("generate", cls=NamesInHelp)(generate_command)
app.command("encode", cls=NamesInHelp)(encode_command)
app.command("bench")(bench_command)
app.command("import")(import_command)
app.command("export")(export_command)
app.add_typer(keys_app, name="keys")

if __name__ == "__main__":  # torchrun starts a module: torchrun -m cli.main train ...
    app()
