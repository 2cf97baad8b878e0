"""Provide `refused`, with which tests read the error line of a failing command."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from launch.cli import main


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """Return a function that runs `leviathan WORDS`, checks its exit code `code` and returns its one error line."""

    def run(*words: str, code: int = 2) -> str:
        capsys.readouterr()
        assert main(words) == code
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and said[0].startswith("leviathan: error: "), said
        return said[0].removeprefix("leviathan: error: ")

    return run
