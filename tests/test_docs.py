"""Run the commands of the README and the guide as a reader would: in order, in an empty folder per page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LONG = (
    "contrastive",
    "curation",
    "data",
    "evaluation",
    "extending",
    "filter",
    "fp8",
    "huggingface",
    "long_context",
    "metap",
    "own_data",
    "plan",
    "ranks",
    "recovery",
    "training",
)
BLOCK = re.compile(r"^```(?P<language>bash|python)(?P<info>[^\n]*)\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: Path, slurm: bool = False, slow: bool = False) -> list[tuple[str, str]]:
    """Return the language and code of the blocks to run. `slurm`: include blocks that need SLURM. `slow`: include slow
    blocks, on which no other block depends.
    """
    skipped = {"no-run"} | ({"slurm"} if not slurm else set()) | ({"slow"} if not slow else set())
    return [(m["language"], m["code"]) for m in BLOCK.finditer(page.read_text()) if m["info"].strip() not in skipped]


def run(
    language: str, code: str, folder: Path, executables: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a block in `folder`. `executables`: a folder with `leviathan` and `python`."""
    command = ["bash", "-eu", "-c", code] if language == "bash" else [str(executables / "python"), "-c", code]
    path = os.pathsep.join(map(str, (executables, Path(sys.executable).parent, os.environ["PATH"])))
    environment = {**os.environ, "PATH": path, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def first_failure(page: Path, folder: Path, executables: Path, slow: bool = False) -> str:
    """Return the first block of a page that fails, with its output, or an empty string."""
    for language, code in blocks(page, slow=slow):
        done = run(language, code, folder, executables)
        if done.returncode:
            return f"{code}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
    return ""


def quick(pages: list[Path]) -> list[Any]:
    """Return pages as parameters. Pages whose subject the rest of `make test` covers well are slow tests."""
    return [pytest.param(page, marks=[pytest.mark.slow] if page.stem in LONG else []) for page in pages]


@pytest.mark.parametrize("page", quick([page for page in PAGES if blocks(page)]), ids=lambda page: page.name)
def test_the_page_does_what_it_says(page, tmp_path, executables):
    failure = first_failure(page, tmp_path, executables)
    assert not failure, failure


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, slow=True) != blocks(page)], ids=lambda p: p.name
)
def test_the_slow_blocks_of_the_page_do_what_they_say(page, tmp_path, executables):
    failure = first_failure(page, tmp_path, executables, slow=True)
    assert not failure, failure


def test_a_broken_block_is_noticed(tmp_path, executables):
    page = tmp_path / "page.md"
    page.write_text("```bash\ntrue | false\n```\n```bash no-run\nfalse\n```\n```python\nassert 1 == 2\n```\n")
    assert [run(*block, tmp_path, executables).returncode for block in blocks(page)] == [1, 1]
    assert first_failure(page, tmp_path, executables).startswith("true | false\n")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
