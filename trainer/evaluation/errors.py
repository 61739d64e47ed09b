"""Errors of an evaluation that a user can fix."""

from __future__ import annotations


class EvaluationError(ValueError):
    """Files or options do not allow an evaluation; the message names the reason and the remedy."""
