"""Balance the matches of metadata entries (Xu et al. 2023, arXiv 2309.16671, section 3.3).

An entry with `count` matches keeps each of them with probability p = min(1, t / count). A pair is kept if one of its
entries keeps it: with probability 1 - prod(1 - p). Whether a pair is kept is a pure function of the seed, the pair's
content and the counts, so neither the files, their order nor the processes matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from data.sampling import key_of


def keep_probabilities(counts: NDArray[np.int64], t: int) -> NDArray[np.float64]:
    """Return the probability of each entry, min(1, t / count)."""
    return t / np.maximum(counts, t)


def is_kept(pair: str, probabilities: Iterable[float], seed: int) -> bool:
    """Decide whether a pair is kept, given the probabilities of its entries. `pair`: its digest.

    One number drawn by hash replaces MetaCLIP's draw for each entry: the probability of the pair is the same.
    """
    lost = math.prod(sorted(1 - one for one in probabilities))  # sorted: rounding does not depend on the order
    return key_of("curation", seed, pair) < (1 - lost) * 2**64
