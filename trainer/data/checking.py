"""Check every file of a data set before the first step, and report all unreadable ones at once."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from diffusion.quoting import printable
from trainer.data.dataset import DataError, IntArray
from trainer.data.header_processes import read_in_processes
from trainer.data.image_file import Header, Mode, Source, check_whole, highest_grey, inspect, name_of_source
from trainer.data.index import Index, index_name
from trainer.data.options import DataConfig
from trainer.data.summary import Summary
from trainer.run_folder import warn

THREADS = 8
FILES_PER_TASK = 64
BAR_DELAY_SECONDS = 2
BAD_FILES_SHOWN = 20
DECODED_FILES, DECODED_PIXELS = 10_000, 200_000_000
"""A data set within both limits is decoded completely, which takes seconds."""
INDEXED_FILES = 10_000
"""What is known about the files of a folder with at least this number of them is kept in an index file."""
FILES_FOR_PROCESSES = 30_000
"""The headers of at least this number of files are read in processes, which take a second or two to start."""
DEEP_FILES_LOOKED_AT = 16
"""Minimum number of files to sample; fewer than twice as many are sampled."""
DARK_BITS = 2
"""Images that leave this number of a file's bits unused are nowhere brighter than a quarter of white."""
Item = TypeVar("Item")
Result = TypeVar("Result")


class Checked(NamedTuple):
    """The images that can be used."""

    kept: IntArray
    """Their numbers, ascending."""
    sizes: IntArray
    """Their heights and widths, int64 [N, 2]."""
    bytes: list[int]
    """Their sizes in bytes; empty for images that are part of a larger file."""
    content_sha256: str
    """Digest of the content of all."""


class Findings(Protocol):
    """What was found about the images of a data set."""

    @property
    def count(self) -> int:
        """Number of images, unreadable ones included."""
        ...

    @property
    def bad(self) -> dict[int, DataError]:
        """Why images cannot be read, by their numbers."""
        ...

    def name_of(self, number: int) -> str:
        """Return how an image is called in messages."""
        ...


@dataclass(frozen=True, eq=False)
class Examined:
    """What was found about the files of a folder."""

    folder: Path
    index: Index
    bad: dict[int, DataError]
    """Why files cannot be read, by their numbers."""
    index_file: Path | None
    """Where the index is kept for the next start; None: it is not."""

    @property
    def count(self) -> int:
        """Number of files."""
        return len(self.index.files)

    def name_of(self, number: int) -> str:
        """Return how a file is called in messages."""
        return printable(self.folder / self.index.files[number])


@dataclass(frozen=True, eq=False)
class ExaminedSources:
    """What was found about images that are part of a larger file."""

    source: Callable[[int], Source]
    """Returns the encoded image of a number."""
    count: int
    headers: dict[int, Header]
    """By the numbers of the images whose header can be read."""
    bad: dict[int, DataError]
    """Why images cannot be read, by their numbers."""

    def name_of(self, number: int) -> str:
        """Return how an image is called in messages."""
        return name_of_source(self.source(number))


def examine_files(
    folder: Path, files: Sequence[str], mode: Mode, options: DataConfig, *, decode_all: bool, cache: Path
) -> Examined:
    """Read the header of every file, and decode the files if requested or if that is quick.

    Args:
        folder: where the files are.
        files: paths below it.
        mode: mode of the decoded images.
        options: how files are read.
        decode_all: decode all files, regardless of their number.
        cache: folder of index files.
    """
    index = Index.of_files(folder, files)
    path = cache / index_name(folder, mode, options)
    indexed = len(files) >= INDEXED_FILES
    if indexed:
        index.recall(path)
    bad: dict[int, DataError] = {}
    before = int(np.count_nonzero(index.widths)), int(np.count_nonzero(index.decoded))

    def read_whole(number: int) -> None:
        check_whole(folder / files[number], mode, options)

    title = "building the index of images" if indexed else "checking images"
    try:
        for number, header in _headers(folder, files, np.flatnonzero(index.widths == 0), mode, options, title):
            if isinstance(header, DataError):
                bad[number] = header
            else:
                index.set_header(number, header)
        pixels = int((index.widths.astype(np.int64) * index.heights).sum())
        if decode_all or (len(files) <= DECODED_FILES and pixels <= DECODED_PIXELS):
            undecoded = np.flatnonzero((index.widths > 0) & ~index.decoded).tolist()
            for number, error in each(undecoded, read_whole, "decoding images"):
                if error is None:
                    index.decoded[number] = True
                else:
                    bad[number] = error
    finally:  # an interrupted check continues at the next start
        if indexed and (int(np.count_nonzero(index.widths)), int(np.count_nonzero(index.decoded))) != before:
            _save(index, path)
    return Examined(folder, index, bad, path if indexed and path.exists() else None)


