from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion.config import (
    CheckpointConfig,
    ClassifierCheckpointConfig,
    ClassifierConfig,
    DiffusionConfig,
    ModelConfig,
)
from formats.checkpoint import (
    build_network,
    load_classifier,
    load_unet,
    read_weights,
    write_checkpoint,
)
from formats.checkpoint_config import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AnyCheckpointConfig,
    CheckpointError,
    checkpoint_sha256,
    read_config,
)

UNET_CONFIG = CheckpointConfig(
    model=ModelConfig(
        image_size=8,
        model_channels=32,
        channel_mult=(1, 1),
        num_res_blocks=1,
        attention_resolutions=(4,),
        num_classes=2,
    ),
    diffusion=DiffusionConfig(num_timesteps=10),
    class_names=("Öl", "water"),
    provenance={"command": "made in a test"},
)
CLASSIFIER_CONFIG = ClassifierCheckpointConfig(
    model=ClassifierConfig(
        image_size=8,
        model_channels=32,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(8,),
        num_head_channels=16,
        num_classes=2,
    ),
    diffusion=DiffusionConfig(num_timesteps=10, variance="fixed_large"),
)


def _weights(config: AnyCheckpointConfig = UNET_CONFIG, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = build_network(config).state_dict()
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    write_checkpoint(folder, UNET_CONFIG, _weights())
    return folder


def test_unet_survives_a_round_trip_and_is_ready_to_sample(folder: Path) -> None:
    config, network = load_unet(folder)

    assert config == UNET_CONFIG
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    state = network.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in _weights().items())


def test_classifier_survives_a_round_trip(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "clf", CLASSIFIER_CONFIG, _weights(CLASSIFIER_CONFIG))
    config, network = load_classifier(tmp_path / "clf")

    assert config == CLASSIFIER_CONFIG
    assert not network.training
    assert network(torch.zeros(3, 3, 8, 8), torch.zeros(3)).shape == (3, 2)
    with pytest.raises(CheckpointError, match="must hold a checkpoint of kind 'unet'; got 'classifier'"):
        load_unet(tmp_path / "clf")


def test_a_unet_is_refused_as_a_classifier(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="must hold a checkpoint of kind 'classifier'; got 'unet'"):
        load_classifier(folder)


def test_weights_of_any_type_are_stored_in_float32(tmp_path: Path) -> None:
    halves = {name: tensor.half() for name, tensor in _weights().items()}
    write_checkpoint(tmp_path / "model", UNET_CONFIG, halves)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model" / WEIGHTS_FILE).values()} == {torch.float32}


def test_half_precision_weights_are_read_as_float32(folder: Path) -> None:
    save_file({name: tensor.half() for name, tensor in _weights().items()}, folder / WEIGHTS_FILE)
    assert {tensor.dtype for tensor in read_weights(folder).values()} == {torch.float32}


def test_both_files_have_the_same_permissions(folder: Path) -> None:
    assert (folder / WEIGHTS_FILE).stat().st_mode == (folder / CONFIG_FILE).stat().st_mode


def test_writing_again_replaces_the_checkpoint_and_leaves_nothing_else(folder: Path) -> None:
    write_checkpoint(folder, UNET_CONFIG, _weights(seed=1), extra=lambda at: (at / "new.txt").touch())
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model"]
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE, "new.txt"]
    assert torch.equal(read_weights(folder)["out.2.bias"], _weights(seed=1)["out.2.bias"])


def test_extra_files_are_part_of_the_checkpoint(tmp_path: Path) -> None:
    def add_state(folder: Path) -> None:
        (folder / "state").mkdir()
        (folder / "state" / "optimizer.bin").write_bytes(b"state")

    write_checkpoint(tmp_path / "model", UNET_CONFIG, _weights(), extra=add_state)
    assert (tmp_path / "model" / "state" / "optimizer.bin").read_bytes() == b"state"


def test_a_failure_during_writing_keeps_the_old_checkpoint_and_removes_the_new(folder: Path) -> None:
    before = _contents(folder)

    def fail(_folder: Path) -> None:
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        write_checkpoint(folder, UNET_CONFIG, _weights(seed=1), extra=fail)
    assert _contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_failing_rename_puts_the_old_checkpoint_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _contents(folder)
    rename = Path.rename

    def fail_for_new(path: Path, target: Path) -> Path:
        if ".new-" in path.name:
            raise OSError("no space left")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_for_new)
    with pytest.raises(OSError, match="no space left"):
        write_checkpoint(folder, UNET_CONFIG, _weights(seed=1))
    assert _contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def _write_and_die(folder: Path) -> None:
    def die(_folder: Path) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    write_checkpoint(folder, UNET_CONFIG, _weights(seed=1), extra=die)


