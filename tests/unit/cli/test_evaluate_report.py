"""`iddpm evaluate report`: a page that needs no network."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image
from typer.testing import CliRunner

from cli.main import app
from tests.unit.cli.test_plot_command import write_results, write_run

SAMPLES = {
    "kind": "samples",
    "date": "2026-01-01",
    "command": "iddpm evaluate samples <model> & more",
    "model": "model",
    "sampling": {"steps": 3},
    "features": {"kind": "inception", "file": "weights.pth", "sha256": "a" * 64},
    "reference": {"data": "test.npz", "images": 20},
    "results": [{"name": "the model", "images": 10, "frechet_distance": 12.5, "kid": 0.01, "kid_std": 0.002}],
}


class Sources(HTMLParser):
    """Collects what a browser would load, and the tags that were opened and closed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "iframe")
        self.found += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]
        if tag not in ("meta", "link", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def make(folder: Path) -> Path:
    run = write_run(folder / "my <run>")
    write_results(run)
    (run / "samples").mkdir()
    for images in range(100, 1200, 100):
        Image.new("RGB", (20, 10)).save(run / "samples" / f"{images:012d}.png")
    (run / "fid").mkdir()
    (run / "fid" / "results.json").write_text(json.dumps(SAMPLES))
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(run / "fid" / "grid.png")
    (run / "train_config.json").write_text('{"total_images": 5000, "loss": "hybrid", "model": {"image_size": 8}}')
    (run / "model").mkdir()
    provenance = {"command": "iddpm train fashion32 --data x.npz", "data": {"file": "x.npz", "sha256": "b"}}
    (run / "model" / "config.json").write_text(json.dumps({"provenance": provenance}))
    return run


def test_a_report_has_everything_in_one_file(tmp_path: Path) -> None:
    out = tmp_path / "pages" / "report.html"
    result = CliRunner().invoke(app, ["evaluate", "report", str(make(tmp_path)), "--out", str(out)])
    assert result.exit_code == 0, result.output
    page = out.read_text()
    parser = Sources()
    parser.feed(page)
    assert parser.open == []
    assert all(source.startswith(("data:", "#")) for source in parser.found)
    assert "<h1>my &lt;run&gt;</h1>" in page
    assert "iddpm evaluate samples &lt;model&gt; &amp; more" in page
    assert "iddpm train fashion32 --data x.npz" in page
    assert re.search(r"FID</th>.*12\.500</td>", page)
    assert "2,900 of 5,000" in page
    assert [name for name in ("after 100 images", "after 1,100 images", "after 200 images") if name in page] == [
        *("after 100 images", "after 1,100 images"),
    ]
    assert page.count('prefers-color-scheme: dark)" srcset') == 6


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    out = str(tmp_path / "report.html")
    result = CliRunner().invoke(app, ["evaluate", "report", str(tmp_path), "--out", out])
    assert result.exit_code == 1
    assert "neither a run" in " ".join(result.output.split())
