"""The classes of an evaluation's images, and images read from npz files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from trainer.evaluation.errors import EvaluationError
from trainer.evaluation.sample_files import (
    labels_by_frequency,
    stored_images,
)

PIXELS = np.random.default_rng(0).integers(0, 256, (11, 4, 6, 3), dtype=np.uint8)


def test_stored_images_are_read_in_batches_of_any_archive(tmp_path: Path) -> None:
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "images.npz", arr_0=PIXELS)
        stored = stored_images(tmp_path / "images.npz")
        assert stored is not None
        assert stored.shape == PIXELS.shape
        assert [len(batch) for batch in stored.batches(4)] == [4, 4, 3]
        assert np.array_equal(np.concatenate(list(stored.batches(4))), PIXELS)
    np.savez(tmp_path / "moments.npz", mu=np.zeros(3))
    assert stored_images(tmp_path / "moments.npz") is None
    np.savez(tmp_path / "float.npz", arr_0=PIXELS.astype(np.float32))
    with pytest.raises(EvaluationError, match="uint8"):
        stored_images(tmp_path / "float.npz")
    (tmp_path / "text.npz").write_text("no archive at all")
    with pytest.raises(EvaluationError, match=r"text\.npz"):
        stored_images(tmp_path / "text.npz")


def test_labels_by_frequency_are_those_of_the_data_rounded_to_whole_images() -> None:
    data = np.repeat([0, 1, 3], [50, 30, 20])
    labels = labels_by_frequency(11, data, 4)
    assert np.bincount(labels, minlength=4).tolist() == [6, 3, 0, 2]
    assert np.array_equal(labels, labels_by_frequency(11, data, 4))
    assert not np.array_equal(labels, np.sort(labels))
