"""Confidence intervals of scores, and tests of two models that answered the same questions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from core.errors import ConfigError

RESAMPLES, FLIPS, SEED = 2000, 10_000, 0
_MOST_EXACT = 12
"""Differences that are not 0, up to which all signs are tried."""
_Z = 1.959963984540054
"""The 97.5th percentile of the normal distribution."""
RESULT_SHAPE = {"fingerprint": str, "answers": [{"id": str, "score": (float, None)}]}
"""What `compare` needs of a result."""


@dataclass(frozen=True)
class ScoreInterval:
    """A 95% confidence interval of a mean score."""

    low: float
    high: float
    method: str


def interval(scores: Sequence[float]) -> ScoreInterval | None:
    """Return Wilson's interval (Wilson 1927) if all scores are 0 or 1, and otherwise that of the bootstrap's
    percentiles (Efron 1979), with a fixed seed. None without scores.
    """
    count = len(scores)
    if not count:
        return None
    if set(scores) <= {0, 1}:
        share = sum(scores) / count
        middle = share + _Z**2 / (2 * count)
        half = _Z * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
        scale = 1 + _Z**2 / count
        low, high = (middle - half) / scale, (middle + half) / scale
        return ScoreInterval(low if share else 0.0, high if share < 1 else 1.0, "wilson")  # the ends without rounding
    drawn = np.random.default_rng(SEED).integers(count, size=(RESAMPLES, count))
    means = np.asarray(scores, dtype=np.float64)[drawn].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return ScoreInterval(float(low), float(high), "bootstrap")


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Compare two results (of the shape `RESULT_SHAPE`) question by question; `difference` is second less first.

    `p_value`: two-sided, by McNemar's exact test if all scores are 0 or 1, and otherwise by a permutation test that
    flips the signs of the differences. Questions without a score in one of them do not count. Raises `ConfigError` for
    results of different questions.
    """
    if first["fingerprint"] != second["fingerprint"]:
        reason = "asks other questions than the other result: run both models on the same suite with the same code"
        raise ConfigError("fingerprint", second["fingerprint"][:12], reason)
    before = {one["id"]: one["score"] for one in first["answers"]}
    after = {one["id"]: one["score"] for one in second["answers"]}
    if before.keys() != after.keys():
        raise ConfigError("fingerprint", second["fingerprint"][:12], "a result lacks answers that the other has")
    pairs = [(score, after[name]) for name, score in before.items() if score is not None and after[name] is not None]
    differences = [b - a for a, b in pairs]
    is_binary = {score for pair in pairs for score in pair} <= {0, 1}
    return {
        "questions": len(pairs),
        "left_out": len(before) - len(pairs),
        "better": sum(one > 0 for one in differences),
        "worse": sum(one < 0 for one in differences),
        "difference": sum(differences) / len(pairs) if pairs else None,
        "p_value": mcnemar(differences) if is_binary else sign_flip(differences),
        "test": "mcnemar_exact" if is_binary else "sign_flip",
    }


def mcnemar(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of McNemar's exact test (McNemar 1947): under the null hypothesis, each question
    that only one model answers is equally likely to be either's.
    """
    better, worse = (sum(sign * one > 0 for one in differences) for sign in (1, -1))
    count = better + worse
    tail = sum(math.comb(count, k) for k in range(min(better, worse) + 1))
    return min(1.0, tail / 2 ** (count - 1)) if count else 1.0


def sign_flip(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of Fisher's permutation test for pairs: all signs if few differences are not 0,
    otherwise random ones with a fixed seed.
    """
    values = np.array([one for one in differences if one], dtype=np.float64)
    count = len(values)
    if not count:
        return 1.0
    if count <= _MOST_EXACT:
        signs = 1 - 2 * (np.arange(2**count)[:, None] >> np.arange(count) & 1)
        return float((abs(signs @ values) >= abs(values.sum()) - 1e-12).mean())
    generator = np.random.default_rng(SEED)
    sums = np.array([(generator.choice((-1, 1), count) * values).sum() for _ in range(FLIPS)])
    return float(((abs(sums) >= abs(values.sum()) - 1e-12).sum() + 1) / (FLIPS + 1))
