"""The verb `curate`: choose image-caption pairs by MetaCLIP's curation, with an audit.

With several processes: `launch=torchrun launch.processes=N`, or `torchrun ... -m launch.verbs.curate OVERRIDES`.
"""

from __future__ import annotations

import os
import sys
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.config import load
from core.errors import ConfigError
from core.files import local_path, locate
from data.curation.config import CurationRules
from data.images.parts import PartsConfig
from launch.config import LaunchKind, local_launch
from launch.ranks import run_verb


@dataclass(frozen=True)
class CurateConfig(CurationRules):
    """Keep image-caption pairs whose caption matches an entry of the metadata, balanced over the entries."""

    input: str = "???"
    """A file, a folder or a glob pattern of jsonl, parquet or WebDataset tars."""
    metadata: str = "???"
    """A text file with an entry on each line."""
    out: str = "curated"
    """Directory to create."""
    parts: PartsConfig = field(default_factory=PartsConfig)
    launch: dict[str, Any] = field(default_factory=dict)


def run(config: CurateConfig) -> int:
    """Curate and print a summary of the audit."""
    from data.curation.audit import AUDIT, CURVE, summary
    from data.curation.curate import KEPT, Curation
    from data.curation.matching import read_metadata
    from data.files import find_files
    from data.filter.config import under
    from data.filter.store import OneWorker
    from data.images.readers import SUFFIXES

    launch, out = local_launch(config.launch), local_path("out", config.out)
    if os.path.lexists(out):
        raise ConfigError("out", config.out, "exists already; choose another directory or remove it")
    with under("input"):
        files = find_files(config.input, SUFFIXES)
    metadata = read_metadata(locate(config.metadata))
    if launch.kind is LaunchKind.torchrun:
        return run_verb("curate", config, launch)
    from launch.filter.workers import WorldWorkers
    from parallel.comm.world import connect

    rules = CurationRules(config.t, config.seed, config.max_characters)
    with closing(connect()) as world:
        workers = WorldWorkers(world) if world.size > 1 else OneWorker()
        audit = Curation(files, config.parts, metadata, rules, workers).run(out)
        if world.is_main:
            print("\n".join(summary(audit)))
            print(f"pairs: {out / KEPT}, audit: {out / AUDIT}, balance curve: {out / CURVE}")
    return 0


def main(arguments: list[str]) -> int:
    """Curate in one of the processes that torchrun started."""
    return run(load("curate", CurateConfig, arguments))


if __name__ == "__main__":
    if not sys.flags.safe_path and Path.cwd().resolve() != Path(__file__).resolve().parents[2]:
        del sys.path[0]
    from core.process import end_process, run_process

    end_process(run_process(main))
