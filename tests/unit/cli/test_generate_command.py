"""`iddpm generate`: the images of the service in files, continued after signals and `kill -9`."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from cli.local_engine import AHEAD, LocalEngine, local_settings
from cli.main import app
from formats.checkpoint import write_checkpoint
from formats.folder_lock import folder_lock
from formats.generated_folder import GeneratedFolder, read_generation
from formats.generation import GenerationFormat
from formats.images import encode
from formats.shards import FORMATS
from service.engine.request import GenerationRequest
from service.http.app import create_app
from service.settings import Settings
from tests.counts import LONG
from tests.fakes import CLASS_NAMES, tiny_checkpoint, tiny_config, tiny_network
from tests.integration.exact_service import serving
from tests.waiting import PATIENCE_S

MAX_ROWS = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


def generate(model: Path, out: Path, *arguments: str | float) -> tuple[int, str]:
    options = map(str, ["--out", out, "--steps", 3, "--cfg-scale", 1, *arguments])
    result = CliRunner().invoke(app, ["generate", str(model), *options])
    return result.exit_code, " ".join(result.output.split())


def samples(out: Path) -> tuple[list[list[int]], list[int]]:
    with np.load(out / "samples.npz", allow_pickle=False) as arrays:
        return arrays["arr_0"].tolist(), arrays["arr_1"].tolist()


CHOSEN = range(5, 11)
"""Image indices of the images that are compared with the service's."""


class Served(NamedTuple):
    """What the service returned for the images of `CHOSEN`."""

    classes: list[str]
    pictures: list[bytes]
    """PNG files."""
    numerics_id: str


@pytest.fixture(scope="module")
def served(model: Path) -> Served:
    body = {"steps": 4, "sampler": "ddim", "eta": 0.5, "cfg_scale": 1.5, "seed": 3}
    classes = [("Cat", "Ape")[image_index % 2] for image_index in CHOSEN]
    with serving(create_app(Settings(models=(model,)))) as address:
        answers = [
            httpx.post(
                f"http://{address}/v1/generate",
                json={**body, "image_index": image_index, "class": name},
                headers={"Accept": "image/png"},
                timeout=PATIENCE_S,
            ).raise_for_status()
            for image_index, name in zip(CHOSEN, classes, strict=True)
        ]
        (served_model,) = httpx.get(f"http://{address}/v1/models", timeout=PATIENCE_S).json()["models"]
    return Served(classes, [answer.content for answer in answers], served_model["numerics_id"])


def pictures_in_folders(out: Path, served: Served) -> list[bytes]:
    names = [f"{name}/3_{image_index}.png" for image_index, name in zip(CHOSEN, served.classes, strict=True)]
    assert sorted(str(path.relative_to(out / "images")) for path in out.rglob("*.png")) == sorted(names)
    return [(out / "images" / name).read_bytes() for name in names]


def pictures_in_tars(out: Path, served: Served) -> list[bytes]:
    pictures = list[bytes]()
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith(".png"):
                    assert member.name == f"3_{CHOSEN[len(pictures)]}.png"
                    file = archive.extractfile(member)
                    assert file is not None
                    pictures.append(file.read())
    return pictures


def pictures_in_tables(out: Path, served: Served) -> list[bytes]:
    table = pq.read_table(sorted(out.glob("*.parquet")))
    assert table["image_index"].to_pylist() == list(CHOSEN)
    assert [CLASS_NAMES[label] for label in table["label"].to_pylist()] == served.classes
    return [image["bytes"] for image in table["image"].to_pylist()]


def pictures_of_arrays(out: Path, served: Served) -> list[bytes]:
    """Return the pictures that the service sends for these pixels."""
    with np.load(out / "samples.npz", allow_pickle=False) as arrays:
        assert [CLASS_NAMES[label] for label in arrays["arr_1"]] == served.classes
        for pixels, picture in zip(arrays["arr_0"], served.pictures, strict=True):
            with Image.open(io.BytesIO(picture)) as decoded:
                assert pixels.tobytes() == decoded.tobytes()
        return [encode(pixels) for pixels in arrays["arr_0"]]


PICTURES: dict[GenerationFormat, Callable[[Path, Served], list[bytes]]] = {
    "png": pictures_in_folders,
    "webdataset": pictures_in_tars,
    "parquet": pictures_in_tables,
    "npz": pictures_of_arrays,
}


@pytest.mark.parametrize("form", FORMATS)
def test_every_image_has_the_bytes_that_the_service_returns(
    form: GenerationFormat, model: Path, served: Served, tmp_path: Path
) -> None:
    options = ("--num", len(CHOSEN), "--steps", 4, "--sampler", "ddim", "--eta", 0.5, "--cfg-scale", 1.5)
    chosen = ("--seed", 3, "--image-index", CHOSEN.start, "--class", "cat", "--class", 0, "--shard-size", 4)
    assert generate(model, tmp_path, *options, *chosen, "--format", form)[0] == 0
    assert PICTURES[form](tmp_path, served) == served.pictures
    assert len(set(served.pictures)) == len(CHOSEN)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["numerics_id"] == served.numerics_id
    assert manifest["complete"] is True


