"""Provide a fake endpoint for judges, small shards, and audits without the page, which takes a second to render."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.files import write_json
from data.filter import pipeline
from data.filter.audit import outputs
from tests.support.fakes.llm_server import KEY, Server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # where answers are stored
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    found = Server()
    yield found
    found.close()


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "SHARD_RECORDS", 32)


@pytest.fixture
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(audit: dict[str, Any], directory: Path, command: str) -> None:
        write_json(directory / outputs.AUDIT_JSON, audit)
        (directory / outputs.AUDIT_PAGE).write_text("")

    monkeypatch.setattr(outputs, "write_audit", write)
