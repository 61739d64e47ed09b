from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner, Result

from cli.import_command import _with_class_names, import_command
from diffusion.config import CheckpointConfig, ClassifierCheckpointConfig, DiffusionConfig
from diffusion.respacing import respace
from formats.checkpoint import expected_shapes, load_classifier, read_weights
from formats.checkpoint_config import CheckpointError, read_config
from interchange import sanity_check
from interchange.import_openai import import_checkpoint, load_state_dict
from interchange.openai_flags import config_from_flags, parse_flag_line
from interchange.openai_shapes import describe_mismatch
from interchange.published import PUBLISHED
from interchange.sanity_check import SanityReport, check_predictions
from tests import golden

SUPERRES = golden.GOLDEN_DIR / "imp_superres.pt"
FLAG_LINE = (
    "--large_size 16 --small_size 8 --channel_mult 1 --num_channels 32 --num_res_blocks 1 --num_heads 2 "
    "--class_cond True --num_classes 5 --learn_sigma True --attention_resolutions 16 --diffusion_steps 4000 "
    "--rescale_timesteps False"
)

app = typer.Typer()
app.command()(import_command)


def _superres_config(**flags: str) -> CheckpointConfig:
    config = config_from_flags("improved", {**parse_flag_line(FLAG_LINE), **flags})
    assert isinstance(config, CheckpointConfig)
    return config


def _golden_config(name: str, **diffusion: Any) -> CheckpointConfig:
    model = golden.model_config(name)
    variance = "learned_range" if model.learn_sigma else "fixed_large"
    return CheckpointConfig(model=model, diffusion=DiffusionConfig.model_validate({"variance": variance, **diffusion}))


def _weights(name: str) -> dict[str, Tensor]:
    return dict(golden.network(name).state_dict())


@pytest.fixture(name="failing_check")
def _failing_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_config: CheckpointConfig, _weights: dict[str, Tensor]) -> SanityReport:
        return SanityReport(0.7, False, "With num_heads=2: 0.01. Check the flags first")

    monkeypatch.setattr("interchange.import_openai.check_predictions", fail)


# --- the file


def test_openai_s_pt_file_imports_and_equals_the_same_weights_in_safetensors(tmp_path: Path) -> None:
    report = import_checkpoint(SUPERRES, _superres_config(), tmp_path / "model")
    weights = read_weights(tmp_path / "model")
    expected = load_file(golden.GOLDEN_DIR / "imp_superres.safetensors")

    assert report.passed
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor.float()) for name, tensor in expected.items())
    config = read_config(tmp_path / "model")
    assert config.model == golden.model_config("imp_superres").replace(low_res_size=8)
    assert config.provenance["source"] == "openai/improved-diffusion"
    assert config.provenance["file"] == "imp_superres.pt"


def test_weights_are_plain_float32_tensors() -> None:
    assert {(type(tensor), tensor.dtype) for tensor in load_state_dict(SUPERRES).values()} == {(Tensor, torch.float32)}


class _Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.target}",))


@pytest.mark.parametrize("new_format", [True, False])
def test_a_file_that_needs_to_run_code_is_refused_without_running_it(tmp_path: Path, new_format: bool) -> None:
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"
    torch.save({"w": _Malicious(trace)}, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(CheckpointError, match=r"needs to run code to be loaded \(posix\.system\)"):
        load_state_dict(path)
    assert not trace.exists()


def test_a_bare_pickle_that_needs_to_run_code_is_refused_without_running_it(tmp_path: Path) -> None:
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"
    path.write_bytes(pickle.dumps(_Malicious(trace)))
    with pytest.raises(CheckpointError):
        load_state_dict(path)
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"hello world" * 100, b"\x80\x02" + bytes(1000)])
def test_the_error_for_a_damaged_file_has_the_reason(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged, or not a file of torch\.save"):
        load_state_dict(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "must hold a state dict; got a list"),
        ({"state": {}, "param_groups": []}, "state of an optimizer"),
        (
            {"state_dict": {"w": torch.zeros(1)}},
            "'state_dict' is a dict. If the file wraps the state dict, save the inner state dict",
        ),
        ({"steps": torch.zeros(1, dtype=torch.int64)}, "steps must be floating point"),
    ],
)
def test_the_error_for_other_contents_describes_them(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message):
        load_state_dict(tmp_path / "x.pt")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.pt does not exist"):
        load_state_dict(tmp_path / "nothing.pt")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    weights = load_state_dict(SUPERRES)
    weights["out.2.bias"][0] = float("nan")
    torch.save(weights, tmp_path / "nan.pt")
    with pytest.raises(CheckpointError, match=r"1 of \d+ tensors hold NaN or infinity \(out\.2\.bias\)"):
        import_checkpoint(tmp_path / "nan.pt", _superres_config(), tmp_path / "model")


