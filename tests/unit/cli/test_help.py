"""Help texts list the contents of the registries."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from cli.main import app
from diffusion.plans import SAMPLERS, Sampler, ancestral_plan
from service.backends.select import BACKENDS
from tests.waiting import PATIENCE_S


def help_of(command: str) -> str:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "300", "TERM": "dumb"})
    assert result.exit_code == 0
    return " ".join(result.output.split())


def test_help_lists_the_samplers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "ancestral, ddim, dpm++ or sde-dpm++." in help_of("sample")
    assert "With ddim: share of noise, 0..1. Default: 0." in help_of("sample")
    assert "Recommended for ancestral: 50 to 250, ddim: 50 to 250, dpm++: 10 to 25, sde" in help_of("sample")
    assert "of another shape: crop, pad or resize." in help_of("sample")
    monkeypatch.setitem(SAMPLERS, "toy", Sampler(plan=ancestral_plan))
    assert "ancestral, ddim, dpm++, sde-dpm++ or toy." in help_of("sample")


def test_help_lists_the_backends() -> None:
    assert f"auto, {', '.join([*BACKENDS][:-1])} or {[*BACKENDS][-1]}. Default: auto." in help_of("serve")


def test_the_registries_are_not_imported_before_help_is_printed() -> None:
    registries = {"diffusion.plans", "service.backends.select"}
    code = f"import sys, cli.main; print(sorted({registries} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=PATIENCE_S)
    assert run.stdout.strip() == "[]"
