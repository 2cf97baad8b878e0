"""The endpoint that judges are tested against, and shards that tests can fill."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from data.filter import pipeline
from tests.support.llm_server import KEY, Server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    found = Server()
    yield found
    found.close()


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "SHARD_RECORDS", 32)
