"""Engine files: their names, and the reasons for refusing them. No test here uses TensorRT."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from formats.artifact import FileEntry, Manifest
from formats.tensorrt_files import (
    EngineRecord,
    EngineRejected,
    Target,
    Wanted,
    engine_folder,
    entry_of,
    graph_sha256,
    read_engine,
    record_parity,
    refusal,
    unusable_engines,
    write_engine,
)
from formats.tensorrt_package import EngineError, installed_flavour
from tests.fakes import tiny_config
from tests.tensorrt_fakes import TARGET, parity, wanted_of, write_artifact, write_fake_engine

RTX = Target(flavour="tensorrt_rtx", version="1.7.1.116", compute_capability="sm89")


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return tmp_path / "artifact"


@pytest.fixture
def manifest(artifact: Path) -> Manifest:
    return write_artifact(artifact, tiny_config())


@pytest.fixture
def wanted(manifest: Manifest) -> Wanted:
    return wanted_of(manifest)


def plan_path(artifact: Path, bucket: int = 2) -> Path:
    return engine_folder(artifact / "tensorrt", TARGET) / f"{bucket}.plan"


def test_a_folder_is_named_by_gpu_flavour_and_version() -> None:
    assert RTX.name == "sm89-rtx-1.7.1.116"
    assert TARGET.name == "nvidia-h200-sm90-10.99.0.1"
    odd = Target.of_device("tensorrt", "10.8.0", (12, 0), "../A (100) / 80GB")
    assert odd.name == "a-100-80gb-sm120-10.8.0"


def test_engines_of_rtx_are_for_a_compute_capability_and_others_for_a_gpu() -> None:
    assert Target.of_device("tensorrt_rtx", "1.7.1.116", (8, 9), "NVIDIA L40S") == RTX
    assert Target.of_device("tensorrt", "10.8", (8, 9), "NVIDIA L40S") != Target.of_device(
        "tensorrt", "10.8", (8, 9), "NVIDIA L4"
    )


@pytest.mark.parametrize("field", [{"version": "../../1"}, {"compute_capability": "89"}, {"flavour": "other"}])
def test_a_target_cannot_contain_a_path(field: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        RTX.replace(**field)


def test_the_hash_of_a_graph_includes_its_weights_file() -> None:
    graph, data = FileEntry(sha256="a" * 64, size=1), FileEntry(sha256="b" * 64, size=2)
    assert graph_sha256({"model.onnx": graph, "time_mlp.npz": data}) == graph.sha256
    with_data = graph_sha256({"model.onnx": graph, "model.onnx.data": data})
    assert with_data not in (graph.sha256, data.sha256)
    assert with_data != graph_sha256({"model.onnx": graph, "model.onnx.data": graph})


def test_an_engine_survives_a_round_trip(artifact: Path, manifest: Manifest, wanted: Wanted) -> None:
    record = write_fake_engine(artifact, manifest, 2)
    assert read_engine(artifact / "tensorrt", wanted, 2) == (record, plan_path(artifact).read_bytes())
    assert sorted(path.name for path in plan_path(artifact).parent.iterdir()) == ["2.json", "2.plan"]
    assert list(unusable_engines(artifact / "tensorrt", wanted, [1, 2, 4])) == [1, 4]


def test_a_record_of_another_plan_is_not_written(artifact: Path, manifest: Manifest) -> None:
    record = write_fake_engine(artifact, manifest, 2)
    with pytest.raises(EngineError, match="the record of bucket 2 describes another plan"):
        write_engine(artifact / "tensorrt", b"another", record)


def test_the_error_for_a_missing_engine_lists_existing_ones(artifact: Path, manifest: Manifest, wanted: Wanted) -> None:
    with pytest.raises(EngineError, match=r"nvidia-h200-sm90-10.99.0.1 has no engine for batches of 2$"):
        read_engine(artifact / "tensorrt", wanted, 2)
    write_fake_engine(artifact, manifest, 2)
    other = Wanted(RTX, wanted.precision, wanted.onnx_sha256)
    with pytest.raises(EngineError, match=r"the engines for nvidia-h200-sm90-10\.99\.0\.1 cannot"):
        read_engine(artifact / "tensorrt", other, 2)


def test_a_plan_without_a_record_is_refused(artifact: Path, manifest: Manifest, wanted: Wanted) -> None:
    write_fake_engine(artifact, manifest, 2)
    plan_path(artifact).with_suffix(".json").unlink()
    with pytest.raises(EngineError, match="has no engine for batches of 2"):
        read_engine(artifact / "tensorrt", wanted, 2)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda plan: plan[:-1], r"2\.plan has \d+ bytes instead of \d+: it is damaged"),
        (lambda plan: plan[:-1] + b"?", r"2\.plan is damaged or was replaced: its sha256"),
        (lambda plan: b"", r"2\.plan has 0 bytes instead of"),
        (None, r"2\.plan is missing, although 2\.json describes it"),
    ],
)
def test_a_damaged_plan_is_refused(
    artifact: Path, manifest: Manifest, wanted: Wanted, damage: object, reason: str
) -> None:
    write_fake_engine(artifact, manifest, 2)
    path = plan_path(artifact)
    if callable(damage):
        path.write_bytes(damage(path.read_bytes()))
    else:
        path.unlink()
    with pytest.raises(EngineError, match=reason):
        read_engine(artifact / "tensorrt", wanted, 2)
    assert list(unusable_engines(artifact / "tensorrt", wanted, [2])) == [2]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "2.json cannot be read"),
        ("[]", "2.json: "),
        ('{"bucket": 2}', "target: Field required"),
        ("\udcff", "2.json cannot be read"),
    ],
)
def test_a_damaged_record_is_refused(
    artifact: Path, manifest: Manifest, wanted: Wanted, text: str, reason: str
) -> None:
    write_fake_engine(artifact, manifest, 2)
    plan_path(artifact).with_suffix(".json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(EngineError, match=reason):
        read_engine(artifact / "tensorrt", wanted, 2)


def test_a_record_of_a_later_format_is_refused(artifact: Path, manifest: Manifest, wanted: Wanted) -> None:
    write_fake_engine(artifact, manifest, 2)
    path = plan_path(artifact).with_suffix(".json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 2}))
    with pytest.raises(EngineError, match="format_version"):
        read_engine(artifact / "tensorrt", wanted, 2)


def test_links_are_refused(artifact: Path, manifest: Manifest, wanted: Wanted, tmp_path: Path) -> None:
    write_fake_engine(artifact, manifest, 2)
    path = plan_path(artifact)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EngineError, match=r"2\.plan is a link; engines must be regular files"):
        read_engine(artifact / "tensorrt", wanted, 2)


def test_an_engine_moved_to_the_folder_of_another_gpu_is_refused(
    artifact: Path, manifest: Manifest, wanted: Wanted
) -> None:
    write_fake_engine(artifact, manifest, 2)
    plan_path(artifact).parent.rename(artifact / "tensorrt" / RTX.name)
    with pytest.raises(EngineError, match=r"was built for nvidia-h200-sm90-10\.99\.0\.1, and this is sm89-rtx-1\.7\."):
        read_engine(artifact / "tensorrt", Wanted(RTX, wanted.precision, wanted.onnx_sha256), 2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"target": TARGET.replace(version="10.98")}, "was built for nvidia-h200-sm90-10.98, and this is"),
        ({"target": TARGET.replace(gpu="NVIDIA H100")}, "was built for nvidia-h100-sm90-10.99.0.1, and this is"),
        ({"bucket": 4}, "was built for batches of 4"),
        ({"onnx_sha256": "f" * 64}, "is stale: it was built from another graph"),
        ({"precision": "bf16"}, "computes in bf16, and the artifact in fp32"),
        ({"parity": parity(0.02)}, None),
    ],
)
def test_the_error_names_the_difference(change: dict[str, object], reason: str | None) -> None:
    wanted = Wanted(TARGET, "fp32", "0" * 64)
    record = EngineRecord(
        target=TARGET, bucket=2, precision="fp32", onnx_sha256="0" * 64, plan=entry_of(b"plan"), workspace_bytes=0
    )
    found = refusal(record.replace(**change), wanted, 2)
    assert (found is None) == (reason is None)
    assert reason is None or (found is not None and found.startswith(reason))


def test_measured_parity_is_stored_and_checked(artifact: Path, manifest: Manifest, wanted: Wanted) -> None:
    record = write_fake_engine(artifact, manifest, 2)
    record_parity(artifact / "tensorrt", wanted, 2, parity(0.001))
    assert read_engine(artifact / "tensorrt", wanted, 2)[0] == record.replace(parity=parity(0.001))
    record_parity(artifact / "tensorrt", wanted, 2, parity(0.1))
    with pytest.raises(EngineRejected, match=r"too far from PyTorch: relative error 1\.0e-01, limit 1\.0e-02; iddpm"):
        read_engine(artifact / "tensorrt", wanted, 2)
    content = plan_path(artifact).read_bytes()
    plan_path(artifact).write_bytes(content[:-1] + b"?")
    with pytest.raises(EngineError) as caught:
        read_engine(artifact / "tensorrt", wanted, 2)
    assert not isinstance(caught.value, EngineRejected)


def test_a_folder_called_tensorrt_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        (tmp_path / name).mkdir()
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [importlib.machinery.PathFinder])
    importlib.invalidate_caches()
    with pytest.raises(EngineError, match=r"not installed: pip install .* '\.\[tensorrt\]' .* or, .*-rtx\]'"):
        installed_flavour()
    (tmp_path / "tensorrt_rtx" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert installed_flavour() == "tensorrt_rtx"
