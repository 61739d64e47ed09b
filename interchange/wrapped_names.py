"""Names of weights changed by wrappers: DataParallel, torch.compile, FSDP, or a class that contains the network."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from formats.checkpoint_config import CheckpointError

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
"""Parts of names that PyTorch's wrappers add; no network here has them."""


def without_wrappers(weights: Mapping[str, Tensor], anchor: str) -> tuple[dict[str, Tensor], list[str]]:
    """Remove the parts added by wrappers from the names of weights, and a prefix that all names share.

    Args:
        weights: by name.
        anchor: the name of a weight of the network; if exactly one name ends in it, the part before is the prefix.

    Returns:
        The weights by their plain names, and the removed parts; empty if names were plain.

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
                f"two weights are called {plain} after wrapper prefixes are removed: save only one network"
            )
        renamed[plain] = tensor
    prefixes = [name.removesuffix(anchor) for name in renamed if name.endswith(f".{anchor}")]
    if len(prefixes) == 1 and all(name.startswith(prefixes[0]) for name in renamed):
        renamed = {name.removeprefix(prefixes[0]): tensor for name, tensor in renamed.items()}
        taken += prefixes
    return renamed, list(dict.fromkeys(taken))
