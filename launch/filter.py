"""The verb `filter`: leave out of a file or data set what is easy, broken or repeated, with an audit.

On several processes: `leviathan filter processes=N ...`, or `torchrun ... -m launch.filter OVERRIDES`.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.config import build, load, plain
from core.errors import ConfigError, LeviathanError
from core.files import read_json, write_json
from data.config import TokenizerConfig
from data.filter.config import FilterRules
from data.filter.inputs import InputConfig, parts
from data.filter.make import make_scorer
from data.filter.outputs import KEPT, SCORES, write_kept, write_scores
from data.filter.pipeline import Filter, Job
from data.filter.store import OneWorker, Workers
from data.tokenizer import Tokenizer, from_file

STAGES = "stages"


@dataclass(frozen=True)
class FilterConfig(FilterRules, InputConfig):
    """`out`: the directory to make, or to go on with. `tokenizer`: what counts tokens (a tokenizer.json or a folder with
    one); null: bytes stand for them. `processes`: how many filter together on this machine. `explain`: tell the journey
    of the record of this name through a filtering in `out`, and do nothing else.
    """

    out: str = "filtered"
    tokenizer: str | None = None
    processes: int = 1
    explain: str | None = None

    def __post_init__(self) -> None:
        FilterRules.__post_init__(self)
        if self.explain is None:
            InputConfig.__post_init__(self)
        if self.processes < 1:
            raise ConfigError("processes", self.processes, "must be positive")


def run(config: FilterConfig) -> int:
    """Filter, or explain; returns the exit code."""
    out = Path(config.out).expanduser()
    if config.explain is not None:
        print(explain(out, config.explain))
        return 0
    if config.processes > 1 and "WORLD_SIZE" not in os.environ:
        return _processes(config, out)
    workers = _workers()
    done = Filter(_job(config, out, workers))
    done.run()
    if workers.rank == 0:
        write_scores(done, out / SCORES)
        write_kept(done, out / KEPT)
    workers.wait()
    return 0


def _job(config: FilterConfig, out: Path, workers: Workers) -> Job:
    from train.token_losses import token_losses

    def losses(name: str) -> Any:
        return token_losses(name, config.scorer.context, config.scorer.batch)

    tokenizer = _tokenizer(config)
    rules = build(FilterRules, {key: value for key, value in plain(config).items() if key in plain(FilterRules())})
    return Job(
        parts=parts(config),
        rules=rules,
        scorer=make_scorer(config.scorer, losses, out / STAGES),
        directory=out / STAGES,
        workers=workers,
        report=print if workers.rank == 0 else lambda line: None,
        count_tokens=None if tokenizer is None else lambda texts: [len(ids) for ids in tokenizer.encode(texts)],
        tokenizer="bytes" if tokenizer is None else tokenizer.fingerprint,
    )
