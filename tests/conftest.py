"""Provide fixtures for all tests (ranks, a small corpus, the command), and assign tests to workers and shards."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from launch.rank_pool import Pool
from tests.support.fork_server import ForkServer

# the same cases in every run; `HYPOTHESIS=fuzz` draws new ones, `EXAMPLES` of them for each test
hypothesis.settings.register_profile("tests", derandomize=True, deadline=None, database=None, max_examples=25)
EXAMPLES = int(os.environ.get("EXAMPLES", 20_000))
SLOW = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large, hypothesis.HealthCheck.filter_too_much]
hypothesis.settings.register_profile(
    "fuzz", deadline=None, database=None, max_examples=EXAMPLES, print_blob=True, suppress_health_check=SLOW
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS", "tests"))
torch.set_num_threads(1)  # tensors are small, and busy-waiting threads would take cores from other tests
ROOT = Path(__file__).resolve().parent.parent
SECONDS: dict[str, float] = json.loads((ROOT / "tests" / "seconds.json").read_text())
"""CPU seconds of each quick group, and seconds of each slow group on two cores. They decide the order and the shards."""
WORDS = "the model reads a line and writes another def return if else while for"


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pool]:
    """Yield a pool: `ranks(n, function, *arguments)` runs a function on n ranks (launch/rank_pool.py)."""
    pool = Pool(preload=["pytest", "core.config", "tests.support.bugs", "tests.support.tiny"])
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return overrides that train on two small text sources. Their cache is kept for the whole test session."""
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
    """Yield a folder with `leviathan` and `python` that start in milliseconds: see tests/support/fork_server.py."""
    with tempfile.TemporaryDirectory() as folder:  # tmp_path is too long for a Unix socket
        server = ForkServer(Path(folder))
        yield Path(folder)
        server.close()


@pytest.fixture
def command(tmp_path: Path, executables: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs `leviathan ARGUMENTS` in a folder (by default the test's) and returns the finished
    process. `real=True` starts an interpreter instead of a fork, for tests of imports.
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
    """Keep the tests of a file on one worker, since they share fixtures. Each page of the guide is a group of its own.
    The tests in `distributed/` are one group: two pools of ranks at once would compete for the cores.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            if nodeid.startswith("tests/distributed/"):
                return "tests/distributed"
            return nodeid if "test_docs.py::" in nodeid else nodeid.split("::", 1)[0]

    return ByGroup(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run `distributed/` first, then the longest groups, so that workers end together. Deselect other shards."""
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


def pytest_collection_finish() -> None:
    """Leave imported modules and collected tests out of later garbage collections."""
    gc.freeze()


def group_of(item: pytest.Item) -> str:
    """Return the group of a test: its file without `tests/` and `.py`, `docs/PAGE` or, if slow, `slow:FILE:TEST`."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    name = item.path.relative_to(ROOT / "tests").with_suffix("").as_posix()
    if item.get_closest_marker("slow"):
        return f"slow:{name}:{item.name}"
    return f"docs/{parameters['page'].stem}" if "page" in parameters else name


def shard(groups: list[str], index: int, count: int) -> set[str]:
    """Return the groups of shard `index` (1 to `count`). Each group goes to the shard with the least work so far."""
    loads: list[float] = [0.0] * count
    chosen = set()
    for name in groups:
        least = loads.index(min(loads))
        loads[least] += SECONDS.get(name, 5.0)
        if least == index - 1:
            chosen.add(name)
    return chosen
