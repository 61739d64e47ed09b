"""Convert a validated body to a complete request: resolve class names, fill in defaults and check limits."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from diffusion.chains import Resample, build_chain, resampled_calls
from diffusion.config import CheckpointConfig
from diffusion.noise import MAX_IMAGE_INDEX, MAX_SEED, draw_class
from diffusion.plans import SAMPLERS, samplers_with_eta
from diffusion.quoting import alternatives, quoted
from service.engine.request import GenerationRequest, GivenArrays, ImageParams, Output, PlanKey, Priority
from service.errors import InvalidRequest
from service.models.served_model import ServedModel
from service.requests.cascading import next_stage, output_of_base
from service.requests.generate_request import DEFAULT_STEPS, UPSAMPLE_STEPS, GenerateRequest, UpsampleOptions
from service.requests.given import check_cond


def complete(
    body: GenerateRequest,
    model: ServedModel,
    request_id: str,
    max_row_steps: int,
    client: str = "",
    given: Sequence[GivenArrays] = (),
) -> GenerationRequest:
    """Fill in defaults and check the constraints that depend on the model.

    Args:
        body: of the request; `service.requests.given.check_given` has accepted it.
        model: that it names.
        request_id: new id.
        max_row_steps: most work.
        client: of the request.
        given: its given arrays, one for all images or one per image.

    Raises:
        InvalidRequest: a constraint is violated; the message names field, rule and allowed values.
    """
    check_cond(body.cond, model.config.model)
    count = _count(body, len(given))
    if body.image_index + count - 1 > MAX_IMAGE_INDEX:
        raise InvalidRequest(
            "image_index", f"must be at most {MAX_IMAGE_INDEX - count + 1} with {count} images; got {body.image_index}"
        )
    seed = secrets.randbelow(MAX_SEED + 1) if body.seed is None else body.seed
    output: Output = "values" if body.dtype == "float32" else "pixels"
    then = None
    if model.stages is None:
        if body.upsample is not None:
            raise InvalidRequest("upsample", f"is valid only for a cascade; {quoted(model.name)} is one model")
        images = _images(body, model, seed, count, max_row_steps, given, output)
    else:
        base, upsampler = model.stages
        images = _images(body, base, seed, count, max_row_steps, given, output_of_base(base.config))
        later = _upsampling(body, upsampler, images)
        try:
            upsampled = _images(later, upsampler, later.seed or 0, count, max_row_steps, (), output)
        except InvalidRequest as error:
            raise InvalidRequest(f"upsample.{error.field}", error.message) from error
        then = next_stage(base.config, upsampler, upsampled)
    request = GenerationRequest(
        request_id=request_id,
        model=model.engine_id,
        images=images,
        then=then,
        served_as=None if then is None else model.name,
        client=client,
        priority=Priority(body.priority),
        deadline_s=None if body.deadline_s is None else float(body.deadline_s),
    )
    if request.row_steps > max_row_steps:
        guided = any(stage[0].rows == 2 for stage in request.stages)
        got = " + ".join(f"{stage[0].num_steps}{' x 2' if stage[0].rows == 2 else ''}" for stage in request.stages)
        raise InvalidRequest(
            "steps",
            f"images x steps{' x 2 for guidance' if guided else ''} must be at most {max_row_steps} per request; "
            f"got {count} x {got if then is None else f'({got})'} = {request.row_steps}",
        )
    return request


def _images(
    body: GenerateRequest,
    model: ServedModel,
    seed: int,
    count: int,
    max_row_steps: int,
    given: Sequence[GivenArrays],
    output: Output,
) -> tuple[ImageParams, ...]:
    """Return the images of a request, or of a stage of it."""
    plan, num_steps = _plan(body, model.config, max_row_steps)
    cfg_scale = _cfg_scale(body, model.config)
    classifier_scale = _classifier_scale(body, model)
    return tuple(
        ImageParams(
            plan=plan,
            num_steps=num_steps,
            seed=seed,
            image_index=body.image_index + k,
            class_index=_class_index(body, model, classifier_scale, seed, k),
            cfg_scale=cfg_scale,
            classifier_scale=classifier_scale,
            given=given[k % len(given)] if given else None,
            output=output,
        )
        for k in range(count)
    )


def _upsampling(body: GenerateRequest, upsampler: ServedModel, images: Sequence[ImageParams]) -> GenerateRequest:
    """Return the request to the upsampler that the second stage of a cascade is."""
    options = body.upsample or UpsampleOptions()
    fields = {name: value for name in UpsampleOptions.model_fields if (value := getattr(options, name)) is not None}
    fields.setdefault("steps", min(UPSAMPLE_STEPS, upsampler.config.diffusion.num_timesteps))
    classes = [image.class_index for image in images]
    if upsampler.config.model.num_classes is not None and None in classes:
        raise InvalidRequest(
            "classifier_scale",
            "must not be 0: the upsampler needs a class, and only the base's classifier has classes",
        )
    has_classes = upsampler.config.model.num_classes is not None or fields.get("classifier_scale")
    if has_classes and upsampler.classes is not None and None not in classes:
        fields["class"] = classes
    return GenerateRequest.model_validate(
        fields
        | {"seed": (images[0].seed + 1) % (MAX_SEED + 1), "image_index": images[0].image_index, "clip": body.clip}
    )


def _count(body: GenerateRequest, given: int) -> int:
    count = _count_without_given(body, given)
    if given > 1 and given != count:
        field = next(name for name in ("latent", "image", "cond") if getattr(body, name) is not None)
        raise InvalidRequest(field, f"must hold 1 or {count} arrays; got {given}")
    return count


def _count_without_given(body: GenerateRequest, given: int) -> int:
    if not isinstance(body.class_, list):
        return body.n or max(1, given)
    if body.n is not None and body.n != len(body.class_):
        raise InvalidRequest(
            "n", f"must be {len(body.class_)}, the length of the list in `class`, or absent; got {body.n}"
        )
    return len(body.class_)


def _plan(body: GenerateRequest, config: CheckpointConfig, max_row_steps: int) -> tuple[PlanKey, int]:
    timesteps = config.diffusion.num_timesteps
    if body.respacing is not None and body.steps is not None:
        raise InvalidRequest("respacing", "give either `steps` or `respacing`, not both")
    if body.respacing is None:
        steps = min(DEFAULT_STEPS, timesteps) if body.steps is None else body.steps
        if steps > timesteps:
            raise InvalidRequest("steps", f"must be 2..{timesteps}, the model's timesteps; got {steps}")
        spec = str(steps)
    else:
        spec = body.respacing
    if body.eta is not None and not SAMPLERS[body.sampler].takes_eta:
        having = alternatives(samplers_with_eta())
        raise InvalidRequest("eta", f"is valid only with sampler {having}; sampler is {quoted(body.sampler)}")
    if body.start_timestep is not None and body.start_timestep >= timesteps:
        raise InvalidRequest("start_timestep", f"must be 0..{timesteps - 1}; got {body.start_timestep}")
    key = PlanKey(
        sampler=body.sampler,
        spec=spec,
        eta=float(body.eta or 0.0),
        clip=body.clip,
        strength=None if body.strength is None else float(body.strength),
        timestep=body.start_timestep,
        from_latent=body.latent is not None,
    )
    try:
        plan = build_chain(config.diffusion, key)
        if body.resample is not None:
            resample = Resample(body.resample.times, body.resample.jump)
            calls = resampled_calls(plan.num_steps, resample)  # checked before so long a plan is built
            if calls > max_row_steps:
                raise InvalidRequest(
                    "resample", f"must lead to at most {max_row_steps} network calls per image; it leads to {calls}"
                )
            key = replace(key, resample=resample)
            plan = build_chain(config.diffusion, key)
    except ValueError as error:
        raise InvalidRequest("steps" if body.respacing is None else "respacing", str(error)) from error
    return key, plan.num_steps


def _cfg_scale(body: GenerateRequest, config: CheckpointConfig) -> float:
    if body.cfg_scale is not None and body.cfg_scale != 1 and not config.model.null_class:
        raise InvalidRequest(
            "cfg_scale", f"must be 1: the model has no null class to be guided away from; got {body.cfg_scale:g}"
        )
    scale = config.sampling.cfg_scale if body.cfg_scale is None else body.cfg_scale
    return float(np.float32(scale))  # rounded as in the engine: 1 + 1e-9 is 1 in float32, and takes one row


def _classifier_scale(body: GenerateRequest, model: ServedModel) -> float:
    scale = body.classifier_scale or 0
    if scale != 0 and model.classifier is None:
        raise InvalidRequest("classifier_scale", f"must be 0: the model has no noisy classifier; got {scale:g}")
    return float(np.float32(scale))  # rounded as in the engine


def _class_index(body: GenerateRequest, model: ServedModel, classifier_scale: float, seed: int, k: int) -> int | None:
    classes = model.classes
    class_spec = body.class_[k] if isinstance(body.class_, list) else body.class_
    if classes is None or (model.config.model.num_classes is None and classifier_scale == 0):
        if class_spec is not None:
            unless = "" if classes is None else ", and only its classifier has classes: also set classifier_scale"
            raise InvalidRequest("class", f"must be absent: model {quoted(model.name)} is unconditional{unless}")
        return None
    if class_spec is None:
        return draw_class(seed, body.image_index + k, len(classes.names))
    if isinstance(class_spec, str):
        return classes.find(class_spec)
    if class_spec >= len(classes.names):
        raise InvalidRequest("class", f"index must be 0..{len(classes.names) - 1}; got {class_spec}")
    return class_spec
