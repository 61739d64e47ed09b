"""What an actor with an engine gets from Ray: CPUs, and with CUDA one GPU."""

from __future__ import annotations

from service.settings import Settings


def refuse_one_gpu(settings: Settings) -> None:
    """Check that the settings do not name one of several GPUs.

    Raises:
        ValueError: they do.
    """
    if settings.device.startswith("cuda:"):
        raise ValueError(f"IDDPM_DEVICE: {settings.device!r} names one GPU, but Ray gives each actor one: set 'cuda'")


def gpus_of(settings: Settings) -> int:
    """Return the number of GPUs that an actor needs."""
    return 1 if settings.device == "cuda" else 0


def with_threads(settings: Settings, cpus: float) -> Settings:
    """Return settings in which an actor without `IDDPM_THREADS` has a thread per CPU, not all CPUs of its node.

    Args:
        settings: of the engine.
        cpus: that Ray reserves for the actor; a part of one counts as one.
    """
    if settings.threads is not None:
        return settings
    return settings.model_copy(update={"threads": max(1, int(cpus))})
