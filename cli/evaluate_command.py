"""`iddpm evaluate`: measure trained models."""

from __future__ import annotations

import typer

from cli.evaluate_nll import nll_command
from cli.evaluate_noise_scale import noise_scale_command
from cli.evaluate_report import report_command
from cli.evaluate_samples import samples_command
from cli.names_in_help import NamesInHelp

evaluate_app = typer.Typer(
    no_args_is_help=True, help="Measure trained models: samples, likelihood, gradient noise, reports."
)
evaluate_app.command("samples", cls=NamesInHelp)(samples_command)
evaluate_app.command("nll")(nll_command)
evaluate_app.command("noise-scale")(noise_scale_command)
evaluate_app.command("report")(report_command)
