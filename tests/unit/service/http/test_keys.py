"""Keys files: only hashes are stored, changes are noticed, and a damaged file keeps the last keys in force."""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import struct
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.main import app
from service.errors import KeysError, ModelError
from service.http.app import create_app
from service.http.door import key_ring, keys_file
from service.http.door.key_ring import KeyRing
from service.http.door.keys import ApiKey, Limits, hash_of, new_key, read_keys
from service.http.door.keys_file import add_key, remove_key, write_keys
from service.http.door.rates import RequestRates
from service.settings import Settings
from tests.waiting import PATIENCE_S


def entry(name: str, key: str, limits: Limits | None = None) -> ApiKey:
    return ApiKey(name=name, sha256=hash_of(key), limits=limits or Limits())


def test_a_file_has_names_hashes_and_limits_and_no_key(tmp_path: Path) -> None:
    path, key = tmp_path / "keys.json", new_key()
    written = [entry("alice", key, Limits(images_in_flight=4)), entry("bob", new_key())]
    write_keys(path, written)
    assert read_keys(path) == tuple(written)
    assert key not in path.read_text()
    assert json.loads(path.read_text())["keys"][0]["limits"] == {"images_in_flight": 4}
    assert [file.name for file in tmp_path.iterdir()] == ["keys.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n", "is empty"),
        ("{", "Invalid JSON"),
        ("[]", "Input should be an object"),
        ('{"keys": [{"name": "a", "sha256": "abc"}]}', "keys.0.sha256"),
        ('{"keys": [{"name": "a b", "sha256": "' + "0" * 64 + '"}]}', "keys.0.name"),
        (
            '{"keys": [{"name": "a", "sha256": "' + "0" * 64 + '", "limits": {"images": 1}}]}',
            "keys.0.limits: has an unknown field",
        ),
        (
            '{"keys": [' + ", ".join(['{"name": "a", "sha256": "' + "0" * 64 + '"}'] * 2) + "]}",
            "names must differ; duplicates: a",
        ),
    ],
)
def test_a_damaged_file_is_refused_with_its_reason(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(text)
    with pytest.raises(KeysError, match=r"keys\.json") as error:
        KeyRing(path)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        '{"keys": [{"name": "alice", "sha256": "SECRET"}]}',
        '{"keys": [{"name": "SECRET ", "sha256": "abc"}]}',
        '{"keys": ["SECRET"]}',
        '{"keys": {"alice": "SECRET"}}',
        '{"SECRET": "alice"}',
        '{"keys": [{"name": "alice", "sha256": "SECRET"},]}',
        '{"keys": [{"name": "alice", "sha256": "SECRET"',
        "SECRET",
    ],
)
def test_a_key_in_a_damaged_file_is_never_shown(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    path, secret = tmp_path / "keys.json", new_key()
    write_keys(path, [])
    ring = KeyRing(path)
    path.write_text(text.replace("SECRET", secret))
    with caplog.at_level(logging.DEBUG):
        ring.find("")
    listed = CliRunner().invoke(app, ["keys", "list", "--file", str(path)])
    with pytest.raises(KeysError) as error:
        read_keys(path)
    for shown in (caplog.text, listed.output, "".join(traceback.format_exception(error.value))):
        assert "keys.json" in shown
        assert secret not in shown


def test_a_key_ring_follows_its_file(tmp_path: Path) -> None:
    path, first, second = tmp_path / "keys.json", new_key(), new_key()
    write_keys(path, [entry("alice", first)])
    ring = KeyRing(path)
    assert ring.find(first) == entry("alice", first)
    assert ring.find(second) is None
    assert ring.find("") is None
    write_keys(path, [entry("bob", second)])
    assert ring.find(second) == entry("bob", second)
    assert ring.find(first) is None


@pytest.mark.parametrize("damage", [lambda path: path.write_text("{"), lambda path: path.unlink()])
def test_the_last_keys_stay_in_force_if_the_file_is_damaged_later(
    tmp_path: Path, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    path, key = tmp_path / "keys.json", new_key()
    write_keys(path, [entry("alice", key)])
    ring = KeyRing(path)
    assert callable(damage)
    damage(path)
    with caplog.at_level(logging.ERROR):
        assert [ring.find(key) is None, ring.find(new_key()) is None] == [False, True]
    assert len(caplog.records) == 1  # logged once, not with every request
    write_keys(path, [])
    assert ring.find(key) is None


def test_an_unreadable_file_is_read_again_soon_and_the_log_names_the_keys_in_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, key, now = tmp_path / "keys.json", new_key(), 100.0
    write_keys(path, [entry("alice", key)])
    ring = KeyRing(path, clock=lambda: now)

    def unreadable(path: Path) -> tuple[ApiKey, ...]:
        raise KeysError(f"{path}: Permission denied")

    write_keys(path, [])  # an operator who removed the key expects it to be invalid
    with caplog.at_level(logging.ERROR), monkeypatch.context() as patch:
        patch.setattr(key_ring, "read_keys", unreadable)
        for _ in range(3):
            assert ring.find(key) is not None
            now += key_ring.RETRY_S
        now += key_ring.REMIND_S
        assert ring.find(key) is not None
    assert len(caplog.records) == 2  # once, and a reminder
    for record in caplog.records:
        assert "keys.json: Permission denied. Until it can be read, the keys read at 20" in record.getMessage()
    assert ring.find(key) is not None  # nothing has changed, and the next attempt is not due
    now += key_ring.RETRY_S
    assert ring.find(key) is None


def test_the_file_is_read_again_after_a_change_of_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.json"
    write_keys(path, [])
    ring = KeyRing(path, clock=lambda: 100.0)
    read: list[Path] = []

    def read_keys(path: Path) -> tuple[ApiKey, ...]:
        read.append(path)
        return ()

    monkeypatch.setattr(key_ring, "read_keys", read_keys)
    ring.find("")
    assert not read
    before = path.stat().st_ctime_ns
    while path.stat().st_ctime_ns == before:  # the clock of a file system may be coarse
        path.chmod(0o600)
    ring.find("")
    assert read == [path]


def test_a_file_without_keys_causes_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys.json"
    write_keys(path, [])
    with caplog.at_level(logging.WARNING):
        KeyRing(path)
    assert f"{path} holds no key: requests get 401 until iddpm keys add NAME --file {path}" in caplog.text


def nothing() -> None:
    """Show a key nowhere."""


def test_concurrent_additions_and_removals_of_keys_all_take_effect(tmp_path: Path) -> None:
    path, names = tmp_path / "keys.json", [f"key{number}" for number in range(16)]
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(lambda name: add_key(path, entry(name, new_key()), nothing), names))
        assert sorted(key.name for key in read_keys(path)) == sorted(names)
        list(pool.map(lambda name: remove_key(path, name), names[1:]))
    assert [key.name for key in read_keys(path)] == names[:1]
    assert [file.name for file in tmp_path.iterdir()] == ["keys.json"]


def test_a_folder_that_stays_locked_ends_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_file, "LOCK_WAIT_S", 0.0)
    path = tmp_path / "keys.json"

    def add_another() -> None:
        with pytest.raises(KeysError, match=r"keys\.json: another process has locked its folder for 0 s"):
            add_key(path, entry("bob", new_key()), nothing)

    add_key(path, entry("alice", new_key()), add_another)
    assert [key.name for key in read_keys(path)] == ["alice"]


