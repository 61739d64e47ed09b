"""`iddpm encode`: encode images into latents with a model folder in this process, or at a running service."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.errors import fail
from cli.given_options import CondFile, FitName, read_base64
from cli.sampling_options import Key, Url, given

if TYPE_CHECKING:
    from cli.client import Encoded

FILES = (".npy", ".npz")


def encode_command(
    image: Annotated[
        Path,
        typer.Argument(help="PNG, WebP, JPEG, npy or npz; an array of shape [n, height, width, channels] has several."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="File for the latents: .npy, or .npz.")],
    model: Annotated[
        str | None, typer.Option(help="Model folder. With --url: name of a served model; default: its first model.")
    ] = None,
    url: Url = None,
    key: Key = None,
    class_: Annotated[
        str | None,
        typer.Option("--class", help="Name or index of the class. Default: the null class, if there is one."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Number of respaced timesteps. Default: 100.")] = None,
    end_timestep: Annotated[
        int | None,
        typer.Option(help="t of the training chain to end at; the nearest step is taken. Default: the noisiest one."),
    ] = None,
    cfg_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance scale. Default: 1, off.")] = None,
    fit: FitName = None,
    cond: CondFile = None,
    clip: Annotated[
        bool, typer.Option("--clip/--no-clip", help="Whether the predicted image is clamped in each step.")
    ] = True,
) -> None:
    """Encode images into latents: DDIM backwards.

    `iddpm sample --latent FILE --sampler ddim`, with the same steps and with the printed timestep as --start-timestep,
    decodes them.
    """
    from pydantic import ValidationError

    from cli.client import ClientError
    from formats.atomic_file import write_file
    from formats.checkpoint_config import describe_validation_error
    from service.encoding import encode_npy, encode_npz
    from service.errors import ModelError, ServiceError

    try:
        if out.suffix.lower() not in FILES:
            raise ValueError(f"--out: must be a file that ends in {' or '.join(FILES)}; got {out}")
        fields = given(
            image=read_base64("image", image),
            cond=None if cond is None else read_base64("cond", cond),
            class_=class_,
            steps=steps,
            end_timestep=end_timestep,
            cfg_scale=cfg_scale,
            fit=fit,
            clip=None if clip else False,
        )
        encoded = _encode(fields, model, url, key)
        typer.echo(f"timestep {encoded.timestep}, numerics_id {encoded.numerics_id}")
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(
            out, encode_npy(encoded.latents) if out.suffix.lower() == ".npy" else encode_npz(encoded.latents, [])
        )
        typer.echo(f"wrote {out}")
    except ValidationError as error:
        fail(describe_validation_error(error))
    except (ServiceError, ClientError, ModelError, OSError, ValueError) as error:
        fail(str(error))


def _encode(fields: dict[str, Any], model: str | None, url: str | None, key: str | None) -> Encoded:
    from cli.split_requests import with_class_index

    if url is not None:
        from cli.client import Client
        from cli.sample_remote import class_names_of, show_retries

        with show_retries(), Client(url, key=key) as client:
            named = fields if model is None else {**fields, "model": model}
            return client.encode(**with_class_index(named, lambda: class_names_of(client, model)))
    if model is None:
        fail("--model FOLDER or --url ADDRESS must be given", code=2)
    return _encode_locally(Path(model), fields)


def _encode_locally(model: Path, fields: dict[str, Any]) -> Encoded:
    import numpy as np

    from cli.client import Encoded
    from cli.local_engine import LocalEngine, local_settings
    from cli.split_requests import with_class_index

    engine = LocalEngine(local_settings(model))
    request, timestep = engine.complete_encoding(with_class_index(fields, lambda: engine.class_names))
    with typer.progressbar(length=request.row_steps, label="encoding", file=sys.stderr) as bar:
        ((_, latents),) = engine.run([[request]], bar.update)
    return Encoded(latents=np.stack(latents), timestep=timestep, numerics_id=engine.numerics_id)
