"""Files of generated images in the formats that other programs read, a shard of consecutive images at a time.

png         images/CLASS/SEED_INDEX.png; images/SEED_INDEX.png without classes
webdataset  000000.tar, 000001.tar, ...: SEED_INDEX.png, .cls (the class, if there are classes) and .json per image
parquet     000000.parquet, ...: a row per image, which Hugging Face's `datasets` shows as a picture with its label
npz         samples.npz for guided-diffusion's evaluator: arr_0 uint8 [N, H, W, C], arr_1 int64 [N] (with classes);
            until all images are there, shards/000000.npz, ...

A file has its name only when it is whole, so that the shards which are yet to be written follow from the files alone.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from diffusion.quoting import quoted
from formats.atomic_file import replace_file
from formats.atomic_folder import write_folder
from formats.generation import Generation, GenerationFormat
from formats.images import Uint8Array, encode
from formats.leftovers import remove_leftovers

PICTURE_CHANNELS = (1, 3, 4)
"""Channels of images that can be stored as PNG."""
LONGEST_NAME = 255
"""Most bytes of a folder's name."""


class Shards(ABC):
    """The files of one format in a folder."""

    pictures = True
    """Whether images are stored as PNG files."""

    def __init__(self, folder: Path, generation: Generation) -> None:
        self.folder, self.generation = folder, generation

    @abstractmethod
    def exists(self, images: range) -> bool:
        """Return whether the shard of these images is whole."""

    @abstractmethod
    def write(self, images: range, pixels: Uint8Array) -> None:
        """Write a shard, [len(images), H, W, C].

        Raises:
            OSError: a file cannot be written; the shard does not exist then.
        """

    @abstractmethod
    def finish(self) -> None:
        """Do what is left when all shards exist: remove leftovers of killed processes, join files."""


class FileShards(Shards):
    """One file per shard."""

    suffix: str
    subfolder = ""

    def path(self, images: range) -> Path:
        """Return the file of a shard."""
        return self.folder / self.subfolder / f"{images.start // self.generation.shard_size:06d}{self.suffix}"

    def exists(self, images: range) -> bool:
        return self.path(images).exists()

    def write(self, images: range, pixels: Uint8Array) -> None:
        path = self.path(images)
        path.parent.mkdir(exist_ok=True)
        replace_file(path, lambda temporary: self._write(temporary, images, pixels))

    @abstractmethod
    def _write(self, path: Path, images: range, pixels: Uint8Array) -> None: ...

    def finish(self) -> None:
        for images in self.generation.shards():
            remove_leftovers(self.path(images))


class PngShards(Shards):
    """One file per image, in a folder per class.

    Raises:
        ValueError: the name of a class is too long for a folder.
    """

    def __init__(self, folder: Path, generation: Generation) -> None:
        super().__init__(folder, generation)
        self._together = folder / ".shard"
        self._class_folders = class_folders(generation.class_names)

    def path(self, k: int) -> Path:
        """Return the file of image k."""
        index = self.generation.class_of(k)
        folder = self.folder / "images"
        return (folder if index is None else folder / self._class_folders[index]) / f"{self.generation.name_of(k)}.png"

    def exists(self, images: range) -> bool:
        return all(self.path(k).exists() for k in images)

    def write(self, images: range, pixels: Uint8Array) -> None:
        def write_all(folder: Path) -> None:
            for k, image in zip(images, pixels, strict=True):
                (folder / str(k)).write_bytes(encode(image))

        write_folder(self._together, write_all)  # images get their names when all of the shard are on the disk
        for k in images:
            path = self.path(k)
            path.parent.mkdir(parents=True, exist_ok=True)
            (self._together / str(k)).replace(path)
        self._together.rmdir()

    def finish(self) -> None:
        remove_leftovers(self._together)
        shutil.rmtree(self._together, ignore_errors=True)


class WebdatasetShards(FileShards):
    """Tar files in which the files of an image follow each other."""

    suffix = ".tar"

    def _write(self, path: Path, images: range, pixels: Uint8Array) -> None:
        generation = self.generation
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
            for k, image in zip(images, pixels, strict=True):
                label = generation.class_of(k)
                facts: dict[str, int | str] = {"seed": generation.seed, "image_index": generation.index_of(k)}
                if label is not None:
                    facts |= {"class": generation.class_names[label], "class_index": label}
                _add(archive, f"{generation.name_of(k)}.png", encode(image))
                if label is not None:
                    _add(archive, f"{generation.name_of(k)}.cls", str(label).encode())
                _add(archive, f"{generation.name_of(k)}.json", json.dumps(facts).encode())


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)  # without time and owner: equal images give equal files
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