def test_a_changed_file_keeps_its_mode_and_its_link(tmp_path: Path) -> None:
    path, link = tmp_path / "secrets" / "keys.json", tmp_path / "keys.json"
    path.parent.mkdir()
    path.touch()  # empty: made for its mode
    path.chmod(0o640)
    link.symlink_to("secrets/keys.json")
    before = os.umask(0o077)
    try:
        add_key(link, entry("alice", new_key()), nothing)
        add_key(link, entry("bob", new_key()), nothing)
        remove_key(link, "alice")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert link.readlink() == Path("secrets/keys.json")
    assert [key.name for key in read_keys(path)] == ["bob"]
    assert [file.name for file in path.parent.iterdir()] == ["keys.json"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_a_changed_file_keeps_its_owner_or_is_not_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.json"
    write_keys(path, [entry("alice", new_key()), entry("bob", new_key())])
    os.chown(path, 12345, 23456)
    remove_key(path, "alice")
    assert (path.stat().st_uid, path.stat().st_gid) == (12345, 23456)

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refuse)
    with pytest.raises(
        KeysError, match=r"belongs to user 12345 and group 23456, which user 0 cannot keep .*: run this as"
    ):
        remove_key(path, "bob")
    assert [key.name for key in read_keys(path)] == ["bob"]
    assert [file.name for file in tmp_path.iterdir()] == ["keys.json"]


