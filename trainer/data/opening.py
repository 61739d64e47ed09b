"""open_dataset: open a path given by the user as a data set."""

from __future__ import annotations

from pathlib import Path

from diffusion.config import ImageSize
from trainer.data.arrays import ArrayDataset
from trainer.data.cache import default_cache
from trainer.data.dataset import DataError, Dataset
from trainer.data.folder import FolderDataset
from trainer.data.hugging_face import HuggingFaceDataset, is_saved_dataset
from trainer.data.image_file import SUFFIXES
from trainer.data.options import DataConfig

ARCHIVE_SUFFIXES = frozenset({".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst"})


def open_dataset(
    path: Path,
    image_size: ImageSize,
    channels: int,
    options: DataConfig | None = None,
    *,
    labelled: bool = True,
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
        decode_all: decode every file now; otherwise only in small data sets.
        cache: folder of indexes and unpacked arrays; None: the user's cache folder.

    Raises:
        DataError: the path does not exist or cannot be used for training; unreadable files are named.
    """
    options = options or DataConfig()
    cache = cache or default_cache()
    if path.is_dir() and is_saved_dataset(path):
        return HuggingFaceDataset(path, image_size, channels, options, labelled=labelled, decode_all=decode_all)
    if path.is_dir():
        return FolderDataset(path, image_size, channels, options, labelled=labelled, decode_all=decode_all, cache=cache)
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
    return ArrayDataset(path, image_size, channels, options, labelled=labelled, cache=cache)
