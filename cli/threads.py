"""Threads of torch: as many as can run."""

from __future__ import annotations

from service.cpus import available_cpus


def limit_torch_threads() -> None:
    """Keep torch to the CPU quota of this container; by itself it looks at the affinity only."""
    import torch

    torch.set_num_threads(min(torch.get_num_threads(), available_cpus().usable))
