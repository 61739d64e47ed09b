"""Check every file of a data set before the first step, and report all unreadable ones at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from trainer.data.dataset import DataError
from trainer.data.image_file import Header, Mode, check_whole, highest_grey, inspect
from trainer.data.options import DataConfig
from trainer.data.summary import Summary

THREADS = 8
FILES_PER_TASK = 16
BAR_DELAY_SECONDS = 2
BAD_FILES_SHOWN = 20
DECODED_FILES, DECODED_PIXELS = 10_000, 200_000_000
"""A data set within both limits is decoded completely, which takes seconds."""
DEEP_FILES_LOOKED_AT = 16
"""Minimum number of files to sample; fewer than twice as many are sampled."""
DARK_BITS = 2
"""Images that leave this number of a file's bits unused are nowhere brighter than a quarter of white."""
Result = TypeVar("Result")


def check_files(
    folder: Path, files: Sequence[str], mode: Mode, options: DataConfig, summary: Summary, *, decode_all: bool
) -> None:
    """Read the header of every file, decode the files if requested or if that is quick, and count their traits.

    Args:
        folder: where the files are.
        files: paths below it.
        mode: mode of the decoded images.
        options: how files are read.
        summary: counts are added to it.
        decode_all: decode all files, regardless of their number.

    Raises:
        DataError: lists the files that cannot be read.
    """
    bad: dict[str, DataError] = {}
    deep: list[Path] = []
    pixels = 0

    def read_header(file: str) -> Header:
        return inspect(folder / file, mode, options)

    def read_whole(file: str) -> None:
        check_whole(folder / file, mode, options)

    for file, header in _each(files, read_header, "checking images"):
        if isinstance(header, DataError):
            bad[file] = header
            continue
        summary.add(*header)
        pixels += header.width * header.height
        if "deep" in header.traits:
            deep.append(folder / file)
    if decode_all or (len(files) <= DECODED_FILES and pixels <= DECODED_PIXELS):
        bad |= {file: error for file, error in _each(files, read_whole, "decoding images") if error is not None}
    if bad:
        raise DataError(_describe_bad(list(bad.values()), len(files)))
    if options.value_range is None:
        summary.remarks += _remarks_on_range(deep)


def _each(files: Sequence[str], work: Callable[[str], Result], title: str) -> Iterator[tuple[str, Result | DataError]]:
    """Call a function on each file in threads; yield the results in the order of the files."""

    def several(task: Sequence[str]) -> list[Result | DataError]:
        results: list[Result | DataError] = []
        for file in task:
            try:
                results.append(work(file))
            except DataError as error:
                results.append(DataError(str(error)))  # without the traceback, which references the image
        return results

    tasks = [files[start : start + FILES_PER_TASK] for start in range(0, len(files), FILES_PER_TASK)]
    with (
        ThreadPoolExecutor(THREADS, thread_name_prefix="check") as threads,
        tqdm(total=len(files), desc=title, unit="file", delay=BAR_DELAY_SECONDS, leave=False) as bar,
    ):
        for task, results in zip(tasks, threads.map(several, tasks), strict=True):
            yield from zip(task, results, strict=True)
            bar.update(len(task))


def _remarks_on_range(deep: Sequence[Path]) -> list[str]:
    """Return a remark if images of more than 8 bits use a small part of their range: 12-bit data look nearly black."""
    looked_at = [highest_grey(path) for path in deep[:: max(1, len(deep) // DEEP_FILES_LOOKED_AT)]]
    if not looked_at:
        return []
    highest, white = (max(values) for values in zip(*looked_at, strict=True))
    bits = max(8, highest.bit_length())
    if bits > white.bit_length() - DARK_BITS:
        return []
    return [
        f"{len(looked_at)} images of more than 8 bits were sampled and reach {highest} of {white}, which is dark: "
        f"--set data.value_range=0,{2**bits - 1} makes {2**bits - 1} white"
    ]


def _describe_bad(errors: Sequence[DataError], files: int) -> str:
    if len(errors) == 1:
        return f"{errors[0]}; repair or remove it (the other files, {files - 1:,}, can be read)"
    lines = [str(error) for error in errors[:BAD_FILES_SHOWN]]
    if len(errors) > BAD_FILES_SHOWN:
        lines.append(f"and {len(errors) - BAD_FILES_SHOWN} more")
    return "\n  ".join([f"{len(errors):,} of {files:,} image files cannot be read; repair or remove them:", *lines])
