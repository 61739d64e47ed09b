"""Folders of images: the files that belong to the data set, the checks, and the summary."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.data import DataConfig, DataError, Dataset, checking, open_dataset
from trainer.data.image_file import inspect


def put(path: Path, grey: int = 90, size: tuple[int, int] = (8, 8), mode: str = "L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, grey).convert(mode).save(path)
    return path


def opened(path: Path, channels: int = 1, *, labelled: bool = True, decode_all: bool = False) -> Dataset:
    return open_dataset(path, 8, channels, labelled=labelled, decode_all=decode_all)


def test_hidden_and_system_names_are_skipped(tmp_path: Path) -> None:
    for name in ("cat/0.png", "dog/0.png", "dog/.hidden.png", "dog/._0.png", "__MACOSX/cat/0.png"):
        put(tmp_path / name)
    for name in (".ipynb_checkpoints", ".git", "dog/.ipynb_checkpoints", "@eaDir", "$RECYCLE.BIN"):
        put(tmp_path / name / "0.png")
    for name in ("Thumbs.db", "cat/Thumbs.db", "cat/desktop.ini", ".DS_Store"):
        (tmp_path / name).write_bytes(b"x")
    data = opened(tmp_path)
    assert data.class_names == ("cat", "dog")
    assert data.labels.tolist() == [0, 1]
    assert "2 images 8x8; 2 classes: cat (1), dog (1); skipped: 12 hidden or system files" in data.summary


def test_classes_that_are_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    for number in range(12):
        put(tmp_path / str(number) / "0.png", grey=number)
    data = opened(tmp_path)
    assert data.class_names == tuple(map(str, range(12)))
    assert data.images(np.arange(12))[:, 0, 0, 0].tolist() == data.labels.tolist() == list(range(12))
    assert "indices" not in data.summary
    (tmp_path / "0").rename(tmp_path / "12")
    assert "class names are not indices: index 0 is class '1'" in opened(tmp_path).summary
    put(tmp_path / "x" / "0.png")
    assert opened(tmp_path).class_names[:4] == ("1", "10", "11", "12")


def test_skipped_files_are_counted(tmp_path: Path) -> None:
    for name in ("cat/0.png", "cat/1.tif", "cat/2.jfif", "beside.png"):
        put(tmp_path / name) if not name.endswith("jfif") else put(tmp_path / "cat/x.jpg").rename(tmp_path / name)
    for name in ("cat/a.txt", "cat/b.TXT", "cat/c.dcm", "readme"):
        (tmp_path / name).write_text("x")
    data = opened(tmp_path)
    assert len(data.labels) == 3
    assert "skipped: 2 .txt, 1 without a suffix, 1 .dcm, 1 outside the class folders" in data.summary


def test_images_may_be_in_subfolders_and_behind_links(tmp_path: Path) -> None:
    put(tmp_path / "data" / "cat" / "day" / "0.png")
    put(tmp_path / "elsewhere" / "1.png", grey=7)
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "cat" / "all").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "data")
    data = opened(tmp_path / "data")
    assert data.class_names == ("cat", "dog")
    assert data.labels.tolist().count(1) >= 1
    (tmp_path / "data" / "dog" / "broken.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"broken\.png: No such file"):
        opened(tmp_path / "data")


def test_the_listing_of_an_existing_run_does_not_change(tmp_path: Path) -> None:
    """The digest and the order of files are those of the paths below the folder, sorted part by part."""
    for name in ("b/1.png", "a/x/2.png", "a/x.png", "a/10.png", "a-b/0.png"):
        put(tmp_path / "data" / name)
    data = opened(tmp_path / "data")
    assert {
        name: value for name, value in data.description.items() if name in ("folder", "listing_sha256", "images")
    } == {
        "folder": "data",
        "listing_sha256": "fa430996c463e975963351f0be963c8775e6d3c9aa8a54fda85df609fdca5753",
        "images": 5,
    }
    without_labels = opened(tmp_path / "data", labelled=False)
    assert without_labels.description == data.description


def test_without_classes_images_may_be_anywhere(tmp_path: Path) -> None:
    for name in ("0.png", "a/1.png"):
        put(tmp_path / name)
    data = opened(tmp_path, labelled=False)
    assert (data.class_names, data.labels.tolist()) == ((), [0, 0])
    assert "2 images 8x8; no classes" in data.summary


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["0.png", "1.png"], "contains images and no class subfolders.*--set class_conditional=false"),
        (["train/cat/0.png", "val/cat/0.png"], "contains train, val: splits of a data set.*--data .*/train$"),
        (["Test/cat/0.png", "Validation/cat/0.png"], "use one of them: --data .*/Test$"),
        (["cat/0.png", "notes/a.xml", "empty/.keep"], r"'empty' \(1 hidden or system files\), 'notes' \(1 .xml\)"),
        (["a/0.dcm", "b/0.dcm"], "contains no image .*it contains: 2 .dcm"),
        ([], "contains no image .*it contains: nothing"),
    ],
)
def test_the_error_for_a_folder_without_classes_has_a_remedy(tmp_path: Path, names: list[str], reason: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        put(tmp_path / name) if name.endswith(".png") else (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=reason):
        opened(tmp_path)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("train/0.png", "bus/0.png"):
        put(tmp_path / name)
    assert opened(tmp_path).class_names == ("bus", "train")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a.npy", "is one array; an npz file is needed.*np.savez"),
        ("a.png", "is one image; use the folder"),
        ("a.zip", "is an archive; unpack it"),
    ],
)
def test_the_error_for_a_file_that_is_no_data_set_has_a_remedy(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=reason):
        opened(tmp_path / name)


def test_a_single_class_with_subfolders_is_reported(tmp_path: Path) -> None:
    for name in ("images/cat/0.png", "images/dog/0.png"):
        put(tmp_path / name)
    assert "subfolders of the only class are not classes: cat, dog; use --data" in opened(tmp_path).summary


@pytest.mark.skipif(os.fsencode("\udcff") != b"\xff", reason="file names are not bytes here")
def test_names_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "cat" / "\udcff.png")
    assert len(opened(tmp_path).labels) == 1
    put(tmp_path / "\udcfe" / "0.png")
    with pytest.raises(DataError, match=r"the class folder '\\udcfe' is not UTF-8"):
        opened(tmp_path)


def test_the_summary_reports_changes_of_images(tmp_path: Path) -> None:
    put(tmp_path / "a" / "0.png", size=(4, 4))
    put(tmp_path / "a" / "1.png", size=(8, 30), mode="RGB")
    put(tmp_path / "a" / "2.png", mode="RGBA")
    Image.fromarray(np.full((8, 8), 4095, np.uint16)).save(tmp_path / "a" / "3.png")
    put(tmp_path / "a" / "4.tif", mode="CMYK")
    Image.new("L", (8, 8)).save(tmp_path / "a" / "5.gif", save_all=True, append_images=[Image.new("L", (8, 8), 9)])
    assert opened(tmp_path).summary == (
        "data: 6 images 4x4 to 8x30; 1 class: a (6); "
        "1 smaller than the model's 8x8, framed in black (data.small_images); "
        "1 scaled and cropped to 8x8; 4 colour read as grey (--set model.image_channels=3 keeps it); "
        "1 CMYK read without a colour profile; "
        "1 with transparency, drawn over white (data.background); 1 of more than 8 bits, full range scaled to 0..255; "
        "1 with several frames or pages, of which the first is used; "
        "1 images of more than 8 bits were sampled and reach 4095 of 65535, which is dark: "
        "--set data.value_range=0,4095 makes 4095 white"
    )
    options = DataConfig(small_images="enlarge", background="black", value_range=(0, 4095))
    summary = open_dataset(tmp_path, 8, 3, options).summary
    for part in (
        "1 smaller than the model's 8x8, enlarged (data.small_images)",
        "drawn over black",
        "0..4095 scaled to 0..255",
    ):
        assert part in summary
    assert "2 grey read as RGB" in summary
    assert "dark" not in summary


@pytest.mark.parametrize(("highest", "cure"), [(255, "0,255"), (4000, "0,4095"), (16383, "0,16383"), (16384, None)])
def test_sixteen_bit_files_with_fewer_bits_are_reported(tmp_path: Path, highest: int, cure: str | None) -> None:
    (tmp_path / "a").mkdir()
    for number in range(40):
        Image.fromarray(np.full((8, 8), highest if number == 0 else 1, np.uint16)).save(tmp_path / f"a/{number:02}.png")
    summary = opened(tmp_path).summary
    assert ("dark" in summary) == (cure is not None)
    if cure is not None:
        black, white = map(int, cure.split(","))
        assert f"--set data.value_range={cure} makes {white} white" in summary
        cured = open_dataset(tmp_path, 8, 1, DataConfig(value_range=(black, white)))
        assert cured.images(np.array([0])).max() > 127


def test_the_summary_is_one_line_for_any_class_names(tmp_path: Path) -> None:
    put(tmp_path / "a\nb" / "0.png")
    assert r"1 class: 'a\nb' (1)" in opened(tmp_path).summary


def test_many_classes_are_only_counted(tmp_path: Path) -> None:
    for number in range(30):
        put(tmp_path / f"c{number}" / "0.png")
    put(tmp_path / "c7" / "1.png")
    assert "31 images 8x8; 30 classes of 1 to 2 images" in opened(tmp_path).summary


def damaged(path: Path) -> None:
    """Write a PNG with damaged pixels and intact header and end."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    data = bytearray(path.read_bytes())
    data[1000:1100] = bytes(100)
    path.write_bytes(data)


