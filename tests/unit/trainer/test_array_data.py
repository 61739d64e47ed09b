"""npz files of images: what is accepted, what is refused with a working remedy, and the summary."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trainer.data import (
    DataConfig,
    DataError,
    Dataset,
    arrays,
    eight_bit_images,
    network_input,
    open_dataset,
    stored_array,
)
from trainer.data.fitting import fit_array


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


# --- values


def test_values_of_a_range_become_minus_one_to_one(tmp_path: Path) -> None:
    array = np.random.default_rng(0).uniform(-3, 5, (4, 8, 8, 2)).astype(np.float32)
    array[0, 0, 0] = (-3, 5)
    path = saved(tmp_path / "a.npz", images=array, labels=[0, 1, 0, 1])
    data = open_dataset(path, 8, 2, DataConfig(value_range=(-3, 5)))
    pixels = data.images(np.array([2, 0]))
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, (array[[2, 0]].astype(np.float64) + 3) / 4 - 1, rtol=0, atol=1e-7)
    assert pixels[1, 0, 0].tolist() == [-1, 1]
    assert "float32 values in -3..5, of which -3..5 is scaled to -1..1 (data.value_range)" in data.summary


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", ">i2", "uint16", "int64", "float16", ">f4", "float64"])
def test_numbers_of_every_type_are_read_with_a_range(tmp_path: Path, dtype: str) -> None:
    array = np.random.default_rng(0).integers(0, 2, (3, 8, 8)).astype(dtype)
    data = open_dataset(saved(tmp_path / "a.npz", images=array, labels=[0, 1, 0]), 8, 1, DataConfig(value_range=(0, 1)))
    assert np.array_equal(data.images(np.arange(3))[..., 0], array.astype(np.float32) * 2 - 1)


@pytest.mark.parametrize("small_images", ["frame", "enlarge"])
@pytest.mark.parametrize("shape", [(8, 8), (6, 7), (20, 23)])
def test_floats_are_fitted_as_bytes_are(tmp_path: Path, shape: tuple[int, int], small_images: Any) -> None:
    """Up to the rounding of bytes, which Pillow does after each direction of each of at most two scalings.

    The values are far from 0 and 255, where bytes are also clipped after each direction.
    """
    array = images(2, *shape, 3) // 2 + 64
    options = DataConfig(small_images=small_images, value_range=(0, 255))
    data = open_dataset(saved(tmp_path / "a.npz", images=array.astype(np.float32), labels=[0, 0]), 8, 3, options)
    pixels = data.images(np.arange(2))
    assert np.abs(pixels).max() <= 1
    expected = np.stack([fit_array(image, 8, small_images) for image in array])
    tolerance = 2.5 if shape != (8, 8) else 1e-4
    assert np.abs((pixels + 1) * 127.5 - expected).max() <= tolerance


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_by_index(tmp_path: Path, bad: float) -> None:
    array = np.zeros((30, 8, 8), np.float32)
    array[17, 3, 3] = bad
    options = DataConfig(value_range=(0, 1), outside_range="clip")
    path = saved(tmp_path / "a.npz", images=array, labels=[0] * 30)
    with pytest.raises(DataError, match="the image at index 17 contains NaN or infinity"):
        open_dataset(path, 8, 1, options)
    array[:, 0, 0] = bad
    with pytest.raises(DataError, match=r"30 images \(indices 0, 1, 2, .* and 20 more\) contain NaN"):
        open_dataset(saved(path, images=array, labels=[0] * 30), 8, 1, options)


def test_values_outside_the_range_are_counted_and_refused_or_clipped(tmp_path: Path) -> None:
    array = np.full((5, 8, 8), 0.5, np.float32)
    array[3, 0, :3], array[4, 0, 0] = 1.25, -2
    path = saved(tmp_path / "a.npz", images=array, labels=[0] * 5)
    reason = (
        r"2 images \(indices 3, 4\) contain values outside data.value_range 0..1: 4 values, all values are in "
        r"-2..1.25; widen the range, or clip with --set data.outside_range=clip"
    )
    with pytest.raises(DataError, match=reason):
        open_dataset(path, 8, 1, DataConfig(value_range=(0, 1)))
    data = open_dataset(path, 8, 1, DataConfig(value_range=(0, 1), outside_range="clip"))
    assert "4 values outside are clipped (data.outside_range)" in data.summary
    assert data.images(np.array([3, 4]))[:, 0, :4, 0].tolist() == [[1, 1, 1, 0], [-1, 0, 0, 0]]
    assert "clipped" not in open_dataset(path, 8, 1, DataConfig(value_range=(-2, 2))).summary


def test_each_channel_may_have_a_range_of_its_own(tmp_path: Path) -> None:
    array = np.zeros((3, 8, 8, 2), np.float32)
    array[1], array[2] = (1, 10), (0.5, 60)
    path = saved(tmp_path / "a.npz", images=array, labels=[0, 1, 0])
    ranges = ((0.0, 1.0), (-40.0, 60.0))
    data = open_dataset(path, 8, 2, DataConfig(value_range=ranges))
    assert data.images(np.arange(3))[:, 3, 3].tolist() == [[-1, pytest.approx(-0.2)], [1, 0], [0, 1]]
    assert "float32 values in 0..60, of which 0..1, -40..60 is scaled to -1..1 (data.value_range)" in data.summary
    with pytest.raises(
        DataError, match=r"2 images \(indices 1, 2\) contain values outside .*0\.\.1, 0\.\.5: 128 values"
    ):
        open_dataset(path, 8, 2, DataConfig(value_range=((0, 1), (0, 5))))
    put = tmp_path / "folder" / "c" / "0.png"
    put.parent.mkdir(parents=True)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(put)
    with pytest.raises(DataError, match=r"data.value_range must be one range, \[low, high\], for image files"):
        open_dataset(tmp_path / "folder", 8, 3, DataConfig(value_range=((0, 1),) * 3))


def test_bytes_and_floats_become_the_same_input_of_the_network(tmp_path: Path) -> None:
    array = images(3, 8, 8, 3)
    path = saved(tmp_path / "a.npz", images=array, labels=[0, 0, 0])
    as_bytes = network_input(open_dataset(path, 8, 3).images(np.arange(3)))
    as_floats = network_input(open_dataset(path, 8, 3, DataConfig(value_range=(0, 255))).images(np.arange(3)))
    assert as_bytes.shape == (3, 3, 8, 8)
    np.testing.assert_allclose(as_floats, as_bytes, rtol=0, atol=1.2e-7)  # a rounding of float32 near 1
    with pytest.raises(DataError, match="images of 8 bits are needed; the data set has float32"):
        eight_bit_images(open_dataset(path, 8, 3, DataConfig(value_range=(0, 255))), np.arange(3))


def test_bytes_of_zero_and_one_are_pointed_out(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npz", images=np.eye(8, dtype=np.uint8)[None], labels=[0])
    assert "no value is above 1, which is nearly black: --set data.value_range=0,1 makes 1 white" in (
        open_dataset(path, 8, 1).summary
    )
    cured = open_dataset(path, 8, 1, DataConfig(value_range=(0, 1)))
    assert np.array_equal(cured.images(np.array([0]))[0, ..., 0], np.eye(8) * 2 - 1)
    assert "nearly black" not in cured.summary


# --- files larger than the memory


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Handle every array as one that does not fit into memory, in parts of two images."""
    monkeypatch.setattr(stored_array, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(arrays, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(stored_array, "PART_BYTES", 2 * 8 * 8 * 3)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_large_arrays_are_read_in_parts(tmp_path: Path, write: Any) -> None:
    array, path = images(5, 8, 8, 3), tmp_path / "a.npz"
    write(path, labels=np.array([0, 1, 0, 1, 0]), images=array)
    data = open_dataset(path, 8, 3, cache=tmp_path / "cache")
    assert np.array_equal(data.images(np.array([4, 0, 0])), array[[4, 0, 0]])
    unpacked = [file for file in (tmp_path / "cache").iterdir() if file.suffix == ".npy"]
    assert len(unpacked) == (write is np.savez_compressed)
    for file in unpacked:
        assert f"images unpacked into {file}" in data.summary
        before = file.stat()
        again = open_dataset(path, 8, 3, cache=tmp_path / "cache")
        assert file.stat() == before
        assert (again.description, again.summary) == (data.description, data.summary)
    in_memory = open_dataset(path, 8, 3, cache=tmp_path / "cache")
    assert in_memory.description == data.description


@pytest.mark.usefixtures("large")
def test_values_of_a_large_file_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.npz", images=images(5, 8, 8), labels=[0] * 5)
    first = open_dataset(path, 8, 1, cache=tmp_path / "cache")
    monkeypatch.setattr(arrays, "parts_of", None)
    again = open_dataset(path, 8, 1, cache=tmp_path / "cache")
    assert (again.description, again.summary) == (first.description, first.summary)
    for record in (tmp_path / "cache").glob("*.json"):
        assert json.loads(record.read_bytes())
        record.write_bytes(b"{")
    monkeypatch.undo()
    assert open_dataset(path, 8, 1, cache=tmp_path / "cache").description == first.description


@pytest.mark.usefixtures("large")
def test_a_changed_large_file_is_read_again(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npz", images=images(5, 8, 8), labels=[0] * 5)
    before = open_dataset(path, 8, 1, cache=tmp_path / "cache").description
    saved(path, images=255 - images(5, 8, 8), labels=[0] * 5)
    assert open_dataset(path, 8, 1, cache=tmp_path / "cache").description != before


@pytest.mark.usefixtures("large")
def test_a_damaged_large_array_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npz", images=np.full((5, 8, 8), 77, np.uint8), labels=[0] * 5)
    content = path.read_bytes()
    at = content.index(b"M" * 64)
    path.write_bytes(content[: at + 9] + b"X" + content[at + 10 :])
    with pytest.raises(DataError, match="is damaged: the checksum of its images is wrong"):
        open_dataset(path, 8, 1, cache=tmp_path / "cache")


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.asfortranarray(images(3, 8, 8)), "it is in Fortran order; save np.ascontiguousarray"),
        (np.array([["a"]], dtype=object), "arrays of Python objects"),
    ],
)
def test_large_arrays_that_cannot_be_read_in_parts_are_refused(tmp_path: Path, array: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        open_dataset(saved(tmp_path / "a.npz", images=array, labels=[0, 0, 0]), 8, 1, cache=tmp_path / "cache")


@pytest.mark.usefixtures("large")
def test_a_file_that_shrinks_during_training_is_an_error(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npz", labels=[0] * 50, images=images(50, 8, 8))
    data = open_dataset(path, 8, 1, cache=tmp_path / "cache")
    with path.open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(DataError, match="was shortened while it was in use"):
        data.images(np.array([49]))


@pytest.mark.usefixtures("large")
def test_a_cache_without_space_names_the_folder(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    np.savez_compressed(tmp_path / "a.npz", images=images(5, 8, 8), labels=[0] * 5)
    with pytest.raises(DataError, match=r"cache.*--cache sets the folder for unpacked arrays"):
        open_dataset(tmp_path / "a.npz", 8, 1, cache=tmp_path / "cache")


@pytest.mark.parametrize("in_memory", [True, False])
def test_one_array_is_read_without_classes(tmp_path: Path, in_memory: bool, request: pytest.FixtureRequest) -> None:
    if not in_memory:
        request.getfixturevalue("large")
    array = images(5, 8, 8, 3)
    np.save(tmp_path / "a.npy", array)
    data = open_dataset(tmp_path / "a.npy", 8, 3, labelled=False, cache=tmp_path / "cache")
    assert np.array_equal(data.images(np.array([3, 1])), array[[3, 1]])
    assert data.summary == "data: 5 images 8x8; no classes"
    with pytest.raises(DataError, match=r"npz file is needed, with labels \(or --set class_conditional=false\)"):
        open_dataset(tmp_path / "a.npy", 8, 3)
    (tmp_path / "b.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-9])
    with pytest.raises(DataError, match=r"b\.npy cannot be read as an npy file"):
        open_dataset(tmp_path / "b.npy", 8, 3, labelled=False, cache=tmp_path / "cache")


@pytest.mark.usefixtures("large")
def test_members_with_extra_fields_are_found(tmp_path: Path) -> None:
    """As zip programs write them."""
    array = images(5, 8, 8)
    saved(tmp_path / "a.npz", images=array, labels=[0] * 5)
    with zipfile.ZipFile(tmp_path / "a.npz") as source, zipfile.ZipFile(tmp_path / "b.npz", "w") as target:
        for member in source.infolist():
            copy = zipfile.ZipInfo(member.filename)
            copy.extra = b"\x55\x54\x05\x00\x03abcd"
            target.writestr(copy, source.read(member))
    data = open_dataset(tmp_path / "b.npz", 8, 1, cache=tmp_path / "cache")
    assert np.array_equal(data.images(np.arange(5))[..., 0], array)