def check_files(examined: Examined, kept: IntArray, options: DataConfig, summary: Summary) -> Checked:
    """Count the traits of the files that are used.

    Args:
        examined: from `examine_files`.
        kept: numbers of the files that are used, ascending.
        options: how files are read.
        summary: counts are added to it.
    """
    folder, index = examined.folder, examined.index
    if examined.index_file is not None:
        summary.remarks.append(f"index of the files: {examined.index_file}")
    _count_left_out(examined, kept, options, summary)
    for kind in index.kinds(kept):
        summary.add(*kind)
    if options.value_range is None:
        deep = np.intersect1d(index.having("deep"), kept)
        summary.remarks += _remarks_on_range([folder / index.files[number] for number in deep], options)
    sizes = np.stack([index.heights[kept], index.widths[kept]], axis=1).astype(np.int64)
    return Checked(kept, sizes, index.sizes[kept].tolist(), _sha256(index.digests[kept]))


def _headers(
    folder: Path, files: Sequence[str], numbers: IntArray, mode: Mode, options: DataConfig, title: str
) -> Iterator[tuple[int, Header | DataError]]:
    """Read the headers of the files with these numbers; yield them, or errors, in order."""
    unread = numbers.tolist()
    if len(unread) < FILES_FOR_PROCESSES or len(os.sched_getaffinity(0)) == 1:
        yield from each(unread, lambda number: inspect(folder / files[number], mode, options), title)
        return
    with _bar(title, len(unread)) as bar:
        numbered = iter(unread)
        for headers in read_in_processes(folder, [files[number] for number in unread], mode, options):
            yield from zip(islice(numbered, len(headers)), headers, strict=True)
            bar.update(len(headers))


def examine_sources(
    count: int, source: Callable[[int], Source], mode: Mode, options: DataConfig, *, decode_all: bool
) -> ExaminedSources:
    """Do the same for images that are part of a larger file.

    Args:
        count: number of images.
        source: returns the encoded image of a number.
        mode: mode of the decoded images.
        options: how images are read.
        decode_all: decode all images, regardless of their number.
    """
    bad: dict[int, DataError] = {}
    headers: dict[int, Header] = {}
    for number, header in each(range(count), lambda number: inspect(source(number), mode, options), "checking images"):
        if isinstance(header, DataError):
            bad[number] = header
        else:
            headers[number] = header
    pixels = sum(header.width * header.height for header in headers.values())
    if decode_all or (count <= DECODED_FILES and pixels <= DECODED_PIXELS):
        decoded = each(list(headers), lambda number: check_whole(source(number), mode, options), "decoding images")
        bad |= {number: error for number, error in decoded if error is not None}
    return ExaminedSources(source, count, headers, bad)


def check_sources(examined: ExaminedSources, kept: IntArray, options: DataConfig, summary: Summary) -> Checked:
    """Count the traits of the images that are used; arguments as of `check_files`."""
    _count_left_out(examined, kept, options, summary)
    headers = [examined.headers[number] for number in kept.tolist()]
    for header in headers:
        summary.add(header.width, header.height, header.traits)
    if options.value_range is None:
        deep = [number for number in kept.tolist() if "deep" in examined.headers[number].traits]
        summary.remarks += _remarks_on_range([examined.source(number) for number in deep], options)
    sizes = np.array([(header.height, header.width) for header in headers], np.int64).reshape(-1, 2)
    return Checked(kept, sizes, [], _sha256(np.array([header.digest for header in headers], np.uint64)))


def _count_left_out(examined: Findings, kept: IntArray, options: DataConfig, summary: Summary) -> None:
    bad = len(examined.bad)
    summary.left_out += Counter({"unreadable": bad})
    summary.left_out += Counter({f"with an unreadable {options.counterpart}": examined.count - len(kept) - bad})


