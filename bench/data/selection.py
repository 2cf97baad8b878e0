"""Measure time and memory of selecting half the tokens by cached scores, in parquet files of a million records each.

The default is two million records. The floor is 300 s for 100 million, which need 2.5 GB of files under $TMPDIR:
`SELECTION_RECORDS=100000000 python -m bench selection`. There are four domains and eight length buckets, and a tenth of
the kept records is drawn at random from easy ones. The time includes a pass that finds which records were kept.
"""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from bench.measure import Result
from data.filter.config import FilterRules, SelectConfig
from data.filter.select.selection import REASONS, ShardScores, select

RECORDS, SHARD = int(os.environ.get("SELECTION_RECORDS", 2_000_000)), 1_000_000
DOMAINS = ("web", "code", "books", "papers")
COLUMNS = ["score", "domain", "length", "tokens", "hash"]
BYTES_A_RECORD = 5 * 8
ALLOWED_S, OF_RECORDS = 300, 100_000_000


def write(folder: Path) -> None:
    """Write scores around 3 nats, which fall with length, and lengths over four orders of magnitude."""
    import pyarrow
    import pyarrow.parquet

    for start in range(0, RECORDS, SHARD):
        random, count = np.random.default_rng(start), min(SHARD, RECORDS - start)
        length = np.exp(random.normal(7.5, 1.3, count)).astype(np.int64) + 1
        columns = {
            "score": random.gamma(9, 1 / 3, count) - np.log(length) / 20,
            "domain": random.choice(len(DOMAINS), count, p=[0.7, 0.15, 0.1, 0.05]).astype(np.int16),
            "length": length,
            "tokens": length // 4 + 1,
            "hash": random.integers(0, 2**64, count, dtype=np.uint64),
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / f"{start:012}.parquet")


def shards(folder: Path) -> Iterable[ShardScores]:
    import pyarrow.parquet

    for path in sorted(folder.iterdir()):
        table = pyarrow.parquet.read_table(path, columns=COLUMNS)
        score, domain, length, tokens, hash_ = (table[name].to_numpy() for name in COLUMNS)
        yield ShardScores(path.name, score, domain.astype(np.int64), length, tokens, hash_)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run() -> list[Result]:
    rules = FilterRules(keep=0.5, select=SelectConfig(revive=0.1))
    with tempfile.TemporaryDirectory() as root:
        write(Path(root))
        before, begin, passes = peak_bytes(), time.perf_counter(), 0

        def one_pass() -> Iterable[ShardScores]:
            nonlocal passes
            passes += 1
            return shards(Path(root))

        decision = select(one_pass, DOMAINS, rules)
        kept = np.zeros(len(DOMAINS))
        for shard in one_pass():
            stays = np.array([reason.kept for reason in REASONS])[decision.reasons(shard)]
            kept += np.bincount(shard.domain, shard.weight * stays, len(DOMAINS))
        seconds, peak = time.perf_counter() - begin, peak_bytes()
    off = float(np.abs(kept / decision.passed / rules.keep - 1).max())
    if not off < 0.01:
        raise AssertionError(f"the kept fraction of a domain is off by {off:.2%}, so the timing is meaningless")
    allowed_s = ALLOWED_S * RECORDS / OF_RECORDS
    note = f"second column: {ALLOWED_S} s per {OF_RECORDS:,}; {passes} passes; kept fraction off by {off:.0e} at most"
    name = f"selection of {RECORDS:,} cached scores"
    ratio, columns = seconds / allowed_s, RECORDS * BYTES_A_RECORD
    memory = f"whole process; {before / 2**30:.2f} before; second column: all columns in memory"
    return [
        Result(f"{name} (s)", seconds, allowed_s, ratio, "<= 1", ratio <= 1, note),
        Result(f"{name}, peak memory (GiB)", peak / 2**30, columns / 2**30, peak / columns, "-", True, memory),
    ]