def test_a_writer_killed_during_writing_leaves_the_old_checkpoint_only(folder: Path) -> None:
    before = _contents(folder)
    writer = multiprocessing.get_context("spawn").Process(target=_write_and_die, args=(folder,))
    writer.start()
    writer.join()

    assert writer.exitcode == -signal.SIGKILL
    assert _contents(folder) == before
    (leftover,) = (path for path in folder.parent.iterdir() if path != folder)
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_unet(leftover)


def test_a_folder_other_than_a_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(CheckpointError, match="is not a checkpoint folder"):
        write_checkpoint(tmp_path / "photos", UNET_CONFIG, _weights())
    assert [path.name for path in tmp_path.rglob("*")] == ["photos", "cat.jpg"]


def test_an_empty_folder_may_become_a_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, UNET_CONFIG, _weights())
    assert read_config(tmp_path) == UNET_CONFIG


def test_weights_that_do_not_fit_are_not_written(tmp_path: Path) -> None:
    weights = _weights()
    weights["out.2.bias"] = torch.zeros(3)
    weights["module.out"] = weights.pop("out.0.bias")
    with pytest.raises(CheckpointError) as caught:
        write_checkpoint(tmp_path / "model", UNET_CONFIG, weights)
    assert str(caught.value).endswith(
        "weights do not fit the configuration: 1 missing (out.0.bias); 1 not expected (module.out); "
        "1 of another shape (out.2.bias is [3] instead of [6])"
    )
    assert list(tmp_path.iterdir()) == []


def test_provenance_that_json_cannot_hold_is_not_written(tmp_path: Path) -> None:
    config = UNET_CONFIG.replace(provenance={"model": object()})
    with pytest.raises(CheckpointError, match="cannot be written as JSON"):
        write_checkpoint(tmp_path / "model", config, _weights())
    assert list(tmp_path.iterdir()) == []


def test_truncated_weights_are_refused(folder: Path) -> None:
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"is truncated or damaged: it has \d+ bytes instead of \d+"):
        load_unet(folder)


def test_weights_of_integers_are_refused(folder: Path) -> None:
    save_file({"out.2.bias": torch.zeros(6, dtype=torch.int64)}, folder / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=r"out\.2\.bias must be floating point; got torch\.int64"):
        read_weights(folder)


def test_the_error_for_weights_of_another_network_is_a_summary(folder: Path) -> None:
    _edit_config(folder, model={**UNET_CONFIG.model.model_dump(), "model_channels": 64})
    with pytest.raises(CheckpointError, match=r"does not fit config\.json: \d+ of another shape") as caught:
        load_unet(folder)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("missing", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_missing_file_is_named(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    for read in (load_unet, checkpoint_sha256):
        with pytest.raises(CheckpointError, match=f"is not a checkpoint folder: it has no {missing}"):
            read(folder)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a checkpoint folder"):
        load_unet(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version must be 1; got 2"),
        ({"kind": "vae"}, r"kind must be one of \['classifier', 'unet'\]; got 'vae'"),
        ({"kind": ["unet"]}, "kind must be one of"),
        ({"classs_names": []}, r"classs_names: Extra inputs are not permitted \(got \[\]\)"),
        ({"diffusion": {"num_timesteps": 1}}, "diffusion.num_timesteps: Input should be greater than or equal to 2"),
        ({"diffusion": {"noise_schedule": "sigmoid"}}, "diffusion.noise_schedule: .*'linear' or 'cosine'.*'sigmoid'"),
        ({"class_names": ["one"]}, "class_names must have one name per class"),
    ],
)
def test_the_error_for_an_invalid_config_names_the_field_and_the_rule(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    _edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_config(folder)
    assert str(folder / CONFIG_FILE) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "is not valid JSON"), (b"\xff\xfe", "is not valid JSON"), (b"[1]", "must hold a JSON object; got list")],
)
def test_a_config_other_than_a_json_object_is_refused(folder: Path, content: bytes, message: str) -> None:
    (folder / CONFIG_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_config(folder)


def test_the_hash_depends_on_weights_and_network_but_not_on_names(folder: Path) -> None:
    original = checkpoint_sha256(folder)
    _edit_config(folder, class_names=["oil", "water"], provenance={})
    assert checkpoint_sha256(folder) == original
    assert len(original) == 64

    _edit_config(folder, diffusion={**UNET_CONFIG.diffusion.model_dump(), "rescale_timesteps": True})
    other_process = checkpoint_sha256(folder)
    write_checkpoint(folder, UNET_CONFIG, _weights(seed=1))
    other_weights = checkpoint_sha256(folder)
    assert len({original, other_process, other_weights}) == 3


def test_the_hash_does_not_depend_on_defaults_being_written_out(folder: Path) -> None:
    original = checkpoint_sha256(folder)
    _edit_config(folder, diffusion={"num_timesteps": 10})
    assert checkpoint_sha256(folder) == original
