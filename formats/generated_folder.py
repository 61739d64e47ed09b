"""A folder of generated images: locked while it is written, of one `Generation`, and continued after any interruption.

manifest.json   the `Generation`; written first, and with `complete` when all images are there
.lock           held by the process that writes
...             the images, see `formats.shards`
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from diffusion.quoting import in_words
from formats.atomic_file import write_file
from formats.checkpoint_config import describe_validation_error
from formats.folder_lock import folder_lock
from formats.generation import Generation, generation_json
from formats.images import Uint8Array
from formats.json_files import read_object
from formats.leftovers import remove_leftovers
from formats.shards import FORMATS, PICTURE_CHANNELS, Shards

MANIFEST_FILE = "manifest.json"


class GenerationError(ValueError):
    """A folder cannot hold these images; the message names the reason and the remedy."""


class GeneratedFolder:
    """The folder of a generation, while `generated_folder` holds its lock."""

    def __init__(self, folder: Path, generation: Generation, shards: Shards, unlocked: OSError | None) -> None:
        self.folder, self.generation = folder, generation
        self.unlocked = unlocked
        """The error of a file system without locks, where no other process is kept out."""
        self._shards = shards

    def missing(self) -> list[range]:
        """Return the images that are yet to be generated, one range per shard."""
        return [images for images in self.generation.shards() if not self._shards.exists(images)]

    def write(self, images: range, pixels: Uint8Array) -> None:
        """Write the images of a shard, [len(images), H, W, C]; it exists whole or not at all.

        Raises:
            OSError: a file cannot be written.
        """
        self._shards.write(images, pixels)

    def finish(self) -> None:
        """Complete the folder; all shards exist."""
        self._shards.finish()
        if not self.generation.complete:
            self.generation = self.generation.replace(complete=True)
            write_file(self.folder / MANIFEST_FILE, generation_json(self.generation).encode())


@contextmanager
def generated_folder(folder: Path, generation: Generation) -> Iterator[GeneratedFolder]:
    """Create a folder for generated images or continue with an earlier one, and lock other processes out.

    Nothing is written before everything is checked.

    Raises:
        GenerationError: the folder holds other images or other files, or the format cannot hold the images.
        FolderInUse: another process writes there.
        ModuleNotFoundError: the format needs a package that is not installed.
        OSError: the folder cannot be written.
    """
    channels = generation.image_shape[2]
    form = FORMATS[generation.format]
    if form.pictures and channels not in PICTURE_CHANNELS:
        raise GenerationError(
            f"--format {generation.format} holds images of {in_words(map(str, PICTURE_CHANNELS))} channels, and this "
            f"model's have {channels}: use --format npz"
        )
    shards = form(folder, generation)
    _refuse_other_files(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder) as unlocked:
        _refuse_other_files(folder)  # again: another process may have begun meanwhile
        path = folder / MANIFEST_FILE
        remove_leftovers(path)
        if path.exists():
            earlier = read_generation(folder)
            if changed := generation.differences(earlier):
                raise GenerationError(
                    f"{folder} holds images that were generated differently ({'; '.join(changed)}): use another --out, "
                    "or remove it"
                )
            generation = earlier
        else:
            write_file(path, generation_json(generation).encode())
        yield GeneratedFolder(folder, generation, shards, unlocked)


def read_generation(folder: Path) -> Generation:
    """Read the manifest of a folder of generated images.

    Raises:
        GenerationError: there is none, or it is invalid.
    """
    path = folder / MANIFEST_FILE
    try:
        return Generation.model_validate(read_object(path))
    except ValidationError as error:
        raise GenerationError(f"{path}: {describe_validation_error(error)}") from error
    except (OSError, ValueError) as error:
        raise GenerationError(str(error)) from error


def _refuse_other_files(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise GenerationError(f"--out must be a folder; {folder} is a file")
    if not folder.is_dir() or (folder / MANIFEST_FILE).exists():
        return
    if others := sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(".")):
        raise GenerationError(f"{folder} contains other files ({others[0]}): use another --out")