def test_all_bad_files_are_listed_before_the_first_step(tmp_path: Path) -> None:
    for number in range(5):
        put(tmp_path / "a" / f"{number}.png")
    (tmp_path / "a" / "empty.png").write_bytes(b"")
    (tmp_path / "a" / "junk.jpg").write_bytes(b"junk")
    damaged(tmp_path / "a" / "damaged.png")
    with pytest.raises(DataError) as caught:
        opened(tmp_path)
    first, *lines = str(caught.value).splitlines()
    assert first == (
        "3 of 8 images cannot be read; repair or remove them, or leave out such files with --set data.unreadable=skip:"
    )
    assert [Path(line.split(": ")[0]).name for line in lines] == ["empty.png", "junk.jpg", "damaged.png"]


def test_the_list_of_bad_files_is_bounded(tmp_path: Path) -> None:
    put(tmp_path / "a" / "0.png")
    for number in range(300):
        (tmp_path / "a" / f"bad{number:03}.png").write_bytes(b"x")
    with pytest.raises(DataError, match="300 of 301 images cannot be read") as caught:
        opened(tmp_path)
    lines = str(caught.value).splitlines()
    assert len(lines) == checking.BAD_FILES_SHOWN + 2
    assert lines[-1].strip() == "and 280 more"


def test_large_sets_are_decoded_only_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "a" / "0.png")
    damaged(tmp_path / "a" / "1.png")
    inspect(tmp_path / "a" / "1.png", "L", DataConfig())  # its header is valid
    monkeypatch.setattr(checking, "DECODED_FILES", 1)
    data = opened(tmp_path)
    with pytest.raises(DataError, match=r"1\.png: .*; repair it; --decode-all lists all such files"):
        data.images(np.array([1]))
    with pytest.raises(DataError, match=r"1\.png: .*repair or remove it \(the other files, 1, can be read\)"):
        opened(tmp_path, decode_all=True)
    monkeypatch.setattr(checking, "DECODED_FILES", 2)
    monkeypatch.setattr(checking, "DECODED_PIXELS", 8 * 8 + 64 * 64 - 1)
    opened(tmp_path)
    monkeypatch.setattr(checking, "DECODED_PIXELS", 8 * 8 + 64 * 64)
    with pytest.raises(DataError, match=r"1\.png"):
        opened(tmp_path)


