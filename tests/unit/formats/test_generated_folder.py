"""Folders of generated images: continued after any interruption, and read by the programs they are made for."""

from __future__ import annotations

import gc
import io
import json
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from formats.folder_lock import FolderInUse
from formats.generated_folder import GenerationError, generated_folder, read_generation
from formats.generation import GenerationFormat
from formats.shards import FORMATS, class_folders
from tests.generations import CLASS_NAMES, CLASSES, COUNT, FIRST, LABELS, PIXELS, generation, write
from tests.waiting import PATIENCE_S
from trainer.data import open_dataset
from trainer.data.options import DataConfig


def complete(out: Path, form: GenerationFormat, **changes: object) -> Path:
    with generated_folder(out, generation(form, **changes)) as folder:
        write(folder, folder.missing())
        folder.finish()
    return out


def content(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.mark.parametrize("form", FORMATS)
def test_a_continued_folder_equals_an_uninterrupted_one(form: GenerationFormat, tmp_path: Path) -> None:
    with generated_folder(tmp_path / "out", generation(form)) as folder:
        assert folder.missing() == [range(4), range(4, 8), range(8, 11)]
        write(folder, [range(4, 8)])
    assert not read_generation(tmp_path / "out").complete
    with generated_folder(tmp_path / "out", generation(form)) as folder:
        assert folder.missing() == [range(4), range(8, 11)]
        write(folder, folder.missing())
        assert folder.missing() == []
        folder.finish()
    assert read_generation(tmp_path / "out") == generation(form, complete=True)
    assert content(tmp_path / "out") == content(complete(tmp_path / "whole", form))
    with generated_folder(tmp_path / "out", generation(form)) as folder:
        assert folder.missing() == []


KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
import {module} as module
from formats.generated_folder import generated_folder
from tests.generations import generation, write

def killed(*arguments):
    global calls
    calls += 1
    if calls > {calls}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)

with generated_folder(Path(sys.argv[1]), generation({form!r})) as folder:
    write(folder, [range(4)])
    original, calls = module.{function}, 0
    module.{function} = killed
    write(folder, [range(4, 8)])
