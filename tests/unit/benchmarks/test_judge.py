"""The judge's features as an ONNX file: what `iddpm evaluate samples` computes with it is what the judge computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from benchmarks.judge import BUNDLED_CLASSES, BUNDLED_JUDGE, BUNDLED_SHAPE, Judge, features_of, main
from trainer.evaluation.extractors import open_extractor


def test_the_exported_features_are_those_of_the_judge(tmp_path: Path) -> None:
    main([str(tmp_path / "features.onnx")])
    judge = Judge(BUNDLED_SHAPE, BUNDLED_CLASSES)
    judge.load_state_dict(load_file(BUNDLED_JUDGE))
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 1), dtype=np.uint8)
    found = open_extractor(tmp_path / "features.onnx")(pixels)
    np.testing.assert_allclose(found.features, features_of(judge.eval(), pixels), rtol=1e-4, atol=1e-4)
    assert (found.logits, found.spatial) == (None, None)
    assert [path.name for path in tmp_path.iterdir()] == ["features.onnx"]
