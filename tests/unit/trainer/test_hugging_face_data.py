"""Data sets that the library `datasets` saved to disk."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.unit.trainer.test_unreadable_images import damage
from trainer.data import DataConfig, DataError, Dataset, Uint8Array, checking, open_dataset

datasets = pytest.importorskip("datasets")

GREYS = [10, 20, 30, 40]


def png(grey: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8), grey).save(file, "PNG")
    return file.getvalue()


def damaged_png(folder: Path) -> bytes:
    """Return a PNG of 64x64 with a good header, whose pixels are damaged."""
    damage(folder / "damaged.png")
    return (folder / "damaged.png").read_bytes()


def whole_png() -> bytes:
    """Return a PNG of the size of `damaged_png`."""
    file = io.BytesIO()
    Image.new("L", (64, 64)).save(file, "PNG")
    return file.getvalue()


def saved(path: Path, labels: Any = (1, 0, 1, 0), kind: Any = None, contents: Any = None, **columns: Any) -> Path:
    """Save a data set with four images; labels are named cat and dog unless another feature is given."""
    contents = [png(grey) for grey in GREYS] if contents is None else contents
    encoded = [{"bytes": content, "path": None} for content in contents]
    values = {"image": encoded, "label": list(labels), **{name: column for name, (column, _) in columns.items()}}
    features = {
        "image": datasets.Image(),
        "label": kind or datasets.ClassLabel(names=["cat", "dog"]),
        **{name: feature for name, (_, feature) in columns.items()},
    }
    datasets.Dataset.from_dict(values, features=datasets.Features(features)).save_to_disk(path)
    return path


def levels(data: Dataset) -> list[int]:
    return data.images(np.arange(len(data.labels)))[:, 0, 0, 0].tolist()


@pytest.fixture(autouse=True)
def _no_progress_bars() -> None:
    datasets.disable_progress_bars()


def test_images_and_classes_are_found(tmp_path: Path) -> None:
    data = open_dataset(saved(tmp_path / "data"), 8, 1)
    assert (data.class_names, data.labels.tolist(), levels(data)) == (("cat", "dog"), [1, 0, 1, 0], GREYS)
    assert data.summary == (
        "data: 4 images 8x8; 2 classes: cat (2), dog (2); columns 'image' and 'label' of a Hugging Face data set"
    )
    data = open_dataset(tmp_path / "data", 8, 3, labelled=False)
    assert (data.class_names, data.labels.tolist()) == ((), [0] * 4)
    assert data.images(np.array([2])).shape == (1, 8, 8, 3)


def test_images_may_be_files_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(70))
    features = datasets.Features({"picture": datasets.Image()})
    rows = datasets.Dataset.from_dict({"picture": [str(tmp_path / "a.png")]}, features=features)
    rows.save_to_disk(tmp_path / "data")
    assert levels(open_dataset(tmp_path / "data", 8, 1, labelled=False)) == [70]


@pytest.mark.parametrize(
    ("kind", "labels", "names"),
    [("int64", [1, 0, 1, 2], ("0", "1", "2")), ("string", ["10", "9", "9", "9"], ("9", "10"))],
)
def test_labels_may_be_integers_or_texts(tmp_path: Path, kind: str, labels: list[Any], names: tuple[str, ...]) -> None:
    data = open_dataset(saved(tmp_path / "data", labels, datasets.Value(kind)), 8, 1)
    assert data.class_names == names
    assert [names[label] for label in data.labels] == [str(label) for label in labels]


def test_columns_are_chosen_by_name(tmp_path: Path) -> None:
    masks = [{"bytes": png(255 - grey), "path": None} for grey in GREYS]
    path = saved(
        tmp_path / "data",
        mask=(masks, datasets.Image()),
        place=([0, 0, 1, 1], datasets.ClassLabel(names=["in", "out"])),
        text=(list("abcd"), datasets.Value("string")),
    )
    with pytest.raises(DataError, match=r"2 columns contain images: choose one with --set data.image_column=NAME"):
        open_dataset(path, 8, 1)
    with pytest.raises(DataError, match=r"2 columns contain classes: .*label \(ClassLabel\), mask \(Image\)"):
        open_dataset(path, 8, 1, DataConfig(image_column="mask"))
    data = open_dataset(path, 8, 1, DataConfig(image_column="mask", label_column="place"))
    assert (data.class_names, data.labels.tolist()) == (("in", "out"), [0, 0, 1, 1])
    assert levels(data) == [255 - grey for grey in GREYS]
    with pytest.raises(
        DataError, match=r"data.image_column is 'text', which is no column of images; .*text \(string\)"
    ):
        open_dataset(path, 8, 1, DataConfig(image_column="text"))
    with pytest.raises(DataError, match=r"data.label_column is 'class', which is no column"):
        open_dataset(path, 8, 1, DataConfig(image_column="mask", label_column="class"))


def test_conditioning_images_are_a_column(tmp_path: Path) -> None:
    inverted = [{"bytes": png(255 - grey), "path": None} for grey in GREYS]
    path = saved(tmp_path / "data", edges=(inverted, datasets.Image()))
    data = open_dataset(path, 8, 1, DataConfig(image_column="image", cond_column="edges"), cond_channels=1)
    assert data.conditions is not None
    conds = data.conditions.images(np.arange(len(GREYS)))[:, 0, 0, 0]
    assert (levels(data), conds.tolist()) == (GREYS, [255 - grey for grey in GREYS])
    with pytest.raises(DataError, match=r"data\.cond_column is 'edge', which is no column of images"):
        open_dataset(path, 8, 1, DataConfig(image_column="image", cond_column="edge"), cond_channels=1)
    with pytest.raises(DataError, match=r"are a column of it: choose it with --set data\.cond_column=NAME"):
        open_dataset(path, 8, 1, DataConfig(image_column="image"), cond_channels=1)


def pairs(path: Path, contents: list[bytes], conds: list[bytes], unreadable: str = "skip") -> Dataset:
    """Open a data set of pairs: image k has the grey level GREYS[k], its condition 255 - GREYS[k]."""
    encoded = [{"bytes": content, "path": None} for content in conds]
    saved(path, labels=(0, 0, 1, 0), contents=contents, edges=(encoded, datasets.Image()))
    options = DataConfig.model_validate({"image_column": "image", "cond_column": "edges", "unreadable": unreadable})
    return open_dataset(path, 8, 1, options, cond_channels=1)


def levels_of_pairs(data: Dataset) -> tuple[list[int], list[int]]:
    assert data.conditions is not None
    images, conds = data.conditions.pairs(np.arange(len(data.labels)))
    return images[:, 0, 0, 0].tolist(), conds[:, 0, 0, 0].tolist()


def test_pairs_found_before_the_first_step_are_left_out_and_named_by_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, conds = [png(grey) for grey in GREYS], [png(255 - grey) for grey in GREYS]
    images[0] = conds[0] = conds[2] = b"junk"
    with pytest.raises(DataError, match=r"failing, row 0: it is damaged, .* data.unreadable=skip"):
        pairs(tmp_path / "failing", images, conds, "fail")
    data = pairs(tmp_path / "data", images, conds)
    assert (data.labels.tolist(), levels_of_pairs(data)) == ([0, 0], ([20, 40], [235, 215]))
    first, second = data.summary.splitlines()
    assert "; skipped: 1 unreadable, 1 with an unreadable conditioning image; " in first
    assert "; skipped: 2 unreadable; " in second
    error = capsys.readouterr().err
    assert "warning: 2 of 4 pairs are skipped, because one of their images cannot be read:" in error
    assert "data, row 0: it is damaged" in error
    assert f"(the conditioning image of {tmp_path / 'data'}, row 2)" in error


def test_pairs_found_later_are_replaced_as_pairs_of_their_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checking, "DECODED_FILES", 0)
    images, conds = [png(grey) for grey in GREYS], [png(255 - grey) for grey in GREYS]
    images[0], conds[1] = damaged_png(tmp_path), damaged_png(tmp_path)
    images[1] = conds[0] = whole_png()
    data = pairs(tmp_path / "data", images, conds)
    assert (data.labels.tolist(), levels_of_pairs(data)) == ([0, 0, 1, 0], ([40, 40, 30, 40], [215, 215, 225, 215]))
    error = capsys.readouterr().err
    assert "the pair of image row 0 and conditioning image row 0 is replaced by that of image row 3" in error
    assert "unreadable pairs found so far: 2" in error


@pytest.mark.parametrize(
    ("labels", "kind", "reason"),
    [
        ([0, 1, -1, 0], None, r"must lie in 0..1; got -1..1 \(-1 often means"),
        ([0, 1, None, 0], None, "1 of 4 rows have no value in the column 'label'"),
        ([0, 3, 3, 0], "int64", r"without gaps; 1, 2 have no image: .*class_encode_column\('label'\)"),
        ([0.0, 1.0, 0.5, 0.0], "float32", "must contain classes, integers or texts"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(tmp_path: Path, labels: list[Any], kind: Any, reason: str) -> None:
    path = saved(tmp_path / "data", labels, kind and datasets.Value(kind))
    with pytest.raises(DataError, match=reason):
        open_dataset(path, 8, 1)


def test_a_set_without_images_lists_its_columns(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a"], "number": [1]}).save_to_disk(tmp_path / "data")
    with pytest.raises(DataError, match=r"no column contains images .*text \(string\), number \(int64\)"):
        open_dataset(tmp_path / "data", 8, 1)


def test_splits_are_not_mixed(tmp_path: Path) -> None:
    one = datasets.load_from_disk(str(saved(tmp_path / "one")))
    datasets.DatasetDict({"test": one, "train": one}).save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match=r"splits of a data set, test, train; use one: --data .*both/train$"):
        open_dataset(tmp_path / "both", 8, 1)
    assert len(open_dataset(tmp_path / "both" / "train", 8, 1).labels) == 4


def test_unreadable_images_are_named_by_row(tmp_path: Path) -> None:
    path = saved(tmp_path / "data", contents=[png(10), b"junk", png(30), png(40)])
    with pytest.raises(DataError, match=r"data, row 1: it is damaged, .* data.unreadable=skip"):
        open_dataset(path, 8, 1)
    data = open_dataset(path, 8, 1, DataConfig(unreadable="skip"))
    assert (data.labels.tolist(), levels(data)) == ([1, 1, 0], [10, 30, 40])
    assert "skipped: 1 unreadable" in data.summary


def test_the_description_is_of_the_content(tmp_path: Path) -> None:
    first = open_dataset(saved(tmp_path / "a" / "data"), 8, 1).description
    assert open_dataset(saved(tmp_path / "b" / "data"), 8, 1).description == first
    other = open_dataset(saved(tmp_path / "c" / "data", contents=[png(grey + 1) for grey in GREYS]), 8, 1)
    assert other.description["content_sha256"] != first["content_sha256"]
    relabelled = open_dataset(saved(tmp_path / "d" / "data", labels=[1, 1, 1, 0]), 8, 1)
    assert relabelled.description["labels_sha256"] != first["labels_sha256"]


def test_a_damaged_set_and_a_missing_library_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "data")
    (path / "state.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read as a Hugging Face data set"):
        open_dataset(path, 8, 1)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs the package datasets: pip install .*'\.\[hf\]'"):
        open_dataset(path, 8, 1)


def test_images_are_decoded_as_files_are(tmp_path: Path) -> None:
    array: Uint8Array = np.random.default_rng(0).integers(0, 256, (30, 23, 3), dtype=np.uint8)
    (tmp_path / "files" / "c").mkdir(parents=True)
    Image.fromarray(array).save(tmp_path / "files" / "c" / "0.png")
    content = (tmp_path / "files" / "c" / "0.png").read_bytes()
    data = open_dataset(saved(tmp_path / "data", contents=[content] * 4), 8, 3)
    files = open_dataset(tmp_path / "files", 8, 3)
    assert np.array_equal(data.images(np.array([3])), files.images(np.array([0])))