# --- what does not fit


@pytest.mark.parametrize(
    ("flags", "lines"),
    [
        ({"num_channels": "64"}, ["num_channels: the file has 32, the configuration says 64"]),
        ({"num_classes": "1000"}, ["num_classes: the file has 5, the configuration says 1000"]),
        ({"num_res_blocks": "2"}, ["num_res_blocks: the file has 1, the configuration says 2"]),
        ({"learn_sigma": "False"}, ["learn_sigma: the file has 6 output channels, the configuration says 3 output"]),
        ({"use_scale_shift_norm": "False"}, ["use_scale_shift_norm: the file has True, the configuration says False"]),
        ({"attention_resolutions": "8"}, ["attention_resolutions: the file has 16, the configuration says none"]),
        (
            {"num_channels": "64", "channel_mult": "1,2"},
            [
                "num_channels: the file has 32, the configuration says 64",
                "channel_mult: the file has 1, the configuration says 1,2",
            ],
        ),
    ],
)
def test_each_wrong_flag_is_reported_on_one_line(tmp_path: Path, flags: dict[str, str], lines: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        import_checkpoint(SUPERRES, _superres_config(**flags), tmp_path / "model")
    said = str(caught.value).splitlines()[1:]
    assert len(said) == len(lines)
    assert all(line in sentence for line, sentence in zip(lines, said, strict=True))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("preset", ["imagenet64-cond-270m", "adm-imagenet512", "adm-lsun-cat"])
def test_the_error_for_a_wrong_preset_has_at_most_a_dozen_lines(preset: str) -> None:
    lines = describe_mismatch(PUBLISHED[preset].config, expected_shapes(PUBLISHED["adm-upsampler-64-256"].config))
    assert 1 <= len(lines) <= 12
    assert all(len(line) < 120 for line in lines)


def test_a_classifier_is_distinguished_from_a_unet() -> None:
    classifier = expected_shapes(PUBLISHED["adm-classifier-64"].config)
    assert describe_mismatch(PUBLISHED["adm-imagenet64"].config, classifier) == [
        "the file holds a noisy classifier, the configuration describes a UNet"
    ]
    assert describe_mismatch(PUBLISHED["adm-classifier-128"].config, classifier)[1].startswith("classifier_depth")


def test_weights_of_other_networks_are_recognised() -> None:
    (line,) = describe_mismatch(_superres_config(), {"conv1.weight": (64, 3, 7, 7)})
    assert line.startswith("the file holds no network of these repositories")


# --- flags


def test_the_repositories_have_different_defaults() -> None:
    improved, guided = config_from_flags("improved", {}), config_from_flags("guided", {})
    assert improved.model == guided.model
    assert improved.diffusion.rescale_timesteps
    assert not guided.diffusion.rescale_timesteps


def test_flags_that_do_not_matter_are_noted_and_ignored() -> None:
    config = config_from_flags("guided", {"lr": "1e-4", "use_fp16": "True", "timestep_respacing": "250"})
    assert config.model == config_from_flags("guided", {}).model
    assert config.provenance["notes"] == [
        f"{name}: ignored, it has no effect on sampling" for name in ("lr", "use_fp16", "timestep_respacing")
    ]


def test_attention_at_a_size_that_no_level_has_is_noted() -> None:
    config = config_from_flags("improved", {"image_size": "64", "attention_resolutions": "16,4"})
    assert config.model.attention_resolutions == (16,)
    assert config.provenance["notes"] == ["attention_resolutions: 4 is ignored, no level has this size"]


def test_variance_and_prediction_follow_the_flags() -> None:
    def process(**flags: str) -> DiffusionConfig:
        return config_from_flags("improved", flags).diffusion

    assert process().variance == "fixed_large"
    assert process(sigma_small="True").variance == "fixed_small"
    assert process(sigma_small="True", learn_sigma="True").variance == "learned_range"
    assert process(predict_xstart="yes").prediction == "x0"


def test_classifier_flags_give_a_classifier() -> None:
    config = config_from_flags("guided", {"image_size": "128", "classifier_depth": "2", "num_classes": "10"})
    assert isinstance(config, ClassifierCheckpointConfig)
    assert config.model.num_classes == 10


@pytest.mark.parametrize(
    ("repo", "flags", "message"),
    [
        (
            "improved",
            {"num_heds": "4"},
            r"unknown flag .num_heds.*did you mean num_heads\? Known flags: .*num_res_blocks",
        ),
        ("improved", {"qqq": "4"}, r"from improved-diffusion\. Known flags: "),
        ("improved", {"use_new_attention_order": "True"}, "unknown flag .*improved-diffusion.*Known flags: "),
        ("guided", {"sigma_small": "True"}, "unknown flag 'sigma_small'"),
        ("guided", {"large_size": "256", "use_new_attention_order": "True"}, "of kind 'superres' from guided"),
        ("improved", {"classifier_depth": "2"}, "improved-diffusion has no classifiers"),
        ("guided", {"noise_schedule": "sigmoid"}, "noise_schedule must be one of linear, cosine; got 'sigmoid'"),
        ("guided", {"class_cond": "maybe"}, "class_cond must be True or False; got 'maybe'"),
        ("guided", {"num_channels": "-3"}, "num_channels must be a positive integer; got '-3'"),
        ("guided", {"num_head_channels": "0"}, "num_head_channels must be a positive integer, or -1"),
        ("guided", {"dropout": "1"}, "dropout must be a number from 0 up to, but not including, 1"),
        ("guided", {"attention_resolutions": "16;8"}, "attention_resolutions must be sizes in pixels"),
        ("guided", {"channel_mult": "1,x"}, "channel_mult must be positive numbers"),
        ("improved", {"image_size": "128"}, r"image_size must be one of \[32, 64, 256\] unless channel_mult"),
        ("improved", {"num_channels": "100"}, r"must be a multiple of norm_groups \(32\)"),
        ("improved", {"num_classes": "10"}, "num_classes needs class_cond True"),
        ("diffusers", {}, r"repo must be one of \['improved', 'guided'\]; got 'diffusers'"),
    ],
)
def test_wrong_flags_are_refused_with_the_allowed_values(repo: Any, flags: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_flags(repo, flags)


def test_a_command_line_is_split_into_flags() -> None:
    assert parse_flag_line("--image_size 64 --channel_mult=1,2  --num_head_channels -1") == {
        "image_size": "64",
        "channel_mult": "1,2",
        "num_head_channels": "-1",
    }


@pytest.mark.parametrize("line", ["--image_size", "--image_size --lr 1", "image_size 64"])
def test_a_flag_without_its_value_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="flag"):
        parse_flag_line(line)


# --- the sanity check


@pytest.mark.parametrize(
    ("name", "diffusion"),
    [
        ("imp_cond_ls", {"num_timesteps": 4000, "rescale_timesteps": True}),
        ("adm_new", {"num_timesteps": 1000, "noise_schedule": "linear"}),
    ],
)
def test_trained_networks_pass_with_their_own_flags(name: str, diffusion: dict[str, Any]) -> None:
    report = check_predictions(_golden_config(name, **diffusion), _weights(name))
    assert report.passed
    assert report.eps_error is not None
    assert report.eps_error < 0.05


def test_wrong_heads_fail_and_the_error_names_the_right_ones() -> None:
    config = _golden_config("imp_uncond", num_timesteps=1000, noise_schedule="linear")
    report = check_predictions(config.replace(model=config.model.replace(num_heads=4)), _weights("imp_uncond"))
    assert not report.passed
    assert "With num_heads=1" in report.advice


def test_wrong_decoder_heads_fail_and_the_error_names_the_right_ones() -> None:
    config = _golden_config("imp_uncond", num_timesteps=1000, noise_schedule="linear")
    wrong = config.replace(model=config.model.replace(num_heads_upsample=4))
    report = check_predictions(wrong, _weights("imp_uncond"))
    assert not report.passed
    assert "num_heads_upsample=1" in report.advice


def test_a_wrong_attention_order_fails_and_the_error_names_the_right_one() -> None:
    config = _superres_config()
    wrong = config.replace(model=config.model.replace(attention_order="new"))
    report = check_predictions(wrong, _weights("imp_superres"))
    assert not report.passed
    assert "With use_new_attention_order=False" in report.advice


@pytest.mark.parametrize(
    ("wrong", "advice"),
    [
        ({}, None),
        ({"noise_schedule": "linear"}, "With noise_schedule=cosine:"),
        ({"rescale_timesteps": False}, "With rescale_timesteps=True or diffusion_steps=1000:"),
        ({"num_timesteps": 1000, "rescale_timesteps": False}, None),  # equivalent for the network: not visible
    ],
)
def test_a_wrong_process_is_detected_by_a_network_that_relies_on_its_timesteps(
    monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any], advice: str | None
) -> None:
    process = {"num_timesteps": 4000, "noise_schedule": "cosine", "rescale_timesteps": True}
    trained = respace(_golden_config("imp_cond_ls", **process).diffusion)

    def predict_grey_images(_config: object, _weights: object, x_t: Tensor, t_model: list[float]) -> Tensor:
        """Estimate the noise level from the timestep alone, and only for timesteps that were trained."""
        steps = [int(abs(trained.t_model - t).argmin()) for t in t_model]
        known = [float(t <= 1000) for t in t_model]
        scale = torch.tensor(known) / (1 - torch.from_numpy(trained.schedule.alphas_cumprod[steps])).sqrt()
        estimate = x_t * scale.repeat_interleave(len(x_t) // len(t_model))[:, None, None, None]
        return estimate + 0.03 * torch.ones_like(x_t)  # no network is perfect

    monkeypatch.setattr("interchange.sanity_check.run_network", predict_grey_images)
    report = check_predictions(_golden_config("imp_cond_ls", **{**process, **wrong}), {})

    assert report.passed == (advice is None)
    assert advice is None or advice in report.advice


def test_a_wrong_prediction_type_fails_and_the_error_names_the_right_one() -> None:
    config = _golden_config("imp_uncond", num_timesteps=1000, noise_schedule="linear", prediction="x0")
    report = check_predictions(config, _weights("imp_uncond"))
    assert not report.passed
    assert "with predict_xstart=False it would be" in report.advice


def test_a_network_that_predicts_x0_passes_and_an_untrained_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    config = _golden_config("imp_superres", num_timesteps=1000, noise_schedule="linear", prediction="x0")
    process = respace(config.diffusion)

    def predict_x0(
        as_config: CheckpointConfig, weights: Any, x_t: Tensor, t_model: list[float], brightness: float
    ) -> Tensor:
        abar = float(process.schedule.alphas_cumprod[int(abs(process.t_model - t_model[0]).argmin())])
        eps = predict(as_config, weights, x_t, t_model, brightness)
        return (x_t - (1 - abar) ** 0.5 * eps) / abar**0.5

    zeros = {name: torch.zeros_like(tensor) for name, tensor in _weights("imp_superres").items()}
    assert not check_predictions(config, zeros).passed
    predict = sanity_check.run_network
    monkeypatch.setattr(sanity_check, "run_network", predict_x0)
    assert check_predictions(config, _weights("imp_superres")).passed


@pytest.mark.parametrize(("error", "calls"), [(0.01, 1), (0.05, 9)])
def test_other_flags_are_not_tried_if_those_of_a_preset_give_small_errors(
    monkeypatch: pytest.MonkeyPatch, error: float, calls: int
) -> None:
    config = _golden_config("imp_uncond", num_timesteps=1000)
    made: list[int] = []

    def predict(_config: object, _weights: object, x_t: Tensor, _eps: Tensor) -> Tensor:
        made.append(len(x_t))
        return torch.full((2,), error)

    monkeypatch.setattr(sanity_check, "_eps_errors", predict)
    assert check_predictions(config.replace(provenance={"preset": "a-preset"}), {}).passed
    assert len(made) == calls
    made.clear()
    assert check_predictions(config, {}).passed
    assert len(made) == 9


def test_untrained_weights_fail_and_the_error_lists_possible_flags() -> None:
    weights = {name: torch.zeros_like(tensor) for name, tensor in _weights("imp_uncond").items()}
    report = check_predictions(_golden_config("imp_uncond", num_timesteps=1000), weights)
    assert not report.passed
    assert report.eps_error == pytest.approx(1.0, abs=0.1)
    assert "rescale_timesteps" in report.advice


@pytest.mark.usefixtures("failing_check")
def test_nothing_is_written_when_the_check_fails_unless_allowed(tmp_path: Path) -> None:
    wrong = _superres_config(num_heads="8")
    assert not import_checkpoint(SUPERRES, wrong, tmp_path / "model").passed
    assert list(tmp_path.iterdir()) == []

    assert not import_checkpoint(SUPERRES, wrong, tmp_path / "model", allow_failed_check=True).passed
    assert read_config(tmp_path / "model").provenance["sanity_check"].startswith("FAILED")


def test_classifiers_are_imported_unchecked(tmp_path: Path) -> None:
    config = ClassifierCheckpointConfig(
        model=golden.classifier_config("clf_attention"), diffusion=DiffusionConfig(variance="fixed_large")
    )
    torch.save(golden.classifier("clf_attention").state_dict(), tmp_path / "clf.pt")
    report = import_checkpoint(tmp_path / "clf.pt", config, tmp_path / "model")

    assert report.passed
    assert report.eps_error is None
    data = golden.load("clf_attention")
    logits = load_classifier(tmp_path / "model")[1](data.tensor("x"), data.tensor("t"))
    assert torch.allclose(logits, data.tensor("out"), atol=1e-4)


# --- the command


def _invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_command_writes_a_checkpoint_and_describes_the_file(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncat\ndog\nemu\n")
    result = _invoke(
        *(SUPERRES, "--out", tmp_path / "model", "--repo", "improved", "--class-names", names),
        *("--flags", f"{FLAG_LINE} --use_kl True", "--flag", "dropout=0.1"),
    )
    assert result.exit_code == 0, result.output
    config = read_config(tmp_path / "model")
    assert config.class_names == ("ant", "bee", "cat", "dog", "emu")
    assert config.model.dropout == 0.1
    for said in ("super-resolution  8 -> 16 px", "T = 4000, linear", "use_kl: ignored", "check: passed"):
        assert said in result.output


@pytest.mark.usefixtures("failing_check")
def test_command_exits_with_1_and_writes_nothing_when_the_check_fails(tmp_path: Path) -> None:
    arguments = (SUPERRES, "--out", tmp_path / "m", "--repo", "improved", "--flags", FLAG_LINE, "--flag", "num_heads=8")
    result = _invoke(*arguments)
    assert result.exit_code == 1
    assert "sanity check: FAILED. With num_heads=2" in result.output
    assert list(tmp_path.iterdir()) == []

    assert _invoke(*arguments, "--allow-failed-sanity-check").exit_code == 0
    assert read_config(tmp_path / "m").model.num_heads == 8


def test_command_shows_the_licence_of_published_weights(tmp_path: Path) -> None:
    result = _invoke(SUPERRES, "--out", tmp_path / "m", "--preset", "adm-upsampler-64-256")
    assert result.exit_code == 1
    assert "research use only" in result.output
    assert "num_channels: the file has 32, the configuration says 192" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--preset", "imagenet"), "unknown preset 'imagenet'; allowed: cifar10-uncond-50m, "),
        (("--preset", "adm-lsun-cat", "--repo", "guided"), "cannot be used with --preset"),
        ((), "--preset NAME, or --repo improved|guided with flags, must be given"),
        (("--repo", "diffusers"), "--repo must be improved or guided"),
        (("--repo", "guided", "--flag", "image_size"), "--flag takes name=value"),
        (("--repo", "guided", "--flag", "lrr=1"), "unknown flag 'lrr'"),
        (("--repo", "improved", "--class-names", SUPERRES.with_name("README.md")), "class_names must have one name"),
    ],
)
def test_command_explains_wrong_arguments(tmp_path: Path, arguments: tuple[object, ...], message: str) -> None:
    result = _invoke(SUPERRES, "--out", tmp_path / "model", *arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert list(tmp_path.iterdir()) == []


def test_command_recognises_the_name_of_a_published_file(tmp_path: Path) -> None:
    (tmp_path / "64x64_diffusion.pt").touch()
    result = _invoke(tmp_path / "64x64_diffusion.pt", "--out", tmp_path / "model")
    assert "64x64_diffusion.pt is the published name of --preset adm-imagenet64" in result.output


def test_command_does_not_change_an_existing_folder(tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").touch()
    result = _invoke(SUPERRES, "--out", tmp_path, "--repo", "improved")
    assert result.exit_code == 1
    assert "exists already; name a new folder" in result.output


def test_flags_that_cannot_be_split_are_quoted() -> None:
    with pytest.raises(ValueError, match=r"flags cannot be parsed: No closing quotation; got "):
        parse_flag_line('--channel_mult "1,2')


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xef\xbb\xbfant\r\nbee\r\n", r"names\.txt: class_names must have one name per class: .*got 2 names"),
        ("ant\n".encode("utf-16"), r"names\.txt must hold class names in UTF-8, one per line"),
    ],
)
def test_the_error_for_a_wrong_file_of_class_names_names_it(tmp_path: Path, content: bytes, message: str) -> None:
    names = tmp_path / "names.txt"
    names.write_bytes(content)
    config = config_from_flags("improved", {"class_cond": "True", "num_classes": "3"})
    with pytest.raises(ValueError, match=message):
        _with_class_names(config, names)


def test_a_byte_order_mark_is_not_part_of_a_class_name(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_bytes(b"\xef\xbb\xbfant\r\nbee\r\n")
    config = config_from_flags("improved", {"class_cond": "True", "num_classes": "2"})
    assert _with_class_names(config, names).class_names == ("ant", "bee")
