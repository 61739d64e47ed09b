"""Who stands where in a network call: images first, then a second row for each guided one, then padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

IMAGE_SLOT, ROW_IMAGE, ROW_IS_NULL, UNCOND_ROW = range(4)
"""Rows of a layout."""


def lay_out(slots: Sequence[int], guided: Sequence[int], size: int, spare_slot: int) -> npt.NDArray[np.int64]:
    """Write a step's layout: int64 [4, size]. Of what changes, a captured step is told nothing else by the host.

    Args:
        slots: of the images, in order.
        guided: places among them of those with classifier-free guidance, ascending.
        size: rows of the network call.
        spare_slot: one that is nobody's, for places without an image.

    Returns:
        By place: the slot of the image there. By network row: the place of its image, and 1 where it is without class.
        By place: the row without class of the image there, which is its own where it is not guided.
    """
    count, used = len(slots), len(slots) + len(guided)
    layout = np.zeros((4, size), dtype=np.int64)
    layout[IMAGE_SLOT] = spare_slot
    layout[IMAGE_SLOT, :count] = slots
    layout[ROW_IMAGE, :count] = range(count)
    layout[ROW_IMAGE, count:used] = guided
    layout[ROW_IS_NULL, count:used] = 1
    layout[UNCOND_ROW] = range(size)
    layout[UNCOND_ROW, list(guided)] = range(count, used)
    return layout


def lay_out_classified(
    slots: Sequence[int], asking: Sequence[int], size: int, spare: tuple[int, int]
) -> npt.NDArray[np.int64]:
    """Write a classifier call's layout: int64 [2, size], by row the slot and the place of its image.

    Args:
        slots: of the step's images, in order.
        asking: places among them of those that the classifier is asked about.
        size: rows of the classifier call.
        spare: slot and place that are nobody's, for padding.
    """
    layout = np.empty((2, size), dtype=np.int64)
    layout[:] = np.array(spare)[:, None]
    layout[0, : len(asking)] = [slots[place] for place in asking]
    layout[1, : len(asking)] = asking
    return layout
