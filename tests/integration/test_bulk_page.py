"""Everything on docs/bulk.md runs, with few images of few steps of a tiny model of the bundled model's shape."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.given_pictures import ROOT, run_page
from cli.main import app
from formats.checkpoint import write_checkpoint
from formats.generated_folder import read_generation
from tests.fakes import tiny_network
from tests.integration.test_given_images_page import CONFIG

PAGE = ROOT / "docs" / "bulk.md"
FEW = {"--num": "4", "--per-class": "1", "--shard-size": "3", "--steps": "2"}


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves files open
def test_every_block_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IDDPM_MAX_ROWS", "2")  # each command warms up fewer sizes
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    model, folder = tmp_path / "model", tmp_path / "page"
    write_checkpoint(model, CONFIG, tiny_network(CONFIG).state_dict())
    folder.mkdir()
    formats = set()

    def command(arguments: list[str]) -> None:
        few = [str(model) if word == "models/fashion32" else word for word in arguments]
        few += [] if "--steps" in few else ["--steps", "2"]
        few = [FEW.get(option, word) for option, word in zip(["", *few], few, strict=False)]
        result = CliRunner().invoke(app, few)
        assert result.exit_code == 0, f"{' '.join(arguments)}: {result.output}"
        found = read_generation(folder / arguments[arguments.index("--out") + 1])
        assert found.complete
        formats.add(found.format)

    run_page(PAGE.read_text(encoding="utf-8"), folder, command, "")
    assert formats == {"png", "webdataset", "parquet", "npz"}
