"""A learning-rate schedule."""

from __future__ import annotations


def inverse_sqrt(step: int, steps: int, scale: float = 10.0) -> float:
    """Return a factor that falls with the square root of the step."""
    return (scale / (scale + step)) ** 0.5
