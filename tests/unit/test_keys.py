"""Keys files: only hashes are kept, changes are noticed, damage locks nobody out and lets nobody in."""

from __future__ import annotations

import json
import logging
import traceback
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from service.api.app import create_app
from service.api.keys import ApiKey, KeyRing, Limits, hash_of, new_key, read_keys, write_keys
from service.api.rates import RequestRates
from service.errors import KeysError
from service.settings import Settings


def entry(name: str, key: str, limits: Limits | None = None) -> ApiKey:
    return ApiKey(name=name, sha256=hash_of(key), limits=limits or Limits())


def test_a_file_keeps_names_hashes_and_limits_and_no_key(tmp_path: Path) -> None:
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
        ("", "Invalid JSON"),
        ("[]", "Input should be an object"),
        ('{"keys": [{"name": "a", "sha256": "abc"}]}', "keys.0.sha256"),
        ('{"keys": [{"name": "a b", "sha256": "' + "0" * 64 + '"}]}', "keys.0.name"),
        (
            '{"keys": [{"name": "a", "sha256": "' + "0" * 64 + '", "limits": {"images": 1}}]}',
            "keys.0.limits: has an unknown field",
        ),
        ('{"keys": [' + ", ".join(['{"name": "a", "sha256": "' + "0" * 64 + '"}'] * 2) + "]}", "twice here: a"),
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
def test_a_key_in_a_damaged_file_is_told_to_nobody(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    path, secret = tmp_path / "keys.json", new_key()
    write_keys(path, [])
    ring = KeyRing(path)
    path.write_text(text.replace("SECRET", secret))
    with caplog.at_level(logging.DEBUG):
        ring.find("")
    listed = CliRunner().invoke(app, ["keys", "list", "--file", str(path)])
    with pytest.raises(KeysError) as error:
        read_keys(path)
    for told in (caplog.text, listed.output, "".join(traceback.format_exception(error.value))):
        assert "keys.json" in told
        assert secret not in told


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
def test_a_file_that_is_damaged_later_leaves_the_last_keys_in_force(
    tmp_path: Path, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    path, key = tmp_path / "keys.json", new_key()
    write_keys(path, [entry("alice", key)])
    ring = KeyRing(path)
    assert callable(damage)
    damage(path)
    with caplog.at_level(logging.ERROR):
        assert [ring.find(key) is None, ring.find(new_key()) is None] == [False, True]
    assert len(caplog.records) == 1  # said once, not with every request
    write_keys(path, [])
    assert ring.find(key) is None


def test_a_rate_lets_a_minute_s_requests_through_at_once_and_then_evenly() -> None:
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


def test_the_command_prints_a_key_once_and_a_service_would_know_it(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    run = CliRunner()
    added = run.invoke(app, ["keys", "add", "alice", "--file", str(path), "--images-in-flight", "8"])
    assert added.exit_code == 0, added.output
    key = added.stdout.strip()
    assert KeyRing(path).find(key) == entry("alice", key, Limits(images_in_flight=8))

    again = run.invoke(app, ["keys", "add", "alice"], env={"IDDPM_KEYS_FILE": str(path)})
    assert again.exit_code == 1
    assert "has a key of the name alice" in again.output
    assert run.invoke(app, ["keys", "add", "a b", "--file", str(path)]).exit_code == 2
    listed = run.invoke(app, ["keys", "list", "--file", str(path)])
    assert listed.stdout.split() == ["alice", hash_of(key)[:12], "images_in_flight=8"]

    assert run.invoke(app, ["keys", "remove", "bob", "--file", str(path)]).exit_code == 1
    assert run.invoke(app, ["keys", "remove", "alice", "--file", str(path)]).exit_code == 0
    assert KeyRing(path).find(key) is None


def test_a_file_in_no_folder_ends_the_command_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in ("file", "nowhere"):
        ended = CliRunner().invoke(app, ["keys", "add", "alice", "--file", str(tmp_path / folder / "keys.json")])
        assert (ended.exit_code, ended.stdout) == (1, "")
        assert ended.stderr.strip().endswith(("keys.json: Not a directory", "keys.json: No such file or directory"))


def test_a_bad_keys_file_ends_the_service_before_a_model_is_looked_at(tmp_path: Path) -> None:
    with pytest.raises(KeysError, match=r"keys\.json: No such file"):
        create_app(Settings(models=(tmp_path / "nowhere",), keys_file=tmp_path / "keys.json"))
