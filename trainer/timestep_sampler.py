"""Draw the training timesteps of a batch, and the loss weights that preserve the expectation."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
WeightArray = npt.NDArray[np.float32]
State = dict[str, npt.NDArray[Any]]

Rng = np.random.Generator | np.random.RandomState
"""RandomState, numpy's older generator, draws the same numbers as OpenAI's released code does."""


class TimestepSampler(Protocol):
    """Draws timesteps, may adapt to their losses, and can save its state."""

    uses_losses: bool
    """Whether `update` does anything; if not, the losses need not leave their device."""

    def sample(self, rng: np.random.Generator, batch_size: int) -> tuple[IntArray, WeightArray]:
        """Draw timesteps int64 [B], and the weights float32 [B] that make a weighted mean loss unbiased.

        All randomness comes from rng: with saved rng and `state_dict`, a resumed run draws the same timesteps.
        """
        ...

    def update(self, t: IntArray, losses: npt.NDArray[np.floating[Any]]) -> None:
        """Record the unweighted losses [B] at timesteps [B] (of all devices)."""
        ...

    def state_dict(self) -> State:
        """Return a copy of the state that `update` changes, as arrays by name."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Restore a saved state.

        Raises:
            ValueError: the state belongs to another sampler or another number of timesteps.
        """
        ...


class _Stateless:
    """A sampler that does not use losses."""

    uses_losses = False

    def update(self, t: IntArray, losses: npt.NDArray[np.floating[Any]]) -> None:
        """Ignore the losses."""

    def state_dict(self) -> State:
        return {}

    def load_state_dict(self, state: State) -> None:
        _check_names(state, set())


class UniformSampler(_Stateless):
    """Draws every timestep with the same probability; all weights are 1."""

    def __init__(self, num_timesteps: int) -> None:
        self.num_timesteps = num_timesteps

    def weights(self) -> FloatArray:
        """Return the relative probabilities of the timesteps, float64 [T]."""
        return np.ones(self.num_timesteps)

    def sample(self, rng: Rng, batch_size: int) -> tuple[IntArray, WeightArray]:
        return _draw(self.weights(), rng, batch_size)


class StratifiedSampler(_Stateless):
    """Draws one timestep from each of B equal parts of the chain, shuffled; all weights are 1.

    The timestep of each image is uniform, but a batch always covers the entire chain, which reduces the noise of its
    mean loss: the idea of Kingma et al. 2021 (arXiv:2107.00630), who shift one grid by one
    random offset where this draws inside each part independently.
    """

    def __init__(self, num_timesteps: int) -> None:
        self.num_timesteps = num_timesteps

    def sample(self, rng: np.random.Generator, batch_size: int) -> tuple[IntArray, WeightArray]:
        position = (np.arange(batch_size) + rng.random(batch_size)) / batch_size
        t = np.minimum((position * self.num_timesteps).astype(np.int64), self.num_timesteps - 1)
        rng.shuffle(t)
        return t, np.ones(batch_size, dtype=np.float32)


class LossSecondMomentSampler:
    """Importance sampling of L_vlb: timesteps in proportion to sqrt(E[L_t^2]) (IDDPM section 3.3, Equation 18).

    The expectation is over each timestep's last `history_per_term` losses. Until all timesteps have that many
    losses, sampling is uniform; afterwards a share of `uniform_prob` stays uniform, so that every timestep is drawn.
    """

    uses_losses = True

    def __init__(self, num_timesteps: int, history_per_term: int = 10, uniform_prob: float = 0.001) -> None:
        self.num_timesteps = num_timesteps
        self.history_per_term = history_per_term
        self.uniform_prob = uniform_prob
        self._history = np.zeros((num_timesteps, history_per_term), dtype=np.float64)  # oldest first
        self._counts = np.zeros(num_timesteps, dtype=np.int64)

    @property
    def warmed_up(self) -> bool:
        """True if all timesteps have a full history."""
        return bool((self._counts == self.history_per_term).all())

    def weights(self) -> FloatArray:
        """Return the relative probabilities of the timesteps, float64 [T]; ones during warm-up."""
        if not self.warmed_up:
            return np.ones(self.num_timesteps)
        weights = np.sqrt(np.mean(self._history**2, axis=-1))
        weights /= weights.sum()
        return weights * (1 - self.uniform_prob) + self.uniform_prob / self.num_timesteps

    def sample(self, rng: Rng, batch_size: int) -> tuple[IntArray, WeightArray]:
        return _draw(self.weights(), rng, batch_size)

    def update(self, t: IntArray, losses: npt.NDArray[np.floating[Any]]) -> None:
        """Record losses [B] at timesteps [B], in order; ignore losses that are not finite."""
        for timestep, loss in zip(t.tolist(), losses.tolist(), strict=True):
            if not np.isfinite(loss):
                continue
            count = self._counts[timestep]
            if count < self.history_per_term:
                self._history[timestep, count] = loss
                self._counts[timestep] += 1
            else:
                self._history[timestep, :-1] = self._history[timestep, 1:]
                self._history[timestep, -1] = loss

    def state_dict(self) -> State:
        return {"history": self._history.copy(), "counts": self._counts.copy()}

    def load_state_dict(self, state: State) -> None:
        _check_names(state, {"history", "counts"})
        for name, current in (("history", self._history), ("counts", self._counts)):
            if state[name].shape != current.shape:
                raise ValueError(f"{name} of the timestep sampler must be {current.shape}; got {state[name].shape}")
        self._history = state["history"].astype(np.float64)
        self._counts = state["counts"].astype(np.int64)


def _draw(weights: FloatArray, rng: Rng, batch_size: int) -> tuple[IntArray, WeightArray]:
    probabilities = weights / weights.sum()
    t = rng.choice(len(probabilities), size=(batch_size,), p=probabilities).astype(np.int64)
    return t, (1.0 / (len(probabilities) * probabilities[t])).astype(np.float32)


def _check_names(state: State, wanted: set[str]) -> None:
    if set(state) != wanted:
        raise ValueError(
            f"the state of this timestep sampler has {sorted(wanted) or 'nothing'}; got {sorted(state) or 'nothing'}"
        )
