"""Run the tests of the kernels on this GPU before anything is measured."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bench.gpu.context import Bench, BenchJob
from bench.gpu.record import BenchRow

ROOT = Path(__file__).resolve().parents[2]
TESTS = "tests/test_gpu_kernels.py"
LIMIT_S = 150


def checks(bench: Bench) -> Iterator[BenchJob]:
    yield BenchJob(TESTS, partial(_run, bench))


def _run(bench: Bench) -> Iterator[BenchRow]:
    """Run the tests in a new process; a dry run only collects them. Yield a row per failure, and one with the count."""
    if importlib.util.find_spec("pytest") is None:
        yield BenchRow("tests", TESTS, "pytest", missing="pytest is not installed: pip install pytest")
        return
    with tempfile.TemporaryDirectory(prefix="leviathan-") as folder:
        report = Path(folder) / "report.xml"
        options = ["--collect-only"] if bench.dry else [f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *options, TESTS]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            yield BenchRow("tests", TESTS, "pytest", "check", failed=f"not done after {LIMIT_S} s")
            return
        lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]]
        if report.exists():
            yield from _failures(report)
        failed = None if done.returncode == 0 else f"pytest ended with {done.returncode}"
        yield BenchRow("tests", TESTS, "pytest", "check", failed=failed, note=lines[-1])


def _failures(report: Path) -> Iterator[BenchRow]:
    for case in ElementTree.parse(report).iter("testcase"):
        for kind in ("failure", "error"):
            if (found := case.find(kind)) is not None:
                said = (found.get("message") or kind)[:300]
                yield BenchRow("tests", case.get("name", ""), "pytest", "check", failed=said)