def each(
    items: Sequence[Item], work: Callable[[Item], Result], title: str
) -> Iterator[tuple[Item, Result | DataError]]:
    """Call a function on each item in threads; yield the results, or errors, in the order of the items."""

    def several(task: Sequence[Item]) -> list[Result | DataError]:
        results: list[Result | DataError] = []
        for item in task:
            try:
                results.append(work(item))
            except DataError as error:
                results.append(DataError(str(error)))  # without the traceback, which references the image
        return results

    tasks = [items[start : start + FILES_PER_TASK] for start in range(0, len(items), FILES_PER_TASK)]
    threads = ThreadPoolExecutor(THREADS, thread_name_prefix="check")
    try:
        with _bar(title, len(items)) as bar:
            for task, results in zip(tasks, threads.map(several, tasks), strict=True):
                yield from zip(task, results, strict=True)
                bar.update(len(task))
    finally:
        threads.shutdown(cancel_futures=True)  # after Ctrl-C, do not wait for the other tasks


def _bar(title: str, total: int) -> tqdm[Any]:
    return tqdm(total=total, desc=title, unit="file", delay=BAR_DELAY_SECONDS, leave=False)


def readable(examined: Findings, options: DataConfig) -> IntArray:
    """Return the numbers of the readable images, ascending; report the others.

    Raises:
        DataError: images cannot be read, and are not to be skipped, or all cannot be read.
    """
    bad, count = examined.bad, examined.count
    errors = list(bad.values())
    if bad and (options.unreadable == "fail" or len(bad) == count):
        raise DataError(_describe_bad(errors, count))
    if bad:
        warn(_list_of_bad(f"{len(bad):,} of {count:,} images cannot be read and are skipped:", errors))
    return _others(bad, count)


def readable_pairs(images: Findings, conditions: Findings) -> IntArray:
    """Return the numbers of the pairs of which both images are readable, ascending; report the others.

    Raises:
        DataError: there is no such pair.
    """
    count = images.count
    bad = sorted({*images.bad, *conditions.bad})
    errors = [_error_of_pair(number, images, conditions) for number in bad]
    if len(bad) == count:
        raise DataError(_list_of_bad(f"{len(bad):,} of {count:,} pairs cannot be read; repair or remove them:", errors))
    if bad:
        title = f"{len(bad):,} of {count:,} pairs are skipped, because one of their images cannot be read:"
        warn(_list_of_bad(title, errors))
    return _others(bad, count)


def _error_of_pair(number: int, images: Findings, conditions: Findings) -> DataError:
    """Return the error of an unreadable pair, which names both of its files."""
    if number not in conditions.bad:
        return DataError(f"{images.bad[number]} (its conditioning image: {conditions.name_of(number)})")
    if number not in images.bad:
        return DataError(f"{conditions.bad[number]} (the conditioning image of {images.name_of(number)})")
    return DataError(f"{images.bad[number]}; its conditioning image: {conditions.bad[number]}")


def _others(bad: Iterable[int], count: int) -> IntArray:
    return np.setdiff1d(np.arange(count), np.array(sorted(bad), np.int64))


def _sha256(digests: npt.NDArray[np.uint64]) -> str:
    return hashlib.sha256(digests.astype("<u8").tobytes()).hexdigest()


def _save(index: Index, path: Path) -> None:
    try:
        index.save(path)
    except OSError as error:
        warn(f"the index of the files cannot be kept for the next start, {error.filename}: {error.strerror}")


def _remarks_on_range(deep: Sequence[Source], options: DataConfig) -> list[str]:
    """Return a remark if images of more than 8 bits use a small part of their range: 12-bit data look nearly black."""
    looked_at = [highest_grey(source) for source in deep[:: max(1, len(deep) // DEEP_FILES_LOOKED_AT)]]
    if not looked_at:
        return []
    highest, white = (max(values) for values in zip(*looked_at, strict=True))
    bits = max(8, highest.bit_length())
    if bits > white.bit_length() - DARK_BITS:
        return []
    return [
        f"{len(looked_at)} images of more than 8 bits were sampled and reach {highest} of {white}, which is dark: "
        f"--set {options.range_field}=0,{2**bits - 1} makes {2**bits - 1} white"
    ]


def _describe_bad(errors: Sequence[DataError], count: int) -> str:
    skip = "" if len(errors) == count else ", or leave out such files with --set data.unreadable=skip"
    if len(errors) == 1:
        return f"{errors[0]}; repair or remove it (the other files, {count - 1:,}, can be read){skip}"
    return _list_of_bad(f"{len(errors):,} of {count:,} images cannot be read; repair or remove them{skip}:", errors)


def _list_of_bad(title: str, errors: Sequence[DataError]) -> str:
    lines = [str(error) for error in errors[:BAD_FILES_SHOWN]]
    if len(errors) > BAD_FILES_SHOWN:
        lines.append(f"and {len(errors) - BAD_FILES_SHOWN} more")
    return "\n  ".join([title, *lines])
