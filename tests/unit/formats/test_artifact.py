"""The artifact folder: damaged, foreign or unverified files are refused, with the file and the rule in the message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffusion.config import ClassifierCheckpointConfig, ClassifierConfig, DiffusionConfig
from formats.artifact import (
    GRADIENT_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    TIME_MLP_FILE,
    ArtifactError,
    BandError,
    ChainParity,
    Manifest,
    NetworkParity,
    failures,
    file_entry,
    find_artifact,
    graph_inputs,
    manifest_json,
    read_artifact,
)
from formats.checkpoint_config import checkpoint_sha256
from formats.precision import Precision
from tests.fakes import tiny_checkpoint, tiny_config

NAN = float("nan")


def parity(*errors: float, precision: Precision = "fp32", file: str = MODEL_FILE, limit: float = 1e-4) -> NetworkParity:
    """Report one band for each error."""
    bands = tuple(BandError(t_min=k, t_max=k, prediction=error, variance=0.0) for k, error in enumerate(errors))
    return NetworkParity(backend="openvino 1.2", precision=precision, file=file, limit=limit, bands=bands)


def chain(beyond_2: float, limit: float | None = 1e-3) -> ChainParity:
    return ChainParity(
        backend="openvino 1.2",
        precision="fp32",
        steps=50,
        images=4,
        beyond_1=beyond_2,
        beyond_2=beyond_2,
        beyond_4=0,
        limit=limit,
    )


def write_fake(folder: Path, checkpoint_hash: str = "0" * 64) -> Path:
    """Write an artifact of files that no runtime reads, with a manifest that matches them."""
    folder.mkdir(parents=True)
    (folder / MODEL_FILE).write_bytes(b"a graph of some length")
    (folder / TIME_MLP_FILE).write_bytes(b"weights")
    manifest = Manifest(
        checkpoint=tiny_config(),
        checkpoint_sha256=checkpoint_hash,
        opset=22,
        buckets=(1, 2, 8),
        files={name: file_entry(folder / name) for name in (MODEL_FILE, TIME_MLP_FILE)},
        parity=(parity(1e-6, 2e-6), parity(0.2, precision="bf16")),
        chains=(chain(0.0),),
    )
    (folder / MANIFEST_FILE).write_text(manifest_json(manifest), encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_fake(tmp_path / "made")


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / MANIFEST_FILE
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def keep_weights_in(folder: Path, name: str) -> None:
    """Replace the graph by one that keeps its weights in a file of the folder."""
    onnx: Any = pytest.importorskip("onnx")
    weights = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [1000], bytes(4000), raw=True)
    onnx.external_data_helper.set_external_data(weights, name)
    weights.ClearField("raw_data")
    graph = onnx.helper.make_graph([], "g", [], [], [weights])
    (folder / MODEL_FILE).write_bytes(onnx.helper.make_model(graph).SerializeToString())
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(bytes(4000))
    entry = file_entry(folder / MODEL_FILE).model_dump()
    change(folder, lambda manifest: manifest["files"].update({MODEL_FILE: entry}))


@pytest.mark.parametrize("name", ["model.onnx.data", "weights/w.bin", "w" * 200])
def test_weights_outside_of_the_graph_must_be_listed(folder: Path, name: str) -> None:
    keep_weights_in(folder, name)
    with pytest.raises(ArtifactError, match=r"model\.onnx keeps weights in '.*', which manifest\.json does not list"):
        read_artifact(folder)


def test_listed_weights_outside_of_the_graph_are_checked(folder: Path) -> None:
    keep_weights_in(folder, "model.onnx.data")
    entry = file_entry(folder / "model.onnx.data").model_dump()
    change(folder, lambda manifest: manifest["files"].update({"model.onnx.data": entry}))
    read_artifact(folder)
    (folder / "model.onnx.data").write_bytes(bytes(3999) + b"x")
    with pytest.raises(ArtifactError, match=r"model\.onnx\.data does not match manifest\.json"):
        read_artifact(folder)


def test_a_valid_folder_survives_a_round_trip(folder: Path) -> None:
    manifest = read_artifact(folder)
    assert manifest.checkpoint == tiny_config()
    assert (manifest.buckets, manifest.precision, sorted(manifest.files)) == (
        (1, 2, 8), "fp32", [MODEL_FILE, TIME_MLP_FILE],
    )  # fmt: skip
    assert manifest.parity[0].worst == 2e-6
    assert manifest_json(manifest) == (folder / MANIFEST_FILE).read_text(encoding="utf-8")


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


@pytest.mark.parametrize("name", [MODEL_FILE, TIME_MLP_FILE])
@pytest.mark.parametrize(
    ("damage", "rule"),
    [
        (_flip, r"does not match manifest\.json: its sha256 differs"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"bytes instead of \d+: it is damaged"),
        (Path.unlink, r"is missing or not a regular file; export the checkpoint again"),
        (_link, r"is missing or not a regular file"),
        (lambda path: (path.unlink(), path.mkdir()), r"is missing or not a regular file"),
    ],
    ids=["flipped", "truncated", "missing", "symlink", "folder"],
)
def test_a_changed_file_is_refused(folder: Path, name: str, damage: Callable[[Path], object], rule: str) -> None:
    damage(folder / name)
    with pytest.raises(ArtifactError, match=f"{name} .*{rule}"):
        read_artifact(folder)


@pytest.mark.parametrize(
    ("edit", "rule"),
    [
        (lambda m: m.update(colour="red"), r"colour: .*not permitted"),
        (lambda m: m.update(format_version=2), "format_version must be 1; got 2"),
        (lambda m: m.update(format_version="1"), "format_version must be 1; got '1'"),
        (lambda m: m.update(parity=[]), "parity: .*at least 1"),
        (lambda m: m["parity"][0].update(bands=[]), r"parity\.0\.bands: .*at least 1"),
        (lambda m: m.update(buckets=[]), "buckets: .*at least 1"),
        (lambda m: m.update(buckets=[2, 1]), r"buckets must be ascending and at least 1; got \[2, 1\]"),
        (lambda m: m.update(buckets=[0, 1]), "buckets must be ascending and at least 1"),
        (lambda m: m.update(buckets=[1, 1]), "buckets must be ascending"),
        (lambda m: m.update(precision="int8"), "precision: "),
        (lambda m: m.update(checkpoint_sha256="abc"), "checkpoint_sha256: "),
        (lambda m: m["files"].pop(MODEL_FILE), r"files must list model\.onnx"),
        (lambda m: m["files"].pop(TIME_MLP_FILE), r"files must list time_mlp\.npz"),
        (lambda m: m["files"][MODEL_FILE].update(size=-1), r"files\.model\.onnx\.size: "),
        (lambda m: m["checkpoint"].pop("kind"), "checkpoint: "),
        (lambda m: m["checkpoint"]["model"].update(colour="red"), r"colour: "),
    ],
)
def test_the_error_for_an_invalid_manifest_names_the_field_and_the_rule(
    folder: Path, edit: Callable[[dict[str, Any]], object], rule: str
) -> None:
    change(folder, edit)
    with pytest.raises(ArtifactError, match=rf"manifest\.json: .*{rule}"):
        read_artifact(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sub/file", "..", ".", "", "..\\secret", "a/../b"])
def test_names_outside_the_folder_are_refused(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_bytes(b"weights")
    change(folder, lambda m: m["files"].update({name: m["files"][TIME_MLP_FILE]}))
    with pytest.raises(ArtifactError, match="files must be plain names inside the folder; got "):
        read_artifact(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"null", b'"text"'])
def test_a_manifest_other_than_a_json_object_is_refused(folder: Path, content: bytes) -> None:
    (folder / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"manifest\.json( is empty| is not valid JSON| must hold a JSON object)"):
        read_artifact(folder)


def test_a_folder_without_a_manifest_is_refused(folder: Path) -> None:
    (folder / MANIFEST_FILE).unlink()
    for place in (folder, folder / "nowhere", folder / MODEL_FILE):
        with pytest.raises(ArtifactError, match=r"is not an artifact folder: it has no manifest\.json"):
            read_artifact(place)


@pytest.mark.parametrize("error", [2e-4, NAN, float("inf")])
@pytest.mark.parametrize("band", [0, 1])
@pytest.mark.parametrize("half", ["prediction", "variance"])
def test_parity_outside_its_limit_is_refused(folder: Path, error: float, band: int, half: str) -> None:
    change(folder, lambda m: m["parity"][0]["bands"][band].update({half: error}))
    with pytest.raises(ArtifactError, match=r"manifest\.json: parity of openvino 1\.2 is outside its limit; export"):
        read_artifact(folder)


def test_chains_outside_their_limit_are_refused(folder: Path) -> None:
    change(folder, lambda m: m["chains"][0].update(beyond_2=0.5))
    with pytest.raises(ArtifactError, match="outside its limit"):
        read_artifact(folder)


def test_limits_apply_to_the_graph_s_own_precision_and_to_a_gradient_s_float32() -> None:
    good, bad = parity(0.0), parity(1.0)
    low = parity(1.0, precision="bf16")
    gradient = parity(1.0, file=GRADIENT_FILE)
    assert failures("fp32", [good, low], [chain(1.0, limit=None)]) == []
    assert failures("fp32", [good, bad], [chain(1.0)]) == [bad, chain(1.0)]
    assert failures("bf16", [bad, low], []) == [low]
    assert failures("bf16", [gradient], []) == failures("fp32", [gradient], []) == [gradient]
    assert failures("fp32", [parity(1.0, precision="bf16", file=GRADIENT_FILE)], []) == []


def test_a_classifier_s_artifact_has_its_gradient(folder: Path) -> None:
    config = ClassifierCheckpointConfig(
        model=ClassifierConfig(
            image_size=8,
            model_channels=32,
            channel_mult=(1,),
            attention_resolutions=(),
            num_classes=3,
            pool="adaptive",
        ),
        diffusion=DiffusionConfig(),
    )
    change(folder, lambda m: m.update(checkpoint=config.model_dump(mode="json")))
    with pytest.raises(ArtifactError, match=r"files must list gradient\.onnx"):
        read_artifact(folder)
    (folder / GRADIENT_FILE).write_bytes(b"a gradient")
    change(folder, lambda m: m["files"].update({GRADIENT_FILE: file_entry(folder / GRADIENT_FILE).model_dump()}))
    with pytest.raises(ArtifactError, match=r"gradient\.onnx was not compared with PyTorch"):
        read_artifact(folder)
    change(folder, lambda m: m["parity"].append(parity(1e-6, file=GRADIENT_FILE).model_dump(mode="json")))
    assert read_artifact(folder).checkpoint.kind == "classifier"


def test_an_artifact_inside_a_checkpoint_is_that_checkpoint_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    own = write_fake(checkpoint / "artifact", checkpoint_sha256(checkpoint))
    assert read_artifact(own).checkpoint_sha256 == checkpoint_sha256(checkpoint)

    change(own, lambda m: m.update(checkpoint_sha256="1" * 64))
    rule = r"was exported from another checkpoint \(111111111111\.\.\.\) than the one in .*tiny .*export it again"
    with pytest.raises(ArtifactError, match=rule):
        read_artifact(own)
    monkeypatch.chdir(own)
    with pytest.raises(ArtifactError, match=rule):
        read_artifact(Path())
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"it has no model\.safetensors"):
        read_artifact(own)


def test_an_artifact_of_another_checkpoint_is_detected_through_links_and_beside_it(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    elsewhere = write_fake(tmp_path / "export", "1" * 64)
    (checkpoint / "artifact").symlink_to(elsewhere)
    with pytest.raises(ArtifactError, match="was exported from another checkpoint"):
        read_artifact(checkpoint / "artifact")
    assert read_artifact(elsewhere).checkpoint_sha256 == "1" * 64
    for file in elsewhere.iterdir():
        file.rename(checkpoint / file.name)
    with pytest.raises(ArtifactError, match="was exported from another checkpoint"):
        read_artifact(checkpoint)


def test_a_manifest_must_describe_the_model_of_its_checkpoint(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    own = write_fake(checkpoint / "artifact", checkpoint_sha256(checkpoint))
    change(own, lambda m: m["checkpoint"]["diffusion"].update(num_timesteps=500))
    with pytest.raises(ArtifactError, match=r"manifest\.json describes another model than .*tiny; export it again"):
        read_artifact(own)


def test_a_graph_without_parity_in_its_precision_is_refused(folder: Path) -> None:
    change(folder, lambda m: m.update(parity=m["parity"][1:]))
    with pytest.raises(ArtifactError, match=r"model\.onnx was not compared with PyTorch"):
        read_artifact(folder)


@pytest.mark.parametrize(
    ("changes", "inputs", "found"),
    [
        ({"low_res_size": 4}, [], "not recorded"),
        ({"low_res_size": 4}, ["x_t", "emb_t", "y", "low_res"], "x_t, emb_t, y, low_res"),
        ({"cond_channels": 2}, ["x_t", "emb_t", "y"], "x_t, emb_t, y"),
    ],
)
def test_a_graph_with_other_inputs_is_refused_with_the_command_that_exports_it_again(
    tmp_path: Path, changes: dict[str, int], inputs: list[str], found: str
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny", **changes)
    own = write_fake(checkpoint / "artifact", checkpoint_sha256(checkpoint))
    config = tiny_config(**changes)
    change(own, lambda m: m.update(checkpoint=config.model_dump(mode="json"), inputs=inputs))
    with pytest.raises(ArtifactError) as refused:
        read_artifact(own)
    assert str(refused.value).endswith(
        f"the inputs of model.onnx must be x_t, emb_t, y, cond; they are {found}; "
        f"export it again with: iddpm export {checkpoint} {own}"
    )
    change(own, lambda m: m.update(inputs=["x_t", "emb_t", "y", "cond"]))
    assert read_artifact(own).inputs == graph_inputs(config)


def test_artifacts_without_a_record_of_inputs_are_read_unless_they_are_upsamplers(folder: Path) -> None:
    assert read_artifact(folder).inputs == ()
    cond = tiny_config(cond_channels=2).model_dump(mode="json")
    change(folder, lambda m: m.update(checkpoint=cond))
    assert read_artifact(folder).inputs == ()


def test_an_artifact_elsewhere_needs_no_checkpoint(tmp_path: Path) -> None:
    assert read_artifact(write_fake(tmp_path / "artifact")).checkpoint_sha256 == "0" * 64
    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    assert read_artifact(write_fake(checkpoint / "another name")).checkpoint_sha256 == "0" * 64


def test_an_artifact_is_found_as_the_folder_itself_or_inside_it(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    assert find_artifact(checkpoint) is None
    assert find_artifact(tmp_path / "nowhere") is None
    inside = checkpoint / "artifact"
    inside.mkdir()
    assert find_artifact(checkpoint) is None
    inside.rmdir()
    write_fake(inside)
    assert find_artifact(checkpoint) == inside
    assert find_artifact(inside) == inside


def test_parity_is_found_by_runtime_and_precision(folder: Path) -> None:
    manifest = read_artifact(folder)
    assert manifest.parity_of("openvino", "fp32") == manifest.parity[0]
    assert manifest.parity_of("openvino", "bf16") == manifest.parity[1]
    assert manifest.parity_of("open", "fp32") is None
    assert manifest.parity_of("onnxruntime", "fp32") is None
