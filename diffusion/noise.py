"""Counter-based noise: every normal is a function of (seed, image index, step, element) only.

There is no generator and no state, so an image gets the same noise in any batch, in any order, on any replica and
after any retry. Words come from Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3",
section 3.3) with the key (seed's low word, seed's high word) and the counter (element block, step, image index,
stream); a block is four consecutive elements of an image in C, H, W order. Words become normals by Box & Muller
(1958), computed in float64 and rounded to float32. Libraries whose logarithms differ in the last bit of a float64,
and vectorised loops whose remainder takes another path, then give the same float32, except for about one element in
10^9 that lies on the border between two float32 values.

Words are the same for arrays and tensors on every device; normals agree to 1e-6.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from diffusion.arrays import A, namespace, on_host

STREAM_X_T: Final = 0
"""x_T, the start of a chain; the step is 0."""
STREAM_STEP: Final = 1
"""The noise that a sampling step adds; the step counts network calls from 0, the noisiest."""
STREAM_CLASS: Final = 2
"""The class of an image whose request specifies none; the step is 0."""
STREAM_KEPT: Final = 3
"""The noise of pixels that are kept from a given image; steps as for `STREAM_STEP`."""
STREAM_JUMP: Final = 4
"""The noise of a jump back to a noisier timestep after a step; steps as for `STREAM_STEP`."""

STREAM_TRAINING: Final = 16
"""The noise of a training image; image index and step are the low and high word of its position in the data."""
STREAM_AUGMENTATION: Final = 17
"""The uniforms that crop and flip a training image and drop its label; words as for `STREAM_TRAINING`."""
STREAM_VALIDATION: Final = 18
"""The noise of a held-out image; image index and step are the low and high word of its index."""
STREAM_EVALUATION: Final = 64
"""The noise of x_t where a bound is evaluated; the step is the training timestep, the image index that of the data."""

MAX_SEED: Final = 2**53 - 1
"""The largest seed: JSON readers that parse numbers as float64 represent integers exactly up to here."""
MAX_WORD: Final = 2**32 - 1
"""The largest step and block."""
MAX_IMAGE_INDEX: Final = MAX_WORD
"""The largest image index of a seed, in every interface: one word of the counter holds it."""

ELEMENTS_PER_BLOCK: Final = 4

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)

Words = tuple[Any, Any, Any, Any]
"""Four 32-bit words, each an int64 numpy array, an int64 tensor or a Python integer in 0..2^32-1."""


def philox(counter: Words, key: tuple[Any, Any]) -> Words:
    """Compute Philox4x32-10.

    Works on anything with `*`, `>>`, `&` and `^` whose products are exact or wrap at 64 bits; shapes broadcast.
    (int64 products wrap to the correct low 64 bits, and masking after the shift removes the sign.)

    Args:
        counter: four words.
        key: two words.

    Returns:
        Four random words, shaped like the broadcast of counter and key.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0 = c0 * _MULTIPLIERS[0]
        product1 = c2 * _MULTIPLIERS[1]
        c0 = ((product1 >> 32) ^ c1 ^ k0) & MAX_WORD
        c2 = ((product0 >> 32) ^ c3 ^ k1) & MAX_WORD
        c1 = product1 & MAX_WORD
        c3 = product0 & MAX_WORD
        k0 = (k0 + _KEY_INCREMENTS[0]) & MAX_WORD
        k1 = (k1 + _KEY_INCREMENTS[1]) & MAX_WORD
    return c0, c1, c2, c3


