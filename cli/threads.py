"""The number of torch threads."""

from __future__ import annotations

from service.cpus import available_cpus


def limit_torch_threads() -> None:
    """Limit torch's threads to the container's CPU quota; torch itself reads the CPU affinity only."""
    import torch

    torch.set_num_threads(min(torch.get_num_threads(), available_cpus().usable))