def test_a_changed_file_keeps_its_access_control_list(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    write_keys(path, [entry("alice", new_key())])
    owner, user, group, mask, other = 1, 2, 4, 16, 32  # of acl_entry in linux/posix_acl_xattr.h: tag, rights, id
    no_id = 0xFFFFFFFF
    rights = [(owner, 6, no_id), (user, 4, 10001), (group, 0, no_id), (mask, 4, no_id), (other, 0, no_id)]
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *right) for right in rights)
    try:
        os.setxattr(path, keys_file.ACL, acl)
    except OSError as error:
        pytest.skip(f"this file system has no access control lists: {error}")
    remove_key(path, "alice")
    assert os.getxattr(path, keys_file.ACL) == acl


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.with_name("other").hardlink_to(path), "has 2 names"),
        (lambda path: (path.unlink(), path.symlink_to(os.devnull)), "is not a regular file"),
    ],
)
def test_a_file_that_cannot_be_replaced_alone_is_not_changed(tmp_path: Path, make: Any, message: str) -> None:
    path = tmp_path / "keys.json"
    write_keys(path, [])
    make(path)
    before = sorted(file.name for file in tmp_path.iterdir())
    with pytest.raises(KeysError, match=message):
        add_key(path, entry("alice", new_key()), nothing)
    assert sorted(file.name for file in tmp_path.iterdir()) == before


def test_a_key_that_cannot_be_shown_is_not_stored(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    command = [str(Path(sys.executable).with_name("iddpm")), "keys", "add", "alice", "--file", str(path)]
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=PATIENCE_S, check=False)
    message = "error: the key cannot be printed and was not stored: standard output: No space left on device\n"
    assert (ended.returncode, ended.stderr) == (1, message)
    assert not list(tmp_path.iterdir())


def test_a_rate_allows_a_minute_s_requests_at_once_and_then_evenly_spaced_ones() -> None:
    now = 100.0
    rates = RequestRates(clock=lambda: now)
    assert [rates.take("alice", 3) for _ in range(3)] == [0, 0, 0]
    assert rates.take("alice", 3) == pytest.approx(20)
    assert rates.take("bob", 3) == 0
    now += 19
    assert rates.take("alice", 3) == pytest.approx(1)
    now += 1
    assert [rates.take("alice", 3), rates.take("alice", 3)] == [0, pytest.approx(20)]
    now += 1e6
    assert [rates.take("alice", 3) for _ in range(4)] == [0, 0, 0, pytest.approx(20)]


def test_the_command_prints_a_key_once_and_a_service_accepts_it(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    run = CliRunner()
    added = run.invoke(app, ["keys", "add", "alice", "--file", str(path), "--images-in-flight", "8"])
    assert added.exit_code == 0, added.output
    key = added.stdout.strip()
    assert KeyRing(path).find(key) == entry("alice", key, Limits(images_in_flight=8))

    again = run.invoke(app, ["keys", "add", "alice"], env={"IDDPM_KEYS_FILE": str(path)})
    assert again.exit_code == 1
    assert "already has a key with the name alice" in again.output
    assert run.invoke(app, ["keys", "add", "a b", "--file", str(path)]).exit_code == 2
    listed = run.invoke(app, ["keys", "list", "--file", str(path)])
    assert listed.stdout.split() == ["alice", hash_of(key)[:12], "images_in_flight=8"]

    assert run.invoke(app, ["keys", "remove", "bob", "--file", str(path)]).exit_code == 1
    assert run.invoke(app, ["keys", "remove", "alice", "--file", str(path)]).exit_code == 0
    assert KeyRing(path).find(key) is None


def test_a_file_in_a_missing_folder_ends_the_command_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in ("file", "nowhere"):
        ended = CliRunner().invoke(app, ["keys", "add", "alice", "--file", str(tmp_path / folder / "keys.json")])
        assert (ended.exit_code, ended.stdout) == (1, "")
        assert ended.stderr.strip().endswith((f"{folder}: Not a directory", f"{folder}: No such file or directory"))


def test_an_invalid_keys_file_ends_the_service_before_a_model_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    for begin in ("keys.json: No such file or directory", "keys.json is empty"):
        with pytest.raises(KeysError) as raised:
            create_app(Settings(models=(tmp_path / "nowhere",), keys_file=path))
        assert str(raised.value) == f"{tmp_path}/{begin}; to add a key: iddpm keys add NAME --file {path}"
        path.touch()
    assert CliRunner().invoke(app, ["keys", "add", "alice", "--file", str(path)]).exit_code == 0
    with pytest.raises(ModelError):
        create_app(Settings(models=(tmp_path / "nowhere",), keys_file=path))
