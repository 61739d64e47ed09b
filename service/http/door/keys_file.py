"""Change a keys file atomically, one process at a time; its mode, owner and links are preserved."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from service.errors import KeysError
from service.http.door.keys import ApiKey, is_absent_or_empty, keys_text, read_keys

LOCK_WAIT_S = 30.0
LOCK_POLL_S = 0.05
ACL = "system.posix_acl_access"


def add_key(path: Path, added: ApiKey, show: Callable[[], None]) -> None:
    """Add a key to a file, which is created if it does not exist.

    Args:
        path: the keys file.
        added: the record of the key.
        show: shows the key itself, which is stored nowhere; if it raises, the file is not changed.

    Raises:
        KeysError: a key with that name exists, or the file cannot be changed.
    """
    with _locked(path):
        known = () if is_absent_or_empty(path) else read_keys(path)
        if any(added.name == key.name for key in known):
            raise KeysError(
                f"{path} already has a key with the name {added.name}: remove it first, or choose another name"
            )
        write_keys(path, [*known, added], before_replacing=show)


def remove_key(path: Path, name: str) -> None:
    """Remove a key from a file.

    Raises:
        KeysError: there is no key with that name, or the file cannot be changed.
    """
    with _locked(path):
        known = read_keys(path)
        kept = [key for key in known if key.name != name]
        if len(kept) == len(known):
            raise KeysError(f"{path} has no key with the name {name}")
        write_keys(path, kept)


def write_keys(path: Path, keys: Sequence[ApiKey], before_replacing: Callable[[], None] = lambda: None) -> None:
    """Replace a keys file atomically: concurrent readers see the old or the new file.

    If the path is a link, its target is replaced. Mode, owner, group and access control list are preserved.

    Args:
        path: the keys file.
        keys: the new content.
        before_replacing: called when the new file is ready; if it raises, the old file is not changed.

    Raises:
        KeysError: the file cannot be written, or its owner cannot be preserved.
    """
    target = _target(path)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        with _as_keys_errors(target):
            _write_beside(temporary, target, keys_text(keys))
        before_replacing()
        with _as_keys_errors(target):
            temporary.replace(target)
    finally:
        with suppress(OSError):  # it was renamed, or not created
            temporary.unlink()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Exclude other `iddpm keys` processes. The lock is on the folder, because the file itself is replaced."""
    folder = _target(path).parent
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise KeysError(f"{folder}: {error.strerror}") from error
    try:
        with _as_keys_errors(path):
            _wait_for_lock(path, descriptor)
        yield
    finally:
        os.close(descriptor)


def _wait_for_lock(path: Path, descriptor: int) -> None:
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise KeysError(f"{path}: another process has locked its folder for {LOCK_WAIT_S:g} s") from error
            time.sleep(LOCK_POLL_S)
        else:
            return


def _target(path: Path) -> Path:
    """Return the path with all links resolved; the file need not exist."""
    return Path(os.path.realpath(path))


def _write_beside(temporary: Path, target: Path, text: str) -> None:
    """Write the new file with the owner and permissions of the old one."""
    with temporary.open("x", encoding="utf-8") as file:
        with suppress(FileNotFoundError):
            _protect_alike(file.fileno(), target, target.stat())
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _protect_alike(descriptor: int, target: Path, old: os.stat_result) -> None:
    if not stat.S_ISREG(old.st_mode):
        raise KeysError(f"{target} is not a regular file")
    if old.st_nlink > 1:
        raise KeysError(
            f"{target} has {old.st_nlink} names (hard links), of which one would change: remove the others, or make "
            "them symbolic links"
        )
    new = os.fstat(descriptor)
    if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        try:
            os.chown(descriptor, old.st_uid, old.st_gid)
        except OSError as error:
            raise KeysError(
                f"{target} belongs to user {old.st_uid} and group {old.st_gid}, which user {os.geteuid()} cannot keep "
                f"when it changes the file: run this as root, or as user {old.st_uid} in group {old.st_gid}"
            ) from error
    if sys.platform == "linux":
        _copy_acl(descriptor, target)
    os.chmod(descriptor, stat.S_IMODE(old.st_mode))


def _copy_acl(descriptor: int, target: Path) -> None:
    """Copy the access control list of the old file; without one, remove the list inherited from the folder."""
    try:
        os.setxattr(descriptor, ACL, os.getxattr(target, ACL))
    except OSError as error:
        if error.errno == errno.ENODATA:
            with suppress(OSError):
                os.removexattr(descriptor, ACL)
        elif error.errno != errno.ENOTSUP:
            raise


@contextmanager
def _as_keys_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        cure = {
            errno.EACCES: f"; user {os.geteuid()} must be able to write into the folder {path.parent}",
            errno.EBUSY: "; mount its folder rather than the file itself",
        }.get(error.errno or 0, "")
        raise KeysError(f"{path} cannot be changed: {error.strerror}{cure}") from error
