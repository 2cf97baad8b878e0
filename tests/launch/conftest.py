"""The line of an error, for all tests of the command."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from launch.cli import main


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """Run `leviathan WORDS`, which fails with this exit code; return the one line that says why."""

    def run(*words: str, code: int = 2) -> str:
        capsys.readouterr()
        assert main(words) == code
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("leviathan: error: ")
        return line.removeprefix("leviathan: error: ")

    return run
