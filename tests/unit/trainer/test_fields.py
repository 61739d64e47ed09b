"""The list of the fields of a training configuration."""

from __future__ import annotations

from typer.testing import CliRunner

from cli.main import app
from diffusion.config import ClassifierConfig
from trainer.config import flat
from trainer.fields import train_fields
from trainer.presets import PRESETS, preset


def test_every_field_that_can_be_set_is_listed_once_with_its_meaning() -> None:
    fields = train_fields()
    names = [field.name for field in fields]
    assert len(names) == len(set(names))
    settable = {name for each in PRESETS for name in flat(preset(each).model_dump())}
    assert settable == set(names)
    assert all(field.meaning and field.type and field.default for field in fields)


def test_types_defaults_and_bounds_are_those_of_the_configuration() -> None:
    found = {field.name: field for field in train_fields()}
    assert (found["min_snr_gamma"].type, found["min_snr_gamma"].default) == ("number or null", "null")
    assert found["min_snr_gamma"].allowed == "> 0"
    assert found["loss"].allowed == "simple, hybrid, vlb, cross_entropy"
    assert found["diffusion.rescale_timesteps"].default == "true"  # differs from the default of a checkpoint
    assert found["model.image_size"].default == "by preset"
    assert found["model.num_classes"].default == "derived"
    assert found["data.value_range"].type == "[number, number] or list of [number, number] or null"
    assert found["model.attention_resolutions"].type == "list of integers"
    assert "pool" in ClassifierConfig.model_fields
    assert found["model.pool"].meaning == "Head that turns features into logits"


def test_the_command_lists_the_fields_without_data() -> None:
    result = CliRunner().invoke(app, ["train", "--fields"])
    assert result.exit_code == 0, result.output
    assert (
        "grad_clip: number or null, > 0; default: null\n    Maximum norm of the gradient; null: no limit\n"
        in result.output
    )
    assert result.output.count("; default: ") == len(train_fields())
