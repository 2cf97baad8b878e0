"""The commands of the README and the guide, run as a reader would: in order, in an empty folder per page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LONG = ("data", "evaluation", "extending", "fp8", "huggingface", "long_context", "metap", "ranks", "training")
BLOCK = re.compile(r"^```(?P<language>bash|python)(?P<info>[^\n]*)\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: Path, slurm: bool = False, slow: bool = False) -> list[tuple[str, str]]:
    """Language and code of each block that is to be run; those that need SLURM only where there is one, slow ones (of
    which no other block has need) where asked for.
    """
    skipped = {"no-run"} | ({"slurm"} if not slurm else set()) | ({"slow"} if not slow else set())
    return [(m["language"], m["code"]) for m in BLOCK.finditer(page.read_text()) if m["info"].strip() not in skipped]


def run(language: str, code: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-eu", "-c", code] if language == "bash" else [sys.executable, "-c", code]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONSAFEPATH": "1", **variables}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def first_failure(page: Path, folder: Path, slow: bool = False) -> str:
    """The first block of a page that does not end with 0, and what it said."""
    for language, code in blocks(page, slow=slow):
        done = run(language, code, folder, OMP_NUM_THREADS="1")
        if done.returncode:
            return f"{code}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
    return ""


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Future[str]]:
    """Pages have nothing to do with each other: two run at a time."""
    wanted = {item.callspec.params["page"] for item in request.session.items if "outcomes" in item.fixturenames}
    with ThreadPoolExecutor(2) as pool:
        return {page: pool.submit(first_failure, page, tmp_path_factory.mktemp(page.stem)) for page in sorted(wanted)}


def quick(pages: list[Path]) -> list[Any]:
    """Pages as parameters, those of a subject that the rest of `make test` covers well among the slow tests."""
    return [pytest.param(page, marks=[pytest.mark.slow] if page.stem in LONG else []) for page in pages]


@pytest.mark.parametrize("page", quick([page for page in PAGES if blocks(page)]), ids=lambda page: page.name)
def test_the_page_does_what_it_says(page, outcomes):
    assert outcomes[page].result() == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, slow=True) != blocks(page)], ids=lambda p: p.name
)
def test_the_slow_blocks_of_the_page_do_what_they_say(page, tmp_path):
    assert first_failure(page, tmp_path, slow=True) == ""


def test_a_broken_block_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```bash\ntrue | false\n```\n```bash no-run\nfalse\n```\n```python\nassert 1 == 2\n```\n")
    assert [run(*block, tmp_path).returncode for block in blocks(page)] == [1, 1]
    assert first_failure(page, tmp_path).startswith("true | false\n")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
