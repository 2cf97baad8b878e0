"""Fixtures for all tests: the pool of ranks, a small corpus, the command as a subprocess."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from launch.rank_pool import Pool

torch.set_num_threads(1)  # tensors are small, and threads that wait for each other busily take the cores from others
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pool]:
    """`ranks(n, function, *arguments)`: see launch/rank_pool.py."""
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that train on two small text sources, with a cache that lives as long as the test run."""
    root = tmp_path_factory.mktemp("corpus")
    words = [
        "the",
        "model",
        "reads",
        "a",
        "line",
        "and",
        "writes",
        "another",
        "def",
        "return",
        "if",
        "else",
        "while",
        "for",
    ]
    for source, step in (("prose", 7), ("code", 11)):
        folder = root / source
        folder.mkdir()
        for number in range(60):
            text = " ".join(words[(i * step + number * i) % len(words)] for i in range(400))
            (folder / f"{number}.txt").write_text(f"{number} {text}\n")
    code = f"+data.sources.code={{kind: files, path: '{root / 'code'}', weight: 0.5}}"
    return [
        "data=files",
        f"data.sources.text.path={root / 'prose'}",
        code,
        "data.tokenizer.vocab_size=300",
        f"data.cache={root / 'cache'}",
    ]


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `leviathan ARGUMENTS` in a folder (the test's own by default) and return the finished process."""

    def run(
        *arguments: str, cwd: Path = tmp_path, timeout_s: float = 300, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        line = [str(Path(sys.executable).with_name("leviathan")), *arguments]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        return subprocess.run(line, cwd=cwd, env=variables, capture_output=True, text=True, timeout=timeout_s)

    return run
