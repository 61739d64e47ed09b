"""Paths in the repository that tests read."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "models" / "fashion32"
"""The bundled model's checkpoint, with its artifact."""
