"""Change a keys file: one process at a time, whole at every moment, with the mode, owner and links that it had."""

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
    """Add a key to a file, which is made if there is none.

    Args:
        path: the keys file.
        added: what is kept of the key.
        show: shows the key itself, which is kept nowhere; where it raises, the file stays as it is.

    Raises:
        KeysError: there is a key of that name, or the file cannot be changed.
    """
    with _locked(path):
        known = () if is_absent_or_empty(path) else read_keys(path)
        if any(added.name == key.name for key in known):
            raise KeysError(f"{path} has a key of the name {added.name}: remove it first, or choose another name")
        write_keys(path, [*known, added], before_replacing=show)


def remove_key(path: Path, name: str) -> None:
    """Remove a key from a file.

    Raises:
        KeysError: there is no key of that name, or the file cannot be changed.
    """
    with _locked(path):
        known = read_keys(path)
        kept = [key for key in known if key.name != name]
        if len(kept) == len(known):
            raise KeysError(f"{path} has no key of the name {name}")
        write_keys(path, kept)


def write_keys(path: Path, keys: Sequence[ApiKey], before_replacing: Callable[[], None] = lambda: None) -> None:
    """Write a keys file; a service that reads it meanwhile sees the old one or the new one.

    A link stays, and what it leads to is replaced. Mode, owner, group and access control list stay.

    Args:
        path: the keys file.
        keys: what it shall hold.
        before_replacing: called when the new file is ready; where it raises, the old file stays as it is.

    Raises:
        KeysError: it cannot be written, or not with the owner that it has.
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
        with suppress(OSError):  # it has its new name, or was never made
            temporary.unlink()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other `iddpm keys` from changing the file: locks its folder, since the file itself is replaced."""
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
    """Return the file that a path leads to through all links; it need not exist."""
    return Path(os.path.realpath(path))


def _write_beside(temporary: Path, target: Path, text: str) -> None:
    """Write the new file, as the one of its name is owned and protected."""
    with temporary.open("x") as file:
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
    """Give the new file the access control list of the old one, or none, whatever its folder hands down."""
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
