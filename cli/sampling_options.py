"""The options of all commands that sample: how a chain is computed, and where."""

from __future__ import annotations

from typing import Annotated, Any

import typer

Url = Annotated[str | None, typer.Option(help="Run at this service, http://HOST:PORT; /v1 at the end is ignored.")]
Key = Annotated[str | None, typer.Option(envvar="IDDPM_KEY", help="With --url: the API key.")]
Steps = Annotated[
    int | None,
    typer.Option(min=2, help="Number of sampling steps. Default: 100. Recommended for {recommended_steps}."),
]
Respacing = Annotated[str | None, typer.Option(help="Respacing instead of --steps, e.g. '10,10,20,40' or 'ddim25'.")]
SamplerName = Annotated[str, typer.Option(help="{samplers}.")]
Eta = Annotated[float | None, typer.Option(help="With {with_eta}: share of noise, 0..1. Default: 0.")]
CfgScale = Annotated[
    float | None, typer.Option(help="Classifier-free guidance scale; 1: off. Default: recommended by the model.")
]
ClassifierScale = Annotated[
    float | None, typer.Option(help="Scale of guidance by the model's noisy classifier; 0: off. Default: 0.")
]
UpsampleSteps = Annotated[
    int | None, typer.Option(min=2, help="Of a cascade: sampling steps of its upsampler. Default: 25.")
]
UpsampleSampler = Annotated[str | None, typer.Option(help="Of a cascade: {samplers}. Default: ancestral.")]
UpsampleCfgScale = Annotated[
    float | None,
    typer.Option(help="Of a cascade: guidance scale of its upsampler. Default: recommended by the upsampler."),
]
UpsampleClassifierScale = Annotated[
    float | None, typer.Option(help="Of a cascade: scale of guidance by its upsampler's classifier. Default: 0.")
]


def upsample_fields(
    steps: int | None, sampler: str | None, cfg_scale: float | None, classifier_scale: float | None
) -> dict[str, Any]:
    """Return the field `upsample` of a request for the options that were given; nothing without any."""
    options = given(steps=steps, sampler=sampler, cfg_scale=cfg_scale, classifier_scale=classifier_scale)
    return {"upsample": options} if options else {}


def given(**fields: Any) -> dict[str, Any]:
    """Return the fields of a request whose options were given; `class_` becomes `class`."""
    return {name.rstrip("_"): value for name, value in fields.items() if value is not None}
