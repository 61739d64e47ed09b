"""Check that two commits give the same pixels: hashes of fifty mixed requests with all samplers and guidances.

    python -m benchmarks.same_pixels --model models/fashion32 --backend openvino --out before.json
    (another commit)
    python -m benchmarks.same_pixels --model models/fashion32 --backend openvino --compare before.json

All requests are sent at once to the service in this process, so that they share steps. For a `--model` with a
classifier, some requests use classifier guidance. Exits with 1 if the bytes of a request differ.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import sys
from pathlib import Path
from typing import Any

import httpx

from diffusion.config import CheckpointConfig
from formats.checkpoint_config import read_config
from formats.classifier_folder import find_classifier
from service.http.app import create_app
from service.settings import Settings

REQUESTS = 50
MAX_STEPS = 24


def mixed_requests(folder: Path, count: int = REQUESTS) -> list[dict[str, Any]]:
    """Return bodies for /v1/generate, the same ones at each call for a model."""
    config = read_config(folder)
    assert isinstance(config, CheckpointConfig)  # what a service takes
    rng = random.Random(0)  # noqa: S311  # repeatable, not secret
    guided, classified = config.model.null_class, find_classifier(folder) is not None
    bodies: list[dict[str, Any]] = []
    for k in range(count):
        body: dict[str, Any] = {"seed": rng.randrange(2**53), "n": rng.choice([1, 1, 2, 3]), "image_index": k % 5}
        body["steps"] = rng.randrange(2, MAX_STEPS)
        if k % 5 == 0:
            body["sampler"], body["eta"] = "ddim", rng.choice([0, 0.5, 1])
        if k % 7 == 0:
            del body["steps"]
            body["respacing"] = rng.choice(["3,2,5", "10", "1,1,8"])
        if guided:
            body["cfg_scale"] = rng.choice([0, 1, 1, 2, 3.5])
        if classified:
            body["classifier_scale"] = rng.choice([0, 0, 1, 5])
        if config.model.num_classes is not None:
            body["class"] = rng.randrange(config.model.num_classes)
        bodies.append(body)
    return bodies


async def hashes(folder: Path, backend: str, max_rows: int) -> list[str]:
    """Return the hash of the pixels of each request's images."""
    settings = Settings.model_validate(
        {"models": (folder,), "backend": backend, "max_rows": max_rows, "max_queue": 1000, "cache_dir": ""}
    )
    app = create_app(settings)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=600) as client,
    ):
        while (await client.get("/readyz")).status_code != 200:
            await asyncio.sleep(0.05)
        answers = await asyncio.gather(
            *(client.post("/v1/generate", json={**body, "format": "png"}) for body in mixed_requests(folder))
        )
    found = []
    for answer in answers:
        answer.raise_for_status()
        pictures = [image["b64_json"] for image in answer.json()["images"]]
        found.append(hashlib.sha256("".join(pictures).encode()).hexdigest())
    return found


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.same_pixels", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--backend", required=True, help="openvino, onnxruntime or torch")
    parser.add_argument("--max-rows", type=int, default=4, help="width of the engine (4)")
    parser.add_argument("--out", type=Path, help="write the hashes here")
    parser.add_argument("--compare", type=Path, help="compare with the hashes that are here")
    args = parser.parse_args()
    found = asyncio.run(hashes(args.model, args.backend, args.max_rows))
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if args.compare is not None:
        before = json.loads(args.compare.read_text(encoding="utf-8"))
        different = [k for k, (a, b) in enumerate(zip(before, found, strict=True)) if a != b]
        print(f"{args.model}, {args.backend}: {len(found) - len(different)} of {len(found)} requests equal")
        return 1 if different else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