"""


@pytest.mark.parametrize(("form", "module", "function", "calls"), [
    ("png", "formats.atomic_folder", "_rename_into_place", 0),
    ("png", "pathlib", "Path.replace", 2),
    ("webdataset", "os", "fsync", 0),
    ("npz", "pathlib", "Path.replace", 0),
])  # fmt: skip
def test_a_writer_killed_at_any_moment_leaves_whole_shards_only(
    form: GenerationFormat, module: str, function: str, calls: int, tmp_path: Path
) -> None:
    code = KILLED_WRITER.format(form=form, module=module, function=function, calls=calls)
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "out"], check=False, timeout=PATIENCE_S)
    assert run.returncode == -signal.SIGKILL
    with generated_folder(tmp_path / "out", generation(form)) as folder:
        assert folder.missing() == [range(4, 8), range(8, 11)]
        write(folder, folder.missing())
        folder.finish()
    assert content(tmp_path / "out") == content(complete(tmp_path / "whole", form))


def read_npz(out: Path) -> tuple[npt.NDArray[np.uint8], list[int]]:
    with np.load(out / "samples.npz", allow_pickle=False) as arrays:
        return arrays["arr_0"], arrays["arr_1"].tolist()


def read_parquet(out: Path) -> tuple[npt.NDArray[np.uint8], list[int]]:
    table = pq.read_table(sorted(out.glob("*.parquet")))
    assert table.column("seed").to_pylist() == [7] * COUNT
    assert table.column("image_index").to_pylist() == list(range(FIRST, FIRST + COUNT))
    pictures = [np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in table.column("image").to_pylist()]
    return np.stack(pictures), table.column("label").to_pylist()


def read_datasets(out: Path) -> tuple[npt.NDArray[np.uint8], list[int]]:
    files = [str(path) for path in sorted(out.glob("*.parquet"))]
    found = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(out / "cache"))
    assert found.features["label"].names == list(CLASS_NAMES)
    return np.stack([np.asarray(picture) for picture in found["image"]]), list(found["label"])


def read_webdataset(out: Path) -> tuple[npt.NDArray[np.uint8], list[int]]:
    shards = [str(path) for path in sorted(out.glob("*.tar"))]
    rows = list(webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8").to_tuple("png", "cls", "json"))
    for k, (_, label, facts) in enumerate(rows):
        assert facts == {"seed": 7, "image_index": FIRST + k, "class": CLASS_NAMES[label], "class_index": label}
    gc.collect()  # closes the files
    return np.stack([pixels for pixels, _, _ in rows]), [label for _, label, _ in rows]


def read_png(out: Path) -> tuple[npt.NDArray[np.uint8], list[int]]:
    names = ["Bee", "T-shirt%2Ftop"]
    data = open_dataset(out / "images", 8, 3, DataConfig(), labelled=True, cache=out / "cache")
    assert data.class_names == tuple(names)
    assert sorted(path.stem for path in (out / "images").rglob("*.png")) == sorted(f"7_{5 + k}" for k in range(COUNT))
    paths = [out / "images" / names[CLASSES.index(label)] / f"7_{FIRST + k}.png" for k, label in enumerate(LABELS)]
    return np.stack([np.asarray(Image.open(path)) for path in paths]), LABELS


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves files open
@pytest.mark.parametrize(("form", "read"), [
    ("npz", read_npz), ("parquet", read_parquet), ("parquet", read_datasets), ("webdataset", read_webdataset),
    ("png", read_png),
])  # fmt: skip
def test_other_programs_read_the_images_and_their_classes(
    form: GenerationFormat, read: Callable[[Path], tuple[npt.NDArray[np.uint8], list[int]]], tmp_path: Path
) -> None:
    pixels, labels = read(complete(tmp_path / "out", form))
    assert np.array_equal(pixels, PIXELS)
    assert labels == LABELS


@pytest.mark.parametrize("form", FORMATS)
def test_images_may_have_no_classes(form: GenerationFormat, tmp_path: Path) -> None:
    out = complete(tmp_path / "out", form, classes=None, class_names=())
    if form == "npz":
        with np.load(out / "samples.npz", allow_pickle=False) as arrays:
            assert arrays.files == ["arr_0"]
    elif form == "parquet":
        assert pq.read_table(out / "000000.parquet").column_names == ["image", "seed", "image_index"]
    elif form == "webdataset":
        with tarfile.open(out / "000000.tar") as archive:
            assert archive.getnames()[:3] == ["7_5.png", "7_5.json", "7_6.png"]
    else:
        assert len(list((out / "images").glob("*.png"))) == COUNT


def test_other_images_are_refused_with_the_difference(tmp_path: Path) -> None:
    out = complete(tmp_path / "out", "npz")
    before = content(out)
    other = generation(seed=8, sampling={**generation().sampling.model_dump(), "cfg_scale": 2}, iddpm="0.2.0")
    message = r"sampling\.cfg_scale was 1\.0, is 2\.0; seed was 7, is 8\): use another --out"
    with pytest.raises(GenerationError, match=message), generated_folder(out, other):
        pass
    with generated_folder(out, generation(iddpm="0.2.0", model="renamed")) as folder:
        assert folder.generation.model == "tiny"
    assert content(out) == before


@pytest.mark.parametrize(("then", "now"), [(1.2999999523162842, 1.3), (1.3, 1.2999999523162842)])
def test_a_folder_is_continued_with_the_same_guidance_scale_in_float32(then: float, now: float, tmp_path: Path) -> None:
    sampling = generation().sampling
    begun, continued = (generation(sampling=sampling.replace(cfg_scale=scale)) for scale in (then, now))
    with generated_folder(tmp_path / "out", begun):
        pass
    with generated_folder(tmp_path / "out", continued) as folder:
        assert folder.generation == begun


def test_other_files_are_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(GenerationError, match="must be a folder"), generated_folder(tmp_path / "file", generation()):
        pass
    with pytest.raises(GenerationError, match=r"other files \(file\)"), generated_folder(tmp_path, generation()):
        pass
    (tmp_path / "manifest.json").write_text(json.dumps({"format_version": 1, "files": {}}))
    with pytest.raises(GenerationError, match=r"manifest\.json: "), generated_folder(tmp_path, generation()):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"file", "manifest.json", ".lock"}


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with (
        generated_folder(tmp_path / "out", generation()),
        pytest.raises(FolderInUse, match=r"in use by another process \(process \d+ on .*use another --out"),
        generated_folder(tmp_path / "out", generation()),
    ):
        pass


def test_images_that_are_no_pictures_need_npz(tmp_path: Path) -> None:
    for form in ("png", "webdataset", "parquet"):
        with (
            pytest.raises(GenerationError, match=r"1, 3 or 4 channels, and this model's have 2: use --format npz"),
            generated_folder(tmp_path / "out", generation(form, image_shape=(8, 8, 2))),
        ):
            pass
    assert not (tmp_path / "out").exists()


def test_every_class_has_a_folder_of_its_own() -> None:
    assert class_folders(["a b", "..", "x/y", "x%2Fy", "tab\t"]) == ["a b", "%2E.", "x%2Fy", "x%252Fy", "tab%09"]
    assert class_folders(["crane", *"abcdefghi", "crane"])[::10] == ["00-crane", "10-crane"]
    with pytest.raises(ValueError, match="too long for a folder"):
        class_folders(["ü" * 128])
