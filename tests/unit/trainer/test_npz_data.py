"""npz files of images: what is accepted, what is refused with a working remedy, and the summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.data import DataConfig, DataError, Dataset, open_dataset


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def images(*shape: int, dtype: Any = np.uint8) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, shape).astype(dtype)


def opened(tmp_path: Path, *, channels: int = 1, labelled: bool = True, **arrays: Any) -> Dataset:
    return open_dataset(saved(tmp_path / "a.npz", **arrays), 8, channels, labelled=labelled)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 40])
def test_any_number_of_channels_is_read(tmp_path: Path, channels: int) -> None:
    array = images(3, 8, 8, channels)
    data = opened(tmp_path, channels=channels, images=array, labels=[0, 1, 0])
    assert np.array_equal(data.images(np.array([2, 0])), array[[2, 0]])


def test_small_images_are_framed_or_enlarged(tmp_path: Path) -> None:
    array = images(2, 6, 6)
    path = saved(tmp_path / "a.npz", images=array, labels=[0, 0])
    framed = open_dataset(path, 8, 1)
    expected = np.pad(array[..., None], ((0, 0), (1, 1), (1, 1), (0, 0)))
    assert np.array_equal(framed.images(np.arange(2)), expected)
    assert (
        framed.summary
        == "data: 2 images 6x6; 1 class: 0 (2); 2 smaller than the model's 8x8, framed in black (data.small_images)"
    )
    enlarged = open_dataset(path, 8, 1, DataConfig(small_images="enlarge"))
    assert enlarged.images(np.arange(2))[:, 0].any(axis=1).all()  # no border
    assert "2 smaller than the model's 8x8, enlarged (data.small_images)" in enlarged.summary


@pytest.mark.parametrize(
    ("shape", "channels"),
    [((2, 3, 28, 28), 1), ((2, 3, 28, 28), 3), ((2, 3, 28, 28), 28), ((2, 1, 28, 28), 1), ((2, 3, 28, 40), 1),
     ((2, 6, 28, 28), 6), ((2, 3, 4, 4), 3)],
)  # fmt: skip
def test_channels_first_is_refused_with_a_transposition(tmp_path: Path, shape: tuple[int, ...], channels: int) -> None:
    array = images(*shape)
    with pytest.raises(DataError, match=r"channels first; .*transpose with images.transpose\(0, 2, 3, 1\)"):
        opened(tmp_path, channels=channels, images=array, labels=[0, 1])
    cured = array.transpose(0, 2, 3, 1)
    assert len(opened(tmp_path, channels=shape[1], images=cured, labels=[0, 1]).labels) == 2


def test_the_error_for_another_number_of_channels_names_the_field(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has 5 channels, .*choose --set model.image_channels=5"):
        opened(tmp_path, images=images(2, 8, 8, 5), labels=[0, 1])
    assert len(opened(tmp_path, channels=5, images=images(2, 8, 8, 5), labels=[0, 1]).labels) == 2
    assert len(opened(tmp_path, channels=9, images=images(2, 4, 8, 9), labels=[0, 1]).labels) == 2


@pytest.mark.parametrize(
    "array",
    [
        np.array([[[0, 1], [1, 0]]], bool),
        np.array([[[0, 65535], [257, 0]]], np.uint16),
        np.array([[[0, 255], [7, 0]]], np.int64),
        np.array([[[0, 4095], [-7, 0]]], np.int16),
        np.array([[[0, 1], [0.5, 0]]], np.float32),
        np.array([[[-1, 1], [0, 0]]], np.float64),
        np.array([[[-5, 70], [0, 0]]], np.float32),
    ],
    ids=lambda array: f"{array.dtype}..{array.max()}",
)
def test_other_types_are_refused_with_a_working_remedy(tmp_path: Path, array: np.ndarray[Any, Any]) -> None:
    with pytest.raises(DataError, match=r"images must be uint8 in 0\.\.255; got ") as caught:
        opened(tmp_path, images=array, labels=[0])
    cure = str(caught.value).partition("with ")[2]
    cured = eval(cure, {"images": array})  # noqa: S307  # the remedy is our own text
    assert (cured.dtype, cured.max(), cured.min()) == (np.uint8, 255, 0)
    opened(tmp_path, images=cured, labels=[0])


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ([1, 2, 3], "must count from 0 without gaps; got 3 different ones in 1..3"),
        ([20230101, 20230102, 20230101], "got 2 different ones in 20230101..20230102"),
        ([0, 2, 0], "got 2 different ones in 0..2"),
        ([-1, 0, 1], r"got 3 different ones in -1..1"),
    ],
)
def test_labels_without_an_image_are_refused(tmp_path: Path, labels: list[int], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        opened(tmp_path, images=images(3, 8, 8), labels=labels)
    classes, cured = np.unique(labels, return_inverse=True)  # as the message advises
    data = opened(tmp_path, images=images(3, 8, 8), labels=cured, classes=classes)
    assert data.class_names == tuple(str(label) for label in sorted(set(labels)))


def test_named_classes_without_an_image_are_counted(tmp_path: Path) -> None:
    data = opened(tmp_path, images=images(3, 8, 8), labels=[0, 2, 0], classes=["a", "b", "c", "d"])
    assert "4 classes: a (2), b (0), c (1), d (0) (2 without an image: 'b', 'd')" in data.summary


@pytest.mark.parametrize("classes", [np.array([b"cat", "Hündin".encode()]), np.array(["cat", "Hündin"])])
def test_class_names_may_be_bytes_or_text(tmp_path: Path, classes: np.ndarray[Any, Any]) -> None:
    assert opened(tmp_path, images=images(2, 8, 8), labels=[0, 1], classes=classes).class_names == ("cat", "Hündin")


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"labels": [1, 2], "classes": ["a", "b"]}, r"must lie in 0..1, .* got 1..2: subtract 1 from each"),
        ({"labels": [0, 5], "classes": ["a", "b"]}, r"must lie in 0..1, .* got 0..5$"),
        ({"labels": [0, 1], "classes": ["a", "a"]}, "must be different names; repeated: 'a'"),
        ({"labels": [0, 1], "classes": [b"\xff", b"a"]}, "must be names in UTF-8"),
        ({"labels": [0, 1], "classes": [["a", "b"]]}, "must be a list of names"),
        ({"labels": [0.0, 1.0]}, r"must be 2 integers; .*labels.astype\('int64'\)"),
        ({"labels": [0.5, 1.0]}, r"must be 2 integers; got float64 \(2,\) that are not whole numbers$"),
        ({"labels": [0.0, np.nan]}, "that are not whole numbers$"),
        ({"labels": [False, True]}, r"got bool \(2,\): convert with labels.astype\('int64'\)"),
        ({"labels": [[1.0, 0.0], [0.0, 1.0]]}, r"one-hot: convert with labels.argmax\(axis=1\)"),
        ({"labels": [[1, 0, 1], [0, 1, 0]]}, r"must be 2 integers; got int64 \(2, 3\)$"),
        ({"images": np.full((2, 8, 8), np.nan), "labels": [0, 1]}, "values that are not finite numbers$"),
        ({"images": np.ones((2, 8, 8), np.int64), "labels": [0, 1]}, r"in 0..1: .*astype\('uint8'\) \* 255$"),
        ({"labels": ["cat", "dog"]}, "classes, labels = np.unique"),
        ({"labels": [0, 1, 2]}, "must be 2 integers"),
        ({}, r"missing: \['labels'\]; it contains: images; .*--set class_conditional=false"),
        ({"images": np.zeros((0, 8, 8), np.uint8), "labels": []}, "none of them 0"),
        ({"images": np.zeros((2, 8), np.uint8), "labels": [0, 1]}, r"uint8 \[N, H, W, C\]"),
    ],
)
def test_unusable_arrays_are_refused(tmp_path: Path, arrays: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        opened(tmp_path, **{"images": images(2, 8, 8), **arrays})


def test_labels_in_a_column_are_read(tmp_path: Path) -> None:
    assert opened(tmp_path, images=images(2, 8, 8), labels=[[0], [1]]).labels.tolist() == [0, 1]


def test_without_classes_no_labels_are_needed(tmp_path: Path) -> None:
    data = opened(tmp_path, labelled=False, images=images(2, 8, 8))
    assert (data.labels.tolist(), data.class_names) == ([0, 0], ())
    assert data.summary == "data: 2 images 8x8; no classes"
    assert len(opened(tmp_path, labelled=False, images=images(2, 8, 8), labels=[20230101, 7]).labels) == 2


def test_arrays_of_other_names_are_listed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing: \['images', 'labels'\]; it contains: train_images, train_labels"):
        opened(tmp_path, train_images=images(2, 8, 8), train_labels=[0, 1])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html></html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0f3e\nsize 12345\n", "is a Git LFS pointer"),
        (bytes(range(256)) * 4, "is damaged, or not an npz file: write one with np.savez"),
    ],
)
def test_the_error_for_another_file_describes_it(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "data.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason):
        open_dataset(path, 8, 1)


def test_arrays_of_objects_are_refused_without_advice_to_unpickle(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"which are not read; save numbers, or names as strings$"):
        opened(tmp_path, images=images(2, 8, 8), labels=[0, 1], classes=np.array(["a", "b"], dtype=object))
