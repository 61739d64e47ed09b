"""DenoiserEnsemble: the loaded networks of an ensemble, which share a process and are used at different timesteps."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias

from diffusion.arrays import A
from diffusion.config import CheckpointConfig
from diffusion.respacing import IntArray
from service.backends.base import Denoiser, GuidingClassifier
from service.errors import ModelError

LEAST_ROWS = 2
"""Rows of an image with classifier-free guidance."""


@dataclass(frozen=True, eq=False, kw_only=True)
class DenoiserEnsemble(Generic[A]):
    """Several denoisers of one backend, on one device. All have a classifier, the same one, or none has."""

    config: CheckpointConfig
    """The configuration of the ensemble; image shape, classes and process are those of every member."""
    names: tuple[str, ...]
    members: tuple[Denoiser[A], ...]
    network_of: IntArray
    """int64 [T]: index of the member of each training timestep."""

    @property
    def description(self) -> str:
        """Return the members' description with their names."""
        kinds = dict.fromkeys(member.description for member in self.members)
        return f"ensemble of {', '.join(self.names)}: {'; '.join(kinds)}"

    @property
    def network_id(self) -> str:
        """Return the identity of everything besides the inputs that determines outputs, as `Denoiser.network_id`."""
        parts = [*(member.network_id for member in self.members), self.network_of.astype("<i8").tobytes().hex()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    @property
    def precision(self) -> str:
        """Return the precision of the members; several if they differ."""
        return ", ".join(dict.fromkeys(member.precision for member in self.members))

    @property
    def threads(self) -> int:
        """Return the number of CPU threads of a network call, as `Denoiser.threads`."""
        return self.members[0].threads

    @property
    def classifier(self) -> GuidingClassifier[A] | None:
        """Return the classifier of the first member."""
        return self.members[0].classifier

    @property
    def xp(self) -> Any:
        """Return the module that creates input arrays."""
        return self.members[0].xp


LoadedModel: TypeAlias = "Denoiser[Any] | DenoiserEnsemble[Any]"


def networks_of(model: Denoiser[A] | DenoiserEnsemble[A]) -> tuple[Denoiser[A], ...]:
    """Return the networks of a loaded model: one, or the members of an ensemble."""
    return model.members if isinstance(model, DenoiserEnsemble) else (model,)


def common_sizes(sizes: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the batch sizes, ascending, that are in every tuple.

    Raises:
        ModelError: there is none of 2 rows or more; an image with guidance takes 2.
    """
    common = sorted(set.intersection(*(set(one) for one in sizes)))
    if not common or common[-1] < LEAST_ROWS:
        raise ModelError("the networks of an ensemble have no batch size in common whose rows are bit-identical")
    return tuple(common)
