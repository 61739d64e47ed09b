"""open_dataset: open a path given by the user as a data set."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from diffusion.config import ImageSize
from trainer.data.arrays import ArrayDataset
from trainer.data.cache import default_cache
from trainer.data.checking import (
    Examined,
    ExaminedSources,
    examine_files,
    examine_sources,
    readable,
    readable_pairs,
)
from trainer.data.dataset import DataError, Dataset, IntArray
from trainer.data.folder import FolderDataset
from trainer.data.hugging_face import HuggingFaceDataset, Rows, is_saved_dataset
from trainer.data.image_file import SUFFIXES, mode_of
from trainer.data.listing import Listing, list_images
from trainer.data.options import DataConfig
from trainer.data.pairs import Pairs, Side, files_of_pairs
from trainer.data.skipping_pairs import SkippingPairs

ARCHIVE_SUFFIXES = frozenset({".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst"})


def open_dataset(
    path: Path,
    image_size: ImageSize,
    channels: int,
    options: DataConfig | None = None,
    *,
    labelled: bool = True,
    cond_channels: int = 0,
    cond: Path | None = None,
    decode_all: bool = False,
    cache: Path | None = None,
) -> Dataset:
    """Open a folder of images, an npz or npy file, or a Hugging Face data set, and check its content.

    docs/training.md describes what is accepted.

    Args:
        path: of the file or the folder.
        image_size: size of the images that the data set returns.
        channels: 1 for grey, 3 for RGB; an npz may have any number.
        options: how images are read; None: the defaults.
        labelled: whether labels are used; a folder then holds one subfolder per class, an npz an array `labels`.
        cond_channels: channels of the conditioning image that each image has; 0: the data are no pairs.
        cond: folder or file of the conditioning images; None: they are in the same file (array `cond`, `cond_column`).
        decode_all: decode every file now; otherwise only in small data sets.
        cache: folder of indexes and unpacked arrays; None: the user's cache folder.

    Raises:
        DataError: the path does not exist or cannot be used for training; unreadable files are named.
    """
    opener = _Opener(options or DataConfig(), image_size, labelled, decode_all, cache or default_cache())
    if cond_channels:
        return opener.pairs(path, channels, cond, cond_channels)
    if cond is not None:
        raise DataError(
            f"conditioning images ({cond}) are for a model that takes some: set model.cond_channels to their channels "
            "(an upsampler, model.low_res_size, makes its own from the images)"
        )
    return opener.images(path, channels)


@dataclass(frozen=True)
class _Opener:
    """Opens data in one way of reading."""

    options: DataConfig
    image_size: ImageSize
    labelled: bool
    decode_all: bool
    cache: Path

    def images(self, path: Path, channels: int) -> Side:
        """Open a path of any kind."""
        if path.is_dir() and is_saved_dataset(path):
            rows = self.rows(path)
            return self.hugging_face(rows, channels, self.examined_rows(rows, channels))
        if path.is_dir():
            listing = self.listing(path)
            return self.folder(path, listing, channels, self.examined(path, listing, channels))
        _check_file(path, self.labelled)
        return self.arrays(path, channels)

    def listing(self, path: Path) -> Listing:
        """List the image files of a folder."""
        return list_images(path, labelled=self.labelled, class_from=self.options.class_from)

    def examined(self, path: Path, listing: Listing, channels: int) -> Examined:
        """Examine the files that were listed below a folder."""
        mode = mode_of(channels, self.options)
        return examine_files(path, listing.files, mode, self.options, decode_all=self.decode_all, cache=self.cache)

    def folder(
        self, path: Path, listing: Listing, channels: int, found: Examined, kept: IntArray | None = None
    ) -> FolderDataset:
        """Open the files that were examined; `kept` are the numbers of those that are used, None: the readable ones."""
        if kept is None:
            kept = readable(found, self.options)
        return FolderDataset(
            path, listing, found, kept, self.image_size, channels, self.options, labelled=self.labelled
        )

    def rows(self, path: Path) -> Rows:
        """Find the columns of a Hugging Face data set."""
        return Rows(path, self.options, labelled=self.labelled)

    def examined_rows(self, rows: Rows, channels: int) -> ExaminedSources:
        """Examine the images of a Hugging Face data set."""
        mode = mode_of(channels, self.options)
        return examine_sources(len(rows), rows.source, mode, self.options, decode_all=self.decode_all)

    def hugging_face(
        self, rows: Rows, channels: int, found: ExaminedSources, kept: IntArray | None = None
    ) -> HuggingFaceDataset:
        """Open the rows that were examined; `kept` as of `folder`."""
        if kept is None:
            kept = readable(found, self.options)
        return HuggingFaceDataset(rows, found, kept, self.image_size, channels, self.options)

    def arrays(self, path: Path, channels: int, *, paired: bool = False) -> Side:
        """Open an npz or npy file."""
        return ArrayDataset(
            path, self.image_size, channels, self.options, labelled=self.labelled, cache=self.cache, paired=paired
        )

    def pairs(self, path: Path, channels: int, cond: Path | None, cond_channels: int) -> Dataset:
        """Open images with their conditioning images."""
        conditions = replace(self, options=self.options.for_conditions(), labelled=False)
        if path.is_dir() and is_saved_dataset(path):
            if cond is not None or self.options.cond_column is None:
                raise DataError(
                    f"{path}: the conditioning images of a Hugging Face data set are a column of it: choose it with "
                    "--set data.cond_column=NAME, without --cond"
                )
            return self._columns(path, channels, conditions, cond_channels)
        if path.is_dir():
            return self._folders(path, channels, conditions, cond, cond_channels)
        _check_file(path, self.labelled)
        if cond is None and path.suffix.lower() == ".npy":
            raise DataError(f"{path} is one array; its conditioning images must be another file: --cond FILE")
        if cond is not None and (cond.is_dir() or not cond.exists()):
            raise DataError(f"the conditioning images of {path} must be an npz or npy file, as that; {cond} is none")
        images = self.arrays(path, channels, paired=cond is None)
        return Pairs(path, images, conditions.arrays(cond or path, cond_channels))

    def _folders(
        self, path: Path, channels: int, conditions: _Opener, cond: Path | None, cond_channels: int
    ) -> Dataset:
        if cond is None or not cond.is_dir() or is_saved_dataset(cond):
            got = "" if cond is None else f"; {cond} is none"
            raise DataError(
                f"the conditioning images of {path} must be a folder (--cond) with a file of the same name for each "
                f"image, because model.cond_channels is {cond_channels}{got}"
            )
        listing, theirs = self.listing(path), conditions.listing(cond)
        theirs = replace(theirs, files=files_of_pairs(path, listing.files, cond, theirs.files))
        mine, others = self.examined(path, listing, channels), conditions.examined(cond, theirs, cond_channels)
        if self.options.unreadable == "fail":
            images = self.folder(path, listing, channels, mine)
            return Pairs(path, images, conditions.folder(cond, theirs, cond_channels, others))
        kept = readable_pairs(mine, others)
        images, conds = (
            opener.without_replacements().folder(folder, files, wanted, found, kept)
            for opener, folder, files, wanted, found in (
                (self, path, listing, channels, mine),
                (conditions, cond, theirs, cond_channels, others),
            )
        )
        return Pairs(path, images, conds, SkippingPairs(images, conds))

    def _columns(self, path: Path, channels: int, conditions: _Opener, cond_channels: int) -> Dataset:
        rows, theirs = self.rows(path), conditions.rows(path)
        mine, others = self.examined_rows(rows, channels), conditions.examined_rows(theirs, cond_channels)
        if self.options.unreadable == "fail":
            images = self.hugging_face(rows, channels, mine)
            return Pairs(path, images, conditions.hugging_face(theirs, cond_channels, others))
        kept = readable_pairs(mine, others)
        images = self.without_replacements().hugging_face(rows, channels, mine, kept)
        conds = conditions.without_replacements().hugging_face(theirs, cond_channels, others, kept)
        return Pairs(path, images, conds, SkippingPairs(images, conds))

    def without_replacements(self) -> _Opener:
        """Return an opener whose data do not replace unreadable images."""
        return replace(self, options=self.options.replace(unreadable="fail"))


def _check_file(path: Path, labelled: bool) -> None:
    """Refuse a path that is no npz or npy file with what the user may have meant."""
    if not path.is_file():
        raise DataError(f"data must be a folder of images, or an npz or npy file; {path} does not exist")
    suffix = path.suffix.lower()
    if suffix == ".npy" and labelled:
        raise DataError(
            f"{path} is one array; an npz file is needed, with labels (or --set class_conditional=false): "
            f"np.savez({path.with_suffix('.npz').name!r}, images=np.load({path.name!r}), labels=labels)"
        )
    if suffix in SUFFIXES:
        raise DataError(f"{path} is one image; use the folder that contains the class subfolders")
    if suffix in ARCHIVE_SUFFIXES:
        raise DataError(f"{path} is an archive; unpack it and use the folder")
