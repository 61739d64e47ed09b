"""List the image files of a data set folder and their classes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from diffusion.quoting import printable
from trainer.data.dataset import DataError
from trainer.data.image_file import SUFFIXES
from trainer.data.options import ClassFrom

SYSTEM_NAMES = frozenset(
    {"__macosx", "__pycache__", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "system volume information"}
)
"""Names, in lower case, that archivers, notebooks and file managers create; skipped, like names with a leading dot."""
SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "dev", "test", "testing"})
NAMES_SHOWN = 10


@dataclass
class Listing:
    """The images below a folder."""

    files: list[str]
    """Paths below the folder, ordered by class."""
    labels: list[int]
    class_names: tuple[str, ...]
    """Empty if the subfolders are not classes."""
    left_out: Counter[str]
    """Number of skipped files by reason: a suffix, or another reason."""


@dataclass
class _Found:
    images: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def list_images(folder: Path, *, labelled: bool, class_from: ClassFrom = "folder") -> Listing:
    """List the images below a folder.

    Args:
        folder: holds one subfolder per class, which may have subfolders of its own.
        labelled: whether images have classes; if not, they may be anywhere below the folder.
        class_from: `folder`: the subfolders are classes; `name`: images may be anywhere below the folder, and the
            class of `cat_17.png` is `cat`.

    Raises:
        DataError: there are no images, a class has no images, or the folder does not contain classes.
    """
    beside = _Found()
    by_class: dict[str, _Found] = {}
    for entry in _visible(folder, beside):
        if _is_folder(entry):
            by_class[entry.name] = _Found()
            _collect(folder, entry.name, frozenset({os.path.realpath(folder)}), by_class[entry.name])
        else:
            _sort_in(entry.name, beside)
    left_out = sum((found.left_out for found in by_class.values()), beside.left_out)
    if not any(found.images for found in (beside, *by_class.values())):
        raise DataError(
            f"{folder} contains no image ({', '.join(sorted(SUFFIXES))}); it contains: {describe_counts(left_out)}"
        )
    _refuse_splits(folder, by_class)
    if not labelled or class_from == "name":
        files = [*beside.images, *(path for found in by_class.values() for path in found.images)]
        files.sort(key=lambda path: path.split(os.sep))  # noqa: PTH206 - as below
        if not labelled:
            return Listing(files, [0] * len(files), (), left_out)
        return _by_name(folder, files, left_out)

    _refuse_what_is_no_class(folder, beside, by_class)
    if beside.images:
        left_out["outside the class folders"] = len(beside.images)
    names = sorted_class_names(by_class)
    files = [path for name in names for path in by_class[name].images]
    labels = [label for label, name in enumerate(names) for _ in by_class[name].images]
    return Listing(files, labels, names, left_out)


def _by_name(folder: Path, files: list[str], left_out: Counter[str]) -> Listing:
    """Return a listing whose classes are the file names up to the first underscore."""
    if unfit := [path for path in files if not _class_of(path)]:
        raise DataError(
            f"{folder}: data.class_from=name needs names such as cat_17.png; {len(unfit):,} of {len(files):,} have no "
            f"class before an underscore: {shorten(map(printable, unfit))}"
        )
    of_files = [_class_of(path) for path in files]
    names = sorted_class_names(set(of_files))
    _refuse_undecodable(folder, names)
    label = {name: number for number, name in enumerate(names)}
    return Listing(files, [label[name] for name in of_files], names, left_out)


def _class_of(path: str) -> str:
    """Return the part of a file's name before the first underscore; empty if there is none."""
    class_name, underscore, _ = path.rpartition(os.sep)[2].partition("_")
    return class_name if underscore else ""


def describe_counts(counts: Counter[str]) -> str:
    """Return, for example, "3 .txt, 1 .csv"."""
    return shorten(f"{count} {what}" for what, count in counts.most_common()) or "nothing"


def shorten(items: Iterable[str]) -> str:
    """Join the first items, and append the number of further ones."""
    listed = list(items)
    more = f" and {len(listed) - NAMES_SHOWN} more" if len(listed) > NAMES_SHOWN else ""
    return ", ".join(listed[:NAMES_SHOWN]) + more


def _collect(folder: Path, below: str, ancestors: frozenset[str], found: _Found) -> None:
    """Add the content of a subfolder, in the order of names; do not follow a link to a folder that contains it."""
    real = os.path.realpath(folder / below)
    if real in ancestors:
        return
    for entry in _visible(folder / below, found):
        path = f"{below}{os.sep}{entry.name}"  # a Path per file would take seconds for 200,000 files
        if _is_folder(entry):
            _collect(folder, path, ancestors | {real}, found)
        else:
            _sort_in(path, found)


def _visible(folder: Path, found: _Found) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        by_name = sorted(entries, key=lambda entry: entry.name)
    for entry in by_name:
        if entry.name.startswith(".") or entry.name.lower() in SYSTEM_NAMES:
            found.left_out["hidden or system files"] += 1
        else:
            yield entry


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: reported with the other unreadable files
        return False


def _sort_in(path: str, found: _Found) -> None:
    suffix = os.path.splitext(path)[1].lower()  # noqa: PTH122 - as above
    if suffix in SUFFIXES:
        found.images.append(path)
    else:
        found.left_out[suffix or "without a suffix"] += 1


def _refuse_splits(folder: Path, by_class: dict[str, _Found]) -> None:
    splits = [name for name in by_class if name.lower() in SPLIT_NAMES]
    if splits and len(splits) == len(by_class):
        choice = next((name for name in splits if name.lower().startswith("train")), splits[0])
        raise DataError(
            f"{folder} contains {shorten(splits)}: splits of a data set, not classes; use one of them: "
            f"--data {folder / choice}"
        )


def _refuse_what_is_no_class(folder: Path, beside: _Found, by_class: dict[str, _Found]) -> None:
    if not by_class:
        raise DataError(
            f"{folder} contains images and no class subfolders; put the images of each class into a "
            f"subfolder, or train without classes: --set class_conditional=false{_hint_at_names(beside)}"
        )
    empty = [f"{name!r} ({describe_counts(found.left_out)})" for name, found in by_class.items() if not found.images]
    if empty:
        raise DataError(
            f"{folder}: every subfolder is a class, and these contain no image: {shorten(empty)}; "
            "move them elsewhere, or add images to them"
        )
    _refuse_undecodable(folder, by_class)


def _refuse_undecodable(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{folder}: the name of the class folder {name!a} is not UTF-8; rename it") from error


def _hint_at_names(beside: _Found) -> str:
    """Return a hint if all images that lie beside each other are named as OpenAI's: `<class>_<number>.png`."""
    names = {_class_of(path) for path in beside.images}
    if "" in names:
        return ""
    count = "class is" if len(names) == 1 else "classes are"
    return (
        f"; if the {len(names):,} {count} the names before the first underscore ({shorten(sorted(names))}): "
        "--set data.class_from=name"
    )


def sorted_class_names(names: Iterable[str]) -> tuple[str, ...]:
    """Sort class names by name, or by number if all names are numbers, so that index 2 is class "2" and not "10"."""
    if all(name.isascii() and name.isdigit() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))
