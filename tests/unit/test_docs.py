"""The documentation and the code are consistent."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client.metrics import MetricWrapperBase

from service.metrics import Metrics
from service.requests.generate_request import GenerateRequest
from tests.paths import ROOT
from trainer.fields import train_fields

MARKDOWN = sorted(path for path in ROOT.glob("**/*.md") if not {".venv", "runs", "build", "data"} & set(path.parts))


def test_every_metric_is_documented_and_every_documented_metric_exists() -> None:
    metrics = [value for value in vars(Metrics()).values() if isinstance(value, MetricWrapperBase)]
    names = {family.name + ("_total" if family.type == "counter" else "") for m in metrics for family in m.describe()}
    documented = set(
        re.findall(r"^\| `(iddpm_\w+)`", (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert names == documented


def test_every_field_of_a_request_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, field in GenerateRequest.model_fields.items():
        assert f"`{field.alias or name}`" in readme


def test_every_field_of_a_training_run_is_documented_as_it_is() -> None:
    rows = [
        f"| `{field.name}` | {field.type} | {field.default} | {field.allowed} | {field.meaning} |".replace(
            "q|k|v", r"q\|k\|v"
        )
        for field in train_fields()
    ]
    document = (ROOT / "docs" / "train-fields.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `.*", document, re.MULTILINE) == rows, "the table should be:\n" + "\n".join(rows)


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_files_have_targets(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), target