class ParquetShards(FileShards):
    """Parquet files with the columns image, label (with classes), seed and image_index.

    Raises:
        ModuleNotFoundError: pyarrow is not installed.
    """

    suffix = ".parquet"

    def __init__(self, folder: Path, generation: Generation) -> None:
        import pyarrow as pa
        import pyarrow.parquet  # takes seconds, which the thread that writes would take from the engine

        super().__init__(folder, generation)
        columns = [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))]
        if generation.classes is not None:
            columns.append(("label", pa.int64()))
        columns += [("seed", pa.int64()), ("image_index", pa.int64())]
        # What `datasets` reads the types from that Arrow does not have
        features = {"info": {"features": {name: self._feature(name) for name, _ in columns}}}
        self._schema = pa.schema(columns, metadata={"huggingface": json.dumps(features)})

    def _feature(self, column: str) -> dict[str, Any]:
        if column == "image":
            return {"_type": "Image"}
        if column == "label":
            return {"_type": "ClassLabel", "names": list(self.generation.class_names)}
        return {"_type": "Value", "dtype": "int64"}

    def _write(self, path: Path, images: range, pixels: Uint8Array) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        generation = self.generation
        columns: dict[str, Any] = {
            "image": [
                {"bytes": encode(image), "path": f"{generation.name_of(k)}.png"}
                for k, image in zip(images, pixels, strict=True)
            ],
            "label": generation.labels(images),
            "seed": [generation.seed] * len(images),
            "image_index": [generation.index_of(k) for k in images],
        }
        table = pa.table({name: columns[name] for name in self._schema.names}, schema=self._schema)
        pq.write_table(table, path, compression="none")  # PNG files are compressed


class NpzShards(FileShards):
    """Arrays, which are joined into one file at the end."""

    suffix = ".npz"
    subfolder = "shards"
    pictures = False

    @property
    def samples(self) -> Path:
        """The file of all images."""
        return self.folder / SAMPLES_FILE

    def exists(self, images: range) -> bool:
        return self.samples.exists() or super().exists(images)

    def _write(self, path: Path, images: range, pixels: Uint8Array) -> None:
        with path.open("wb") as file:
            np.savez(file, arr_0=pixels)

    def finish(self) -> None:
        if not self.samples.exists():
            replace_file(self.samples, self._join)
        remove_leftovers(self.samples)
        shutil.rmtree(self.folder / self.subfolder, ignore_errors=True)

    def _join(self, path: Path) -> None:
        generation = self.generation
        labels = generation.labels(range(generation.count))
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                shape = (generation.count, *generation.image_shape)
                np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
                for images in generation.shards():
                    with np.load(self.path(images), allow_pickle=False) as shard:
                        file.write(np.ascontiguousarray(shard["arr_0"]).data)
            if labels is not None:
                with archive.open("arr_1.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, labels)


SAMPLES_FILE = "samples.npz"
FORMATS: dict[GenerationFormat, type[Shards]] = {
    "png": PngShards,
    "webdataset": WebdatasetShards,
    "parquet": ParquetShards,
    "npz": NpzShards,
}


def class_folders(names: Sequence[str]) -> list[str]:
    """Return a folder for each class: its name, with what file systems cannot hold as %XX; after its index if two
    classes have the same name.

    Raises:
        ValueError: a name is too long for a folder.
    """
    numbered = len(set(names)) < len(names)
    folders = []
    for index, name in enumerate(names):
        fit = "".join(char if char.isprintable() and char not in "/\\%" else quote(char, safe="") for char in name)
        fit = f"%2E{fit[1:]}" if fit.startswith(".") else fit
        folders.append(f"{index:0{len(str(len(names) - 1))}d}-{fit}" if numbered else fit)
        if len(folders[-1].encode()) > LONGEST_NAME:
            raise ValueError(f"the class name {quoted(name)} is too long for a folder: use another --format")
    return folders
