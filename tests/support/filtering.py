"""Make inputs of random words, run the filter and read its outputs, for tests of the whole filter."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet

from core.files import write_json
from data.filter.audit.outputs import AUDIT_JSON, KEPT, SCORES, audit_of, write_kept, write_scores
from data.filter.config import FilterRules, InputConfig, KeepUnit
from data.filter.input.readers import input_parts
from data.filter.pipeline import Filter, FilterJob
from data.filter.score.ngram import NgramScorer
from data.filter.score.scorer import Direction, Scorer
from data.filter.store import OneWorker, Workers

OUTPUTS = (SCORES, KEPT, AUDIT_JSON)
_TEXT = """the model reads a line and writes another while number adds seven total of apples in basket price where each
shop sells train leaves station at noon slowly because rain had fallen over hills before morning came to town"""
_WORDS = _TEXT.split()


def prose(count: int, seed: int = 0, words: int = 18) -> list[dict[str, Any]]:
    """Return distinct records of random sentences that pass the gates."""
    chance = random.Random(seed)
    return [
        {"text": f"Note {seed}-{n}: " + " ".join(chance.choices(_WORDS, k=words + chance.randrange(words)))}
        for n in range(count)
    ]


def two_sources(root: Path) -> dict[str, Any]:
    """Write two sources, prose and code, of sixty short files each; return their settings."""
    for seed, name in enumerate(("prose", "code")):
        (root / name).mkdir()
        for number, row in enumerate(prose(60, seed, words=30)):
            (root / name / f"{number:03d}.txt").write_text(row["text"])
    weights = {"prose": 1.0, "code": 2.0}
    return {name: {"path": str(root / name), "weight": weight} for name, weight in weights.items()}


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def job(
    source: Path, out: Path, workers: Workers | None = None, scorer: Scorer | None = None, **settings: Any
) -> FilterJob:
    """Return a filter job. `settings`: fields of the rules or of the input."""
    keys = {key: settings.pop(key) for key in list(settings) if key in InputConfig.__dataclass_fields__}
    return FilterJob(
        parts=input_parts(InputConfig(input=str(source), **keys)),
        rules=FilterRules(**{"unit": KeepUnit.documents, **settings}),
        scorer=scorer or NgramScorer(4, sample_bytes=1 << 16),
        directory=out / "stages",
        workers=workers or OneWorker(),
        report=lambda line: None,
    )


def write_outputs(done: Filter, out: Path) -> None:
    write_scores(done, out / SCORES)
    write_kept(done, out / KEPT)
    write_json(out / AUDIT_JSON, audit_of(done, "in.jsonl"))  # without the page, which takes a second


def filtered(source: Path, out: Path, scorer: Scorer | None = None, **settings: Any) -> Filter:
    """Filter with one process, as the command does."""
    done = Filter(job(source, out, scorer=scorer, **settings))
    done.run()
    write_outputs(done, out)
    return done


def rows_in(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pyarrow.parquet.read_table(out / SCORES).to_pylist()
    return found


def rows_of(done: Filter) -> list[dict[str, Any]]:
    return rows_in(done.job.directory.parent)


def kept(out: Path) -> list[bytes]:
    return (out / KEPT).read_bytes().split(b"\n")[:-1]


def outputs(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in OUTPUTS}


class FixedScorer(Scorer):
    name, measures, direction = "fixed", "score of the test", Direction.hard

    def __init__(self, score_of: Any, fingerprint: str = "fixed") -> None:
        self.score_of, self.fingerprint = score_of, fingerprint

    def score(self, records: Any) -> Any:
        return np.array([self.score_of(record) for record in records], np.float64)
