"""Names of weights that a wrapper changed: DataParallel, torch.compile, FSDP, or a class around the network."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from formats.checkpoint_config import CheckpointError

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
"""Parts of names that PyTorch's wrappers add, and no network here has."""


def without_wrappers(weights: Mapping[str, Tensor], anchor: str) -> tuple[dict[str, Tensor], list[str]]:
    """Take out of the names of weights what wrappers put in, and a prefix that all names share.

    Args:
        weights: by name.
        anchor: a name that the network has; where one name ends in it, what comes before is the prefix.

    Returns:
        The weights by their plain names, and what was taken out; empty where names were plain.

    Raises:
        CheckpointError: two weights would get the same name.
    """
    taken: list[str] = []
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        parts = name.split(".")
        taken += [f"{part}." for part in parts if part in WRAPPERS]
        plain = ".".join(part for part in parts if part not in WRAPPERS)
        if plain in renamed:
            raise CheckpointError(
                f"two weights are called {plain} without what wrappers put before: save only one network"
            )
        renamed[plain] = tensor
    prefixes = [name.removesuffix(anchor) for name in renamed if name.endswith(f".{anchor}")]
    if len(prefixes) == 1 and all(name.startswith(prefixes[0]) for name in renamed):
        renamed = {name.removeprefix(prefixes[0]): tensor for name, tensor in renamed.items()}
        taken += prefixes
    return renamed, list(dict.fromkeys(taken))
