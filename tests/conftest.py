"""Fixtures for all tests: the pool of ranks, a small corpus, the command as a process; and which tests run where."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.rank_pool import Pool
from tests.support.fork_server import ForkServer

torch.set_num_threads(1)  # tensors are small, and threads that wait for each other busily take the cores from others
ROOT = Path(__file__).resolve().parent.parent
SECONDS: dict[str, float] = json.loads((ROOT / "tests" / "seconds.json").read_text())
"""How long groups of tests took on two cores; only the order of work and the shards depend on it."""
WORDS = "the model reads a line and writes another def return if else while for"


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pool]:
    """`ranks(n, function, *arguments)`: see launch/rank_pool.py."""
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that train on two small text sources, with a cache that lives as long as the test run."""
    root, words = tmp_path_factory.mktemp("corpus"), WORDS.split()
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


@pytest.fixture(scope="session")
def executables() -> Iterator[Path]:
    """A folder with `leviathan` and `python` that start in milliseconds: see tests/support/fork_server.py."""
    with tempfile.TemporaryDirectory() as folder:  # tmp_path is too long for a socket
        server = ForkServer(Path(folder))
        yield Path(folder)
        server.close()


@pytest.fixture
def command(tmp_path: Path, executables: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `leviathan ARGUMENTS` in a folder (the test's own by default) and return the finished process. `real`: start an
    interpreter instead of a fork, for tests of what is imported.
    """

    def run(
        *arguments: str, cwd: Path = tmp_path, timeout_s: float = 300, real: bool = False, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        line = [str((Path(sys.executable).parent if real else executables) / "leviathan"), *arguments]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        return subprocess.run(line, cwd=cwd, env=variables, capture_output=True, text=True, timeout=timeout_s)

    return run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", metavar="N/M", help="run the N-th of M shards of the tests; a file is never divided")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep a file's tests on one worker, since they share fixtures; each page of the guide is by itself. Tests of ranks are
    one group: two pools of ranks at once would wait for each other's cores.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            if nodeid.startswith("tests/distributed/"):
                return "tests/distributed"
            return nodeid if "test_docs.py::" in nodeid else nodeid.split("::", 1)[0]

    return ByGroup(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Start the groups that take longest first, so that workers end together. Drop the groups of other shards."""
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        groups.setdefault(group_of(item), []).append(item)
    ordered = sorted(groups, key=lambda name: ("distributed/" not in name, -SECONDS.get(name, 0), name))
    if config.getoption("--shard"):
        index, count = map(int, config.getoption("--shard").split("/"))
        chosen = shard(ordered, index, count)
        config.hook.pytest_deselected(items=[item for name in ordered if name not in chosen for item in groups[name]])
        ordered = [name for name in ordered if name in chosen]
    items[:] = [item for name in ordered for item in groups[name]]


def group_of(item: pytest.Item) -> str:
    """The file without `tests/` and `.py`; for a page of the guide `docs/PAGE`; slow tests form groups of their own."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    name = item.path.relative_to(ROOT / "tests").with_suffix("").as_posix()
    if item.get_closest_marker("slow"):
        return f"slow:{name}:{item.name}"
    return f"docs/{parameters['page'].stem}" if "page" in parameters else name


def shard(groups: list[str], index: int, count: int) -> set[str]:
    """The groups of shard `index` of 1..`count`: each group goes to the shard with the least to do so far."""
    loads: list[float] = [0.0] * count
    chosen = set()
    for name in groups:
        least = loads.index(min(loads))
        loads[least] += SECONDS.get(name, 5.0)
        if least == index - 1:
            chosen.add(name)
    return chosen
