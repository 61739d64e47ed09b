"""Triton Inference Server: one model per number of steps, each with a dynamic batcher; its own virtual environment.

Requests with the same number of steps share a batch from first step to last. Each model has one instance; pytriton runs
their functions in threads of this process, and Triton's python backend reaches them through shared memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from benchmarks.peers.options import PeerOptions, parse_peer_options

INPUTS = ("seed", "image_index", "label")


def bind(triton: Any, options: PeerOptions, steps: int) -> None:
    """Add the model for `steps` steps."""
    sampler = options.sampler()
    channels, height, width = sampler.shape

    @batch  # type: ignore[untyped-decorator]  # pytriton is not installed where types are checked
    def infer(seed: Any, image_index: Any, label: Any) -> dict[str, Any]:
        """Sample a batch; inputs are int64 [B, 1]."""
        return {"pixels": sampler(steps, seed[:, 0], image_index[:, 0], label[:, 0])}

    triton.bind(
        model_name=f"steps_{steps}",
        infer_func=infer,
        inputs=[Tensor(name=name, dtype=np.int64, shape=(1,)) for name in INPUTS],
        outputs=[Tensor(name="pixels", dtype=np.uint8, shape=(height, width, channels))],
        config=ModelConfig(
            max_batch_size=options.width,
            batcher=DynamicBatcher(
                max_queue_delay_microseconds=round(1000 * options.delay_ms),
                preferred_batch_size=[options.batch] if options.batch else None,
            ),
        ),
        strict=True,
    )


def main() -> None:
    """Serve until a signal."""
    options = parse_peer_options(__doc__)
    config = TritonConfig(
        http_address="127.0.0.1",
        http_port=options.port,
        grpc_address="127.0.0.1",
        grpc_port=options.port + 1,
        metrics_port=options.port + 2,
        allow_gpu_metrics=False,
    )
    with Triton(config=config) as triton:
        for steps in options.steps:
            bind(triton, options, steps)
        triton.serve()


if __name__ == "__main__":
    main()