def normal(seeds: A, image_indices: A, steps: A, stream: int, shape: tuple[int, int, int]) -> A:
    """Return standard normals for a batch of images; a row depends on its own arguments only.

    Nothing here waits for a device, so it may be captured into a CUDA graph. For the same reason, ranges are checked
    for arrays in host memory only; the caller checks the values of arrays on another device.

    Args:
        seeds: int64 [B], 0..2^53-1.
        image_indices: int64 [B], 0..2^32-1: index of each image within its request.
        steps: int64 [B], 0..2^32-1: see the streams.
        stream: one of the streams of normals above.
        shape: (C, H, W). The first elements do not depend on it: a larger image begins like a smaller one.

    Returns:
        float32 [B, C, H, W] on the device of seeds, each within +-6.77 (a limit of 32-bit uniforms; one normal in
        10^11 would lie beyond).

    Raises:
        ValueError: a value in host memory is out of range; an array is not int64.
    """
    xp = namespace(seeds)
    for name, values, limit in (
        ("seeds", seeds, MAX_SEED),
        ("image_indices", image_indices, MAX_IMAGE_INDEX),
        ("steps", steps, MAX_WORD),
    ):
        if values.dtype != xp.int64:
            raise ValueError(
                f"{name} must be int64, because Philox needs products that wrap at 64 bits; got {values.dtype}"
            )
        if on_host(values) and len(values):
            check_range(name, int(values.min()), int(values.max()), limit)
    return unchecked_normal(seeds, image_indices, steps, stream, shape)


def unchecked_normal(seeds: A, image_indices: A, steps: A, stream: int, shape: tuple[int, int, int]) -> A:
    """Return what `normal` returns, without checking the arguments; uses pointwise operations only."""
    xp = namespace(seeds)
    elements = math.prod(shape)
    blocks = xp.arange(-(-elements // ELEMENTS_PER_BLOCK), dtype=xp.int64, device=seeds.device)[None]  # [1, blocks]
    counter = (blocks, steps[:, None], image_indices[:, None], stream)
    words = philox(counter, (seeds[:, None] & MAX_WORD, seeds[:, None] >> 32))

    normals = []
    for first in (0, 2):
        uniform = (xp.astype(words[first], xp.float64) + 0.5) * 2.0**-32
        radius = xp.sqrt(-2.0 * xp.log(uniform))
        angle = (xp.astype(words[first + 1], xp.float64) + 0.5) * (2.0**-32 * 2.0 * math.pi)
        normals += [radius * xp.cos(angle), radius * xp.sin(angle)]
    stacked = xp.stack([xp.astype(part, xp.float32) for part in normals], axis=2)  # [B, blocks, 4]
    flat = xp.reshape(stacked, (len(seeds), blocks.shape[1] * ELEMENTS_PER_BLOCK))
    return xp.reshape(flat[:, :elements], (len(seeds), *shape))


def uniform(
    seed: int, image_indices: npt.NDArray[np.int64], steps: npt.NDArray[np.int64], stream: int, count: int
) -> npt.NDArray[np.float64]:
    """Return uniform numbers in (0, 1) for a batch of images, float64 [B, count]; arguments as for `normal`.

    Each has 32 random bits, and a row depends on its own arguments only.
    """
    blocks = np.arange(-(-count // ELEMENTS_PER_BLOCK), dtype=np.int64)[None]
    counter = (blocks, steps[:, None], image_indices[:, None], np.int64(stream))
    words = np.stack(np.broadcast_arrays(*philox(counter, (seed & MAX_WORD, seed >> 32))), axis=2)
    return (words.reshape(len(image_indices), -1)[:, :count] + 0.5) * 2.0**-32


def draw_class(seed: int, image_index: int, num_classes: int) -> int:
    """Draw the class of an image whose request specifies none, uniformly from 0..num_classes-1.

    64 random bits are multiplied by num_classes and truncated, so no class is favoured by more than
    num_classes / 2^64.

    Raises:
        ValueError: an argument is out of range.
    """
    check_range("seed", seed, seed, MAX_SEED)
    check_range("image_index", image_index, image_index, MAX_IMAGE_INDEX)
    if not 1 <= num_classes <= MAX_WORD:
        raise ValueError(f"num_classes must be in 1..{MAX_WORD}; got {num_classes}")
    low, high, _, _ = philox((0, 0, image_index, STREAM_CLASS), (seed & MAX_WORD, seed >> 32))
    return int(((high << 32 | low) * num_classes) >> 64)


def check_range(name: str, lowest: int, highest: int, limit: int) -> None:
    """Check that lowest and highest lie in 0..limit.

    Raises:
        ValueError: one of them does not; names the argument and its range.
    """
    if lowest < 0 or highest > limit:
        raise ValueError(f"{name} must be in 0..{limit}; got {lowest if lowest < 0 else highest}")
