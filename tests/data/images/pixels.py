"""Count what is in a picture without knowing how it was made."""

from __future__ import annotations

import numpy as np


def components(mask: np.ndarray) -> int:
    """Return the number of groups of set pixels that touch, corners included."""
    left, found = set(zip(*np.nonzero(mask), strict=True)), 0
    while left:
        found, edge = found + 1, [left.pop()]
        while edge:
            y, x = edge.pop()
            near = {(y + a, x + b) for a in (-1, 0, 1) for b in (-1, 0, 1)} & left
            left -= near
            edge.extend(near)
    return found