def test_ranges_of_other_machines_add_up_to_the_whole(model: Path, tmp_path: Path) -> None:
    for out, more in (("whole", ("--per-class", 2)), ("a", ("--num", 3)), ("b", ("--num", 5, "--image-index", 3))):
        assert generate(model, tmp_path / out, "--format", "npz", *more)[0] == 0
    (whole, labels), (a, a_labels), (b, b_labels) = (samples(tmp_path / out) for out in ("whole", "a", "b"))
    assert whole == a + b
    assert labels == a_labels + b_labels == [0, 1, 2, 3, 0, 1, 2, 3]


KILLED = """
import os, signal, sys
from cli.main import app
from formats.generated_folder import GeneratedFolder

def write_or_be_killed(self, images, pixels):
    if images.start == int(os.environ["KILLED_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, images, pixels)

write, GeneratedFolder.write = GeneratedFolder.write, write_or_be_killed
app()
"""


def test_after_kill_9_the_same_command_continues(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, options = tmp_path / "out", ("--num", 12, "--steps", 3, "--cfg-scale", 1, "--format", "npz")
    command = ["generate", model, *options, "--shard-size", 4, "--out", out]
    monkeypatch.setenv("IDDPM_THREADS", "1")  # part of the numerics_id
    monkeypatch.setenv("KILLED_AT", "4")
    killed = subprocess.run([sys.executable, "-c", KILLED, *map(str, command)], check=False, timeout=PATIENCE_S)
    assert killed.returncode == -signal.SIGKILL
    assert not read_generation(out).complete
    assert [path.name for path in (out / "shards").iterdir()] == ["000000.npz"]

    write, written = GeneratedFolder.write, list[range]()

    def count(self: GeneratedFolder, images: range, pixels: np.ndarray) -> None:
        written.append(images)
        write(self, images, pixels)

    monkeypatch.setattr(GeneratedFolder, "write", count)
    code, output = generate(model, out, *options, "--shard-size", 4)
    assert code == 0, output
    assert written == [range(4, 8), range(8, 12)]
    assert generate(model, tmp_path / "whole", *options)[0] == 0
    assert samples(out) == samples(tmp_path / "whole")


def test_a_folder_is_continued_with_the_default_guidance_scale_written_out(tmp_path: Path) -> None:
    config = tiny_config()
    config = config.replace(sampling=config.sampling.replace(cfg_scale=1.3))
    write_checkpoint(tmp_path / "tiny", config, tiny_network(config).state_dict())
    command = ["generate", tmp_path / "tiny", "--num", 1, "--steps", 2, "--out", tmp_path / "out"]
    for options in ((), ("--cfg-scale", 1.3)):
        result = CliRunner().invoke(app, [str(word) for word in (*command, *options)])
        assert result.exit_code == 0, result.output
        assert read_generation(tmp_path / "out").sampling.cfg_scale == 1.3
    result = CliRunner().invoke(app, [str(word) for word in (*command[:-1], tmp_path / "given", "--cfg-scale", 1.3)])
    assert result.exit_code == 0, result.output
    manifests = [(tmp_path / name / "manifest.json").read_bytes() for name in ("out", "given")]
    assert manifests[0] == manifests[1]


MANY, MANY_PER_SHARD = 5000, 250


def pictures_of(form: GenerationFormat, out: Path) -> int:
    """Return how many images the files of a folder have."""
    match form:
        case "png":
            return sum(1 for _ in (out / "images").rglob("*.png"))
        case "webdataset":
            found = 0
            for path in out.glob("*.tar"):
                with tarfile.open(path) as archive:
                    found += sum(name.endswith(".png") for name in archive.getnames())
            return found
        case "parquet":
            return sum(pq.read_metadata(path).num_rows for path in out.glob("*.parquet"))
        case "npz":
            return len(samples(out)[0])


@pytest.mark.skipif(not LONG, reason="thousands of images: IDDPM_TEST_LONG=1")
@pytest.mark.parametrize("form", FORMATS)
def test_thousands_of_images_are_continued_after_kill_9_with_little_memory(
    form: GenerationFormat, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IDDPM_MAX_ROWS", "64")
    monkeypatch.setenv("KILLED_AT", str(MANY // 2))

    def run(program: list[str], count: int, out: Path) -> tuple[int, int]:
        """Return the exit code and the peak memory in KiB."""
        options = ["--num", count, "--steps", 2, "--cfg-scale", 1, "--format", form, "--shard-size", MANY_PER_SHARD]
        command = [sys.executable, *program, "generate", model, *options, "--out", out]
        process = os.posix_spawn(sys.executable, list(map(str, command)), os.environ)
        _, status, used = os.wait4(process, 0)
        return os.waitstatus_to_exitcode(status), used.ru_maxrss

    whole = ["-m", "cli.main"]
    code, few_kib = run(whole, MANY_PER_SHARD, tmp_path / "few")
    assert code == 0
    killed_code, _ = run(["-c", KILLED], MANY, tmp_path / "many")
    assert killed_code == -signal.SIGKILL
    assert not read_generation(tmp_path / "many").complete
    code, many_kib = run(whole, MANY, tmp_path / "many")
    assert code == 0
    assert read_generation(tmp_path / "many").complete
    assert pictures_of(form, tmp_path / "many") == MANY
    assert many_kib < few_kib + (64 << 10)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_shard_being_written_and_says_how_to_continue(
    number: signal.Signals, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--num", 24, "--shard-size", 4, "--format", "npz")
    write = GeneratedFolder.write

    def write_and_stop(self: GeneratedFolder, images: range, pixels: np.ndarray) -> None:
        if images.start == 0:
            os.kill(os.getpid(), number)
        write(self, images, pixels)

    monkeypatch.setattr("sys.argv", ["iddpm", "generate", "my model"])
    with monkeypatch.context() as patch:
        patch.setattr(GeneratedFolder, "write", write_and_stop)
        code, output = generate(model, tmp_path / "out", *options)
    assert code == 128 + number
    assert "stopped; to continue: iddpm generate 'my model'" in output
    written = sorted(path.name for path in (tmp_path / "out" / "shards").iterdir())
    assert written[0] == "000000.npz"
    assert len(written) < 6
    assert all(name.endswith(".npz") and not name.startswith(".") for name in written)
    assert generate(model, tmp_path / "out", *options)[0] == 0
    assert len(samples(tmp_path / "out")[0]) == 24


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "give either --num or --per-class"),
    (["--num", 1, "--per-class", 1], "give either --num or --per-class"),
    (["--num", 1, "--class", "Dog"], 'class: must be one of Ape, Bee, Cat, T-shirt/top; got "Dog"'),
    (["--num", 1, "--class", "Bee", "--class", "1"], "--class: each class can be given once; got Bee, 1"),
    (["--num", 1, "--steps", 1001], "steps: must be 2..1000"),
    (["--num", 2, "--image-index", 2**32 - 1], "--image-index must be at most 4294967294 with 2 images"),
    (["--num", 1, "--eta", 0.5], "eta: is valid only with sampler"),
])  # fmt: skip
def test_wrong_options_are_refused_before_anything_is_written(
    arguments: list[str | float], message: str, model: Path, tmp_path: Path
) -> None:
    code, output = generate(model, tmp_path / "out", *arguments)
    assert (code, message in output) == (1, True), output
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_or_of_other_images_is_refused(model: Path, tmp_path: Path) -> None:
    assert generate(model, tmp_path, "--num", 4)[0] == 0
    code, output = generate(model, tmp_path, "--num", 5, "--seed", 1)
    assert code == 1
    assert "(seed was 0, is 1; count was 4, is 5): use another --out" in output
    with folder_lock(tmp_path):
        code, output = generate(model, tmp_path, "--num", 4)
    assert code == 1
    assert "in use by another process" in output


def test_a_model_without_classes_has_no_labels(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", num_classes=None, null_class=False)
    assert generate(model, tmp_path / "out", "--num", 3, "--format", "npz")[0] == 0
    with np.load(tmp_path / "out" / "samples.npz", allow_pickle=False) as arrays:
        assert arrays.files == ["arr_0"]
    code, output = generate(model, tmp_path / "other", "--per-class", 1)
    assert (code, "--per-class needs a model with classes; use --num" in output) == (1, True)


@pytest.mark.parametrize(("extra", "form"), [("tqdm", "png"), ("pyarrow", "parquet")])
def test_a_missing_package_is_named_with_its_extra(
    extra: str, form: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, extra, None)
    code, output = generate(model, tmp_path / "out", "--num", 1, "--format", form)
    assert (code, f"{extra} is not installed; this needs: pip install" in output) == (1, True)
    assert ".[generate]" in output


def test_the_engine_is_full_across_groups_and_reads_few_ahead(model: Path) -> None:
    engine = LocalEngine(local_settings(model))
    read, rows, done = [0], list[int](), list[int]()

    def groups() -> Iterator[list[GenerationRequest]]:
        for first in range(0, 24, 3):
            read[0] += 3
            yield [engine.complete({"n": 3, "seed": 1, "image_index": first, "steps": 5, "cfg_scale": 1})]

    def progress(computed: int) -> None:
        rows.append(computed)
        assert read[0] - 3 * len(done) <= (AHEAD + 1) * MAX_ROWS

    for number, pixels in engine.run(groups(), progress):
        done.append(number)
        assert len(pixels) == 3
    assert sorted(done) == list(range(8))
    assert sum(rows) == 24 * 5
    assert all(computed % MAX_ROWS == 0 for computed in rows)