def test_files_are_read_as_one_or_three_channels_only(tmp_path: Path) -> None:
    put(tmp_path / "a" / "0.png")
    with pytest.raises(DataError, match=r"model.image_channels is 4: choose --set model.image_channels=3"):
        opened(tmp_path, channels=4)


def test_pipes_and_circular_links_are_listed_as_bad_files(tmp_path: Path) -> None:
    put(tmp_path / "cat" / "0.png")
    os.mkfifo(tmp_path / "cat" / "pipe.png")
    (tmp_path / "cat" / "self.png").symlink_to("self.png")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(DataError, match="2 of 3 images cannot be read") as caught:
        opened(tmp_path)
    assert "pipe.png: it is not a regular file" in str(caught.value)
    assert "self.png: Too many levels of symbolic links" in str(caught.value)


def test_names_of_bad_files_do_not_break_lines(tmp_path: Path) -> None:
    put(tmp_path / "cat" / "0.png")
    (tmp_path / "cat" / "new\nline.png").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        opened(tmp_path)
    assert r"new\nline.png': the file is empty" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_classes_may_be_the_beginnings_of_names_as_in_openais_sets(tmp_path: Path) -> None:
    for name in ("10_0.png", "2_0.png", "deeper/2_1_a.png", "deeper/10_x.png"):
        put(tmp_path / name, grey=int(Path(name).name.partition("_")[0]))
    data = open_dataset(tmp_path, 8, 1, DataConfig(class_from="name"))
    assert data.class_names == ("2", "10")
    assert [int(data.class_names[label]) for label in data.labels] == data.images(np.arange(4))[:, 0, 0, 0].tolist()
    assert "2 classes: 2 (2), 10 (2)" in data.summary
    assert "classes are the names before the first underscore (data.class_from)" in data.summary
    assert open_dataset(tmp_path, 8, 1, DataConfig(class_from="name"), labelled=False).class_names == ()
    put(tmp_path / "_7.png")
    put(tmp_path / "x.png")
    with pytest.raises(DataError, match=r"2 of 6 have no class before an underscore: _7\.png, x\.png"):
        open_dataset(tmp_path, 8, 1, DataConfig(class_from="name"))


def test_a_folder_of_openais_names_is_pointed_out(tmp_path: Path) -> None:
    for name in ("cat_0.png", "cat_1.png", "dog_0.png"):
        put(tmp_path / name)
    with pytest.raises(DataError, match=r"if the 2 classes are .* \(cat, dog\): --set data.class_from=name"):
        opened(tmp_path)
    put(tmp_path / "other.png")
    with pytest.raises(DataError, match="contains images and no class subfolders") as caught:
        opened(tmp_path)
    assert "class_from" not in str(caught.value)
